"""Data: shards written and read, the order of an epoch, crops, batches, and synthetic scenes.

scenes.py, scene_drawing.py, scene_shapes.py   synthetic scenes: labels and layout, drawing, solids and patterns
sources.py                                     folders, archives and scenes as samples
shard_writing.py, shards.py                    WebDataset shards with an index: written, and read by number
images.py, transforms.py                       bytes to RGB pixels; crops, flip, normalisation
order.py, loader.py                            which sample comes when; batches made in loader workers
"""
