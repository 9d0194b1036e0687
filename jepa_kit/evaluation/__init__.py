"""Evaluation of what an encoder has learned.

    features         tokens to one feature per image; loading of runs
    feature_sources  the encoders of a run, the same untrained, raw pixels
    feature_cache    features of all of them in one pass over the images, cached for later calls
    protocols/       measurements of features: one small registered part each
    evaluate         any number of networks, protocols and labels
    tables/          rows as a table, as a file of results, and of several runs in one table and figure
    health/          properties of a representation and its predictions, and a verdict; online: during a run
    pictures/        pictures of a run: masks over images, principal components of patch features
    masks/           figures and pictures of a masker's masks
    shard_choice     default shards of the tools
    neighbours       classification by nearest neighbours, for a protocol and a probe during a run

Nothing is imported here, because scikit-learn and matplotlib each take a second.
"""
