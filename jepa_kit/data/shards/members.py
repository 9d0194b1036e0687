"""List the files of a tar shard that may be damaged, and group them into samples."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jepa_kit.data.shards.tars import HEADER_ERRORS, Link, Refusal, follow, is_filler, read_link, stored_size


class Member(NamedTuple):
    """A file of a shard: its name, the place of its bytes, and the name in the header before them.

    The names differ for a link: it has the place and the header of its target.
    """

    name: str
    offset: int
    size: int
    header: str


def list_members(path: str) -> tuple[list[Member], list[Refusal]]:
    """Return the complete files of a shard, links included, and what is left out.

    A damaged header is skipped: files before and after it are found.

    Raises:
        OSError: the shard cannot be read.
    """
    size = os.path.getsize(path)
    found: list[Member | Link] = []
    files: dict[str, Member] = {}  # normalised path -> the last file of that name
    refused: list[Refusal] = []
    end, reason = 0, "the shard is corrupt or cut short there"
    with open(path, "rb") as stream:
        try:
            # ignore_zeros makes tarfile skip blocks that are no header
            with tarfile.open(path, "r:", ignore_zeros=True) as tar:
                for member in tar:
                    if member.offset > end and not is_filler(stream, end, member.offset):
                        text = f"bytes {end} to {member.offset} are no tar members: the shard is corrupt there"
                        refused.append(Refusal(f"before {member.name}", text))
                    if member.offset_data + stored_size(member) > size:
                        refused.append(Refusal(member.name, f"the shard ends after {size} bytes, inside this member"))
                        end = size
                        break
                    end, file = tar.offset, _read_member(member, files)
                    if isinstance(file, str):
                        refused.append(Refusal(member.name, file))
                    elif file is not None:
                        found.append(file)
        except HEADER_ERRORS as error:
            reason = str(error) or type(error).__name__
        if end < size and not is_filler(stream, end, size):
            refused.append(Refusal(f"from byte {end} on", f"no tar members: {reason}"))
    return _resolve_links(found, files, refused), refused


def _read_member(member: tarfile.TarInfo, files: dict[str, Member]) -> Member | Link | str | None:
    """Return a file, a link to a later file, None for a folder, or a message why the member is refused."""
    if member.issparse():
        return "a sparse file (tar -S), whose bytes are not in one piece: pack the shard again without -S"
    if member.islnk() or member.issym():
        link = read_link(member, member.name)
        if link.path not in files:  # a symbolic link to a later file, or a broken link
            return link
        file = files[link.path]._replace(name=member.name)
    elif member.isreg():
        file = Member(member.name, member.offset_data, member.size, member.name)
    else:
        return None if member.isdir() else "a device, a pipe or a member of unknown type, not a file"
    files[os.path.normpath(member.name)] = file
    return file


def _resolve_links(found: Sequence[Member | Link], files: Mapping[str, Member], refused: list[Refusal]) -> list[Member]:
    """Return the files, with links to later files resolved; broken links are added to `refused`."""
    links = {os.path.normpath(entry.name): entry for entry in found if isinstance(entry, Link)}
    resolved = []
    for entry in found:
        if isinstance(entry, Member):
            resolved.append(entry)
        elif target := files.get(follow(entry.path, links)):
            resolved.append(target._replace(name=entry.name))
        else:
            refused.append(Refusal(entry.name, f"a link to {entry.written!r}, which is no file of the shard"))
    return resolved


def group_samples(members: Sequence[Member]) -> list[tuple[str, dict[str, Member]]]:
    """Return (key, extension -> member) of each sample, in the order of their first members.

    The key is the name up to the first dot of its last part. A member whose key and extension occurred before starts
    another sample of that key: shards may have been concatenated.
    """
    samples: list[tuple[str, dict[str, Member]]] = []
    latest: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem:
            continue
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        if key not in latest or extension in latest[key]:
            latest[key] = {}
            samples.append((key, latest[key]))
        latest[key][extension] = member
    return samples
