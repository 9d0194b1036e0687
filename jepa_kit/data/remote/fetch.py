"""Download remote files, with retries, timeouts and resumption of broken streams.

An address is a path, ``file:``, ``http(s)://``, ``pipe:COMMAND`` (the output of a shell command), or any URL that a
handler of iopath's ``path_manager`` opens: ``jepa_kit.data.remote.fetch.path_manager.register_handler(...)``.
"""

from __future__ import annotations

import http.client
import io
import logging
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from iopath.common.file_io import HTTPURLHandler, PathManager

from jepa_kit.compat import prefixes_of
from jepa_kit.data.shards.tars import COMPRESSED, compressed_shard
from jepa_kit.errors import StreamError

BLOCK = 1 << 18
PROGRESS = 1 << 20
"""Bytes of progress that reset the count of retries."""
LONGEST_WAIT = 60.0
"""Seconds; limit of the exponential backoff."""
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""HTTP status codes that are worth a retry."""
HTTP = ("http://", "https://")


path_manager = PathManager()
path_manager.register_handler(HTTPURLHandler())

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Options for reading remote shards.

    Args:
        cache: folder of cached shards; None for a temporary one per process, removed at exit.
        cache_gb: limit of that folder in 10**9 bytes; the least recently used shards are evicted. None: no limit, or
            20 for a temporary folder.
        retries: retries after a stream broke, stalled or was refused; progress resets the count.
        backoff: seconds before the first retry, doubled for each next one, up to a minute.
        timeout: seconds without a byte after which a stream counts as stalled (http and pipes).

    Raises:
        ValueError: a value is outside its range.
    """

    cache: str | None = None
    cache_gb: float | None = None
    retries: int = 5
    backoff: float = 1.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.cache_gb is not None and not self.cache_gb > 0:
            raise ValueError(f"cache_gb (={self.cache_gb}) must be above 0")
        if self.retries < 0:
            raise ValueError(f"retries (={self.retries}) must be at least 0")
        if not self.backoff >= 0:
            raise ValueError(f"backoff (={self.backoff}) must be at least 0 seconds")
        if not self.timeout > 0:
            raise ValueError(f"timeout (={self.timeout}) must be above 0 seconds")


def is_remote(address: str) -> bool:
    """Whether an address is not a local path."""
    return address.startswith("pipe:") or ("://" in address and not address.startswith("file:"))


def is_shard(address: str) -> bool:
    """Whether an address names one shard and not a folder."""
    return address.startswith("pipe:") or address.partition("?")[0].endswith(".tar")


def expand(addresses: str | Sequence[str]) -> list[str]:
    """Expand a pattern or a list of patterns: ``a-{00..02}.tar``, ``{train,extra}``, ``a.tar::b.tar``.

    WebDataset expands braces, as a shell does.

    Raises:
        ValueError: there is no address, one is empty or cannot be opened, or braces do not match.
    """
    from webdataset.shardlists import expand_urls  # here, because it imports torch

    patterns = [addresses] if isinstance(addresses, str) else list(addresses)
    found: list[str] = []
    for pattern in patterns:
        try:
            found += expand_urls(pattern)
        except ValueError as error:  # noqa: PERF203 (the message names the pattern)
            raise ValueError(f"shards (={pattern!r}) must be a pattern whose braces match: {error}") from error
    if not found or not all(found):
        raise ValueError(f"shards (={addresses!r}) must name at least one folder or shard, and none may be empty")
    for address in found:
        _check_address(address)
    return [os.path.expanduser(re.sub(r"^file:(//)?", "", address)) for address in found]


def _check_address(address: str) -> None:
    """Raise ValueError for an address that can never be opened."""
    if address.startswith("pipe:"):
        return
    if COMPRESSED.search(address.partition("?")[0]) and not os.path.isdir(address):
        raise compressed_shard(address, "by its name")
    if not is_remote(address):
        return
    if address.startswith(HTTP):
        try:
            parts = urllib.parse.urlsplit(address)
            host, _ = parts.hostname, parts.port  # raises ValueError for a malformed port
            fault = None if host else "it has no host"
        except ValueError as error:
            fault = str(error)
        if re.search(r"[\0- \x7f]", address):
            fault = "it contains a space or a control character; write a space as %20"
        if fault:
            raise ValueError(f"shards (={address!r}) must be a URL such as http://host/path/train-000000.tar: {fault}")
    elif not address.startswith(prefixes_of(path_manager)):  # path_manager would treat it as a local path
        scheme = address.partition("://")[0]
        raise ValueError(
            f"shards (={address!r}) cannot be opened: no handler is registered for {scheme}://. Register one in a file "
            "under imports: jepa_kit.data.remote.fetch.path_manager.register_handler(...), or let a command print each "
            "shard, as 'pipe:aws s3 cp s3://bucket/train-{000000..000127}.tar -' does"
        )


