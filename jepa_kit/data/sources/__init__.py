"""Sources of shards: each lists its samples and makes any of them by number.

base.py       the protocol of a source; encoding images again
keys.py       keys of samples from names of files
opening.py    open the source that the user names
files.py      folders of image files, and tables of their paths
archives.py   .zip, .tar, .tar.gz, tars of tars
labels.py     labels from folders, tables and ImageNet's lists
cifar.py      CIFAR-10's and CIFAR-100's python archives
hub.py        Hugging Face data sets
reshard.py    WebDataset shards, to copy into new ones
scenes.py     synthetic scenes
"""
