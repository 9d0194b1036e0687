"""Data: image files to batches on the device.

sources/     samples of folders, archives, tables, CIFAR, hubs, shards and scenes
making/      from a source to shards, in several processes, resumable
shards/      WebDataset shards with an index, read by sample number; indexing of those without one
remote/      downloads of remote shards, their cache, and their prefetch
listed.py    samples that are in no shard: folders and lists of images;  folders.py  finding and reading files
items.py     data sets of other libraries, whose items have numbers
images.py    decoding of image files;  segmentation.py  masks of classes
transforms/  crops, flips and colours; views, normalisation
loader.py    batches as a function of (seed, step);  workers.py  loader processes;  device.py  copies to the device
ignored_signals.py  signals of a process group that reach workers while they start
"""