def copy(address: str, out: BinaryIO, access: Access, size: int | None = None) -> None:
    """Copy the contents of an address into ``out``, an empty, writable and seekable file.

    A stream that breaks or stalls is retried: from the byte where it broke if the server supports ranges, else from
    the start. ``out`` keeps the partial contents if all retries fail.

    Args:
        size: expected bytes, if known.

    Raises:
        StreamError: all retries failed, or the error is permanent.
        OSError: ``out`` cannot be written to.
    """
    failures, best = 0, 0
    tags: dict[str, str] = {}
    blocks: Iterator[bytes] | None = None
    while True:
        try:
            blocks = blocks or _open(address, out, access.timeout, tags)
            block = next(blocks, b"")
            if not block and size is not None and out.tell() < size:
                raise ConnectionError(f"the stream ended after {out.tell()} of {size} bytes")
        except (OSError, EOFError, http.client.HTTPException) as error:  # noqa: PERF203 (a loop of tries)
            blocks = None
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:  # range not satisfiable: start again
                tags.clear()
            elif isinstance(error, urllib.error.HTTPError) and error.code not in TRY_AGAIN:
                raise StreamError(f"HTTP {error.code} {error.reason}") from error
            if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
                raise StreamError(str(error)) from error
            got = out.tell()
            if got >= best + PROGRESS:  # count only retries without progress
                failures, best = 0, got
            failures += 1
            reason = _reason(error, access.timeout)
            if failures > access.retries:
                raise StreamError(f"{reason}; gave up after {failures} tries and {got} bytes") from error
            wait = min(access.backoff * 2 ** (failures - 1), LONGEST_WAIT)
            log.warning("%s: %s; retry %d of %d in %g s", address, reason, failures, access.retries, wait)
            time.sleep(wait)
        else:
            out.write(block)  # not in the block above: its errors are of the local disk
            if not block:
                out.truncate()
                return


def read(address: str, access: Access) -> bytes:
    """Return the contents of a small file.

    Raises:
        StreamError: see ``copy``.
    """
    out = io.BytesIO()
    copy(address, out, access)
    return out.getvalue()


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"the stream stalled: no data for {timeout:g} s"
    return str(error) or type(error).__name__


def _open(address: str, out: BinaryIO, timeout: float, tags: dict[str, str]) -> Iterator[bytes]:
    """Return the blocks that follow those in ``out``, or all, and move ``out`` to the position of the first.

    Args:
        tags: URL -> the server's version tag of the file, from the previous try.
    """
    if address.startswith("pipe:"):
        out.seek(0)  # a command starts from its beginning
        return _read_pipe(address.removeprefix("pipe:"), timeout)
    return _read_http(address, out, timeout, tags) if address.startswith(HTTP) else _read_handler(address, out)


def _read_http(address: str, out: BinaryIO, timeout: float, tags: dict[str, str]) -> Iterator[bytes]:
    begin = out.tell() if address in tags else 0  # without a tag, two tries might join two versions of the file
    ranges = {"Range": f"bytes={begin}-", "If-Range": tags[address]} if begin else {}
    request = urllib.request.Request(address, headers={"User-Agent": "jepa_kit", **ranges})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if answer.status != 206:
            begin = 0
        out.seek(begin)
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "W/"
        tags.clear()
        tags |= {} if tag.startswith("W/") else {address: tag}
        length = answer.headers.get("Content-Length")
        while block := answer.read1(BLOCK):  # read() would wait for all, and lose it in a stall
            yield block
        # http.client does not report a body that ends early
        if length is not None and out.tell() < begin + int(length):
            raise ConnectionError(f"the stream ended after {out.tell()} of {begin + int(length)} bytes")


def _read_pipe(command: str, timeout: float) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=complaints, bufsize=0, start_new_session=True
        )
        assert process.stdout is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if not selector.select(timeout):
                        raise TimeoutError
                    if not (block := process.stdout.read(BLOCK)):
                        break
                    yield block
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        finally:
            if process.poll() is None:  # the shell's children too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        if status:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ConnectionError(f"the command ended with status {status}{''.join(f': {line}' for line in last)}")


def _read_handler(address: str, out: BinaryIO) -> Iterator[bytes]:
    with path_manager.open(address, "rb") as stream:
        if stream.seekable():
            stream.seek(out.tell())
        else:
            out.seek(0)
        while block := stream.read(BLOCK):
            yield block
