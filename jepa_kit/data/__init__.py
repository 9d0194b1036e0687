"""Data: make shards, read them, and turn their images into batches.

sources/         folders, archives, tables, CIFAR, Hugging Face data sets, shards and scenes as samples
making/          write shards by several processes, resume an interrupted run, verify shards
shards/          the format of shards, their index, and random access to their samples
remote/          download, cache and prefetch remote shards
transforms/      crops, flips, colours, normalisation
images.py        decode bytes to RGB images
segmentation.py  decode and encode masks
order.py         the order of the samples in an epoch
loader.py        batches
workers.py       loader workers: their errors and how they end
device.py        transfer of batches to the device
errors.py        skipped and refused samples, and how many may be skipped
"""
