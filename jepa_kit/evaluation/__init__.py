"""Evaluation of what an encoder has learned.

    features   tokens to one feature for each image; baselines; runs read back
    probes     a linear classifier and nearest neighbours on frozen features
    report     any number of networks, protocols and labels in one table
    pictures   masks over images, and principal components of patch features

Nothing is imported here: each of scikit-learn and matplotlib takes a second.
"""
