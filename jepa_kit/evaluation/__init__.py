"""Evaluation of what an encoder has learned.

    features   tokens to one feature for each image; runs read back
    networks   the encoders of a run, the same untrained, raw pixels
    store      features of all of them in one pass over the images, kept for later calls
    protocols  what is asked of them: one small registered part each
    report     any number of networks, protocols and labels in one table
    results    the same for programs; compare: any number of runs in one table and one figure
    pictures   masks over images, and principal components of patch features

Nothing is imported here: each of scikit-learn and matplotlib takes a second.
"""
