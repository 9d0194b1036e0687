"""Handlers of remote storage in a local folder: a bucket that cannot rename, like an object store, and a disk."""

import os
import shutil
from pathlib import Path

from iopath.common.file_io import PathHandler


class BucketError(Exception):
    """An error that is not an OSError, like those of botocore."""


class Bucket(PathHandler):
    """``bucket://``: files by whole keys; no folders, no rename.

    Attributes:
        refuse: gets the address of what is about to be written; True breaks the copy in its middle.
        written: addresses, in order.
    """

    PREFIX = "bucket://"

    def __init__(self, folder):
        super().__init__()
        self.folder, self.written = Path(folder), []
        self.refuse = lambda address: False

    def path(self, address):
        return self.folder / address.removeprefix(self.PREFIX)

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return self.path(path).open(mode)

    def _exists(self, path, **kwargs):
        return self.path(path).is_file()

    def _isfile(self, path, **kwargs):
        return self.path(path).is_file()

    def _ls(self, path, **kwargs):
        """List like iopath's S3PathHandler: whole keys, and the folder itself."""
        held = sorted(self.path(path).iterdir()) if self.path(path).is_dir() else []
        key = path.removeprefix(self.PREFIX)
        return [key, *(f"{key}{inner.name}{'/' if inner.is_dir() else ''}" for inner in held)]

    def _rm(self, path, **kwargs):
        self.path(path).unlink()

    def _copy_from_local(self, local_path, dst_path, overwrite=False, **kwargs):
        target = self.path(dst_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.refuse(dst_path):
            self.break_off(Path(local_path), target)
        shutil.copyfile(local_path, target)
        self.written.append(dst_path)
        return True

    def break_off(self, source, target):
        """Fail like an object store, which shows nothing of an incomplete upload."""
        raise BucketError("the bucket is full")


class Disk(Bucket):
    """``disk://``: a file system with folders and renames; a broken copy leaves half a file."""

    PREFIX = "disk://"

    def _ls(self, path, **kwargs):
        return os.listdir(self.path(path))

    def _mkdirs(self, path, **kwargs):
        self.path(path).mkdir(parents=True, exist_ok=True)

    def _mv(self, src_path, dst_path, **kwargs):
        if self.path(dst_path).exists():
            return False
        self.path(src_path).rename(self.path(dst_path))
        return True

    def break_off(self, source, target):
        target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        raise OSError(28, "No space left on device")
