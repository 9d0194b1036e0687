"""Data: shards written and read, the order of an epoch, crops, batches, and synthetic scenes.

scenes.py, scene_drawing.py, scene_shapes.py   synthetic scenes: labels and layout, drawing, solids and patterns
sources/                                       folders, archives, tables, CIFAR, hubs, shards and scenes as samples
shard_writing.py, segmentation.py              the format of a shard: members, masks, index
shard_making.py, sample_workers.py             from a source to shards, by several processes, with limits
shard_journal.py, shard_verify.py, progress.py where an interrupted run goes on; shards against their index; time left
shards.py                                      WebDataset shards with an index, read by number
parts.py, foreign.py, tars.py                  which shards a name stands for; the index of those that have none
identity.py                                    what tells data sets apart
reading.py, streams.py, cache.py               bytes of a shard; of other machines: fetched, through breaks, and kept
faults.py                                      what may be missing, and how much
images.py, transforms/                         bytes to RGB pixels; crops, flips, colours, normalisation
device.py                                      batches on their way to the device
order.py, loader.py, ahead.py                  which sample comes when; batches and what they need ahead
workers.py                                     loader workers: how they end, and what they cannot send
"""
