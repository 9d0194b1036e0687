"""Evaluation of what an encoder has learned.

    features   tokens to one feature for each image; runs read back
    networks   the encoders of a run, the same untrained, raw pixels
    store      features of all of them in one pass over the images, kept for later calls
    protocols  what is asked of them: one small registered part each
    report     any number of networks, protocols and labels in one table
    results    the same for programs; compare: any number of runs in one table and one figure
    health     what a representation and its predictions are like; verdict: in a word; online: inside a run
    visual     pictures of a run on a page; pictures: masks over images, principal components of patch features
    mask_page  what a masker draws

    shard_choice  which shards are looked at        neighbours  the vote of the nearest, of a protocol and of a probe

Nothing is imported here: each of scikit-learn and matplotlib takes a second.
"""
