"""Where shards come from: each kind of source lists samples and makes any of them by number.

base.py       what a source is; images made anew, if that is asked for
opening.py    from what a user names to a source
files.py      folders of image files, and tables of their paths
archives.py   .zip, .tar, .tar.gz, tars of tars
labels.py     labels from folders, tables and ImageNet's lists
cifar.py      CIFAR-10's and CIFAR-100's python archives
hub.py        data sets of Hugging Face
reshard.py    WebDataset shards, to be put into others
scenes.py     synthetic scenes
"""

from jepa_kit.data.sources.base import Recode, Refused, Source
from jepa_kit.data.sources.opening import SourceOptions, open_source
from jepa_kit.data.sources.scenes import Scenes

__all__ = ["Recode", "Refused", "Scenes", "Source", "SourceOptions", "open_source"]
