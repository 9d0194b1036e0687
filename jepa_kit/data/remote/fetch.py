"""Addresses of shards, and how what lies there comes to this machine: through breaks and stalls, or not at all.

An address is a path, ``file:``, ``http(s)://``, ``pipe:COMMAND`` (what the shell command prints), or whatever else a
handler of iopath's ``path_manager`` opens: ``jepa_kit.data.remote.fetch.path_manager.register_handler(...)``.
"""

from __future__ import annotations

import http.client
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from iopath.common.file_io import HTTPURLHandler, PathManager

from jepa_kit.data.shards.tars import COMPRESSED, compressed_shard
from jepa_kit.errors import StreamError

BLOCK = 1 << 18
PROGRESS = 1 << 20
"""Bytes that must come before new tries are given."""
LONGEST_WAIT = 60.0
"""Seconds; waits between tries double up to here."""
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers of an HTTP server that another try may change."""
HTTP = ("http://", "https://")


path_manager = PathManager()
path_manager.register_handler(HTTPURLHandler())

log = logging.getLogger(__name__)


class _WriteError(Exception):
    """The disk refused what arrived: no fault of the stream."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How shards of other machines are read.

    Args:
        cache: folder where they are kept; None for a temporary one of each process, removed at its end.
        cache_gb: bound of that folder, in 10**9 bytes: the shards used longest ago go first. None: no bound, or 20 for
            a temporary folder.
        retries: further tries after one that broke, stalled or was refused; progress gives new ones.
        backoff: seconds before the first further try; each next wait is twice as long, up to a minute.
        timeout: seconds without a byte after which a stream has stalled (http and pipes).

    Raises:
        ValueError: a value outside its range.
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
    """Whether an address is no path of this machine."""
    return address.startswith("pipe:") or ("://" in address and not address.startswith("file:"))


def is_shard(address: str) -> bool:
    """Whether an address names one shard, and not a folder of them."""
    return address.startswith("pipe:") or address.partition("?")[0].endswith(".tar")


def expand(addresses: str | Sequence[str]) -> list[str]:
    """Each address of a pattern, or of a list of them: ``a-{00..02}.tar``, ``{train,extra}``, ``a.tar::b.tar``.

    Braces are those of the shell, expanded by WebDataset; a list of one-letter names is no shell's business.

    Raises:
        ValueError: no address, an empty one, one that nothing can open, or braces that do not match.
    """
    from webdataset.shardlists import expand_urls  # here, since it brings all of torch along

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
    """Raises ValueError for an address that no try could open."""
    if address.startswith("pipe:"):
        return
    if COMPRESSED.search(address.partition("?")[0]) and not os.path.isdir(address):
        raise compressed_shard(address, "by its name")
    if not is_remote(address):
        return
    if address.startswith(HTTP):
        try:
            parts = urllib.parse.urlsplit(address)
            host, _ = parts.hostname, parts.port  # a port that is no number is a ValueError
            fault = None if host else "it names no host"
        except ValueError as error:
            fault = str(error)
        if re.search(r"[\0- \x7f]", address):
            fault = "it has a space or a control character; a space is written %20"
        if fault:
            raise ValueError(f"shards (={address!r}) must be an address as http://host/path/train-000000.tar: {fault}")
    elif not address.startswith(tuple(path_manager._path_handlers)):  # the manager takes it for a file here
        scheme = address.partition("://")[0]
        raise ValueError(
            f"shards (={address!r}) cannot be opened: no handler is registered for {scheme}://. Register one in a file "
            "under imports: jepa_kit.data.remote.fetch.path_manager.register_handler(...), or let a command print each "
            "shard, as 'pipe:aws s3 cp s3://bucket/train-{000000..000127}.tar -' does"
        )


def copy(address: str, out: BinaryIO, access: Access, size: int | None = None) -> None:
    """Copies what lies at an address into ``out``, an empty file that can be written and sought.

    A stream that breaks or stalls is tried again: from where it broke where the server has ranges, else from its
    start. What came is kept in ``out`` in any case.

    Args:
        size: bytes that must come, where it is known.

    Raises:
        StreamError: all tries failed, or another one would change nothing.
        OSError: ``out`` takes no more.
    """
    failures, best = 0, 0
    state = _State()
    while True:
        try:
            _copy_once(address, out, access.timeout, state)
            got = out.tell()
            if size is not None and got < size:
                raise ConnectionError(f"the stream ended after {got} of {size} bytes")
            out.truncate()
            return
        except _WriteError as error:  # noqa: PERF203 (a loop of tries)
            raise OSError(str(error)) from error.__cause__
        except (OSError, EOFError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:  # the range asked for is not there
                state.version = None
            elif isinstance(error, urllib.error.HTTPError) and error.code not in TRY_AGAIN:
                raise StreamError(f"HTTP {error.code} {error.reason}") from error
            if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
                raise StreamError(str(error)) from error
            got = out.tell()
            if got >= best + PROGRESS:  # it moves on: only tries that bring nothing are counted
                failures, best = 0, got
            failures += 1
            reason = _reason(error, access.timeout)
            if failures > access.retries:
                raise StreamError(f"{reason}; given up after {failures} tries and {got} bytes") from error
            wait = min(access.backoff * 2 ** (failures - 1), LONGEST_WAIT)
            log.warning("%s: %s; try %d of %d in %g s", address, reason, failures, access.retries, wait)
            time.sleep(wait)


def read(address: str, access: Access) -> bytes:
    """All bytes of a small file at an address.

    Raises:
        StreamError: see ``copy``.
    """
    with tempfile.TemporaryFile() as out:
        copy(address, out, access)
        out.seek(0)
        return out.read()


@dataclass
class _State:
    """What a next try knows of the one before: the server's mark of this version of the file."""

    version: str | None = None


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"the stream stalled: no byte came for {timeout:g} s"
    return str(error) or type(error).__name__


def _write(out: BinaryIO, block: bytes) -> None:
    try:
        out.write(block)
    except OSError as error:
        raise _WriteError(str(error)) from error


def _copy_once(address: str, out: BinaryIO, timeout: float, state: _State) -> None:
    """One try. Leaves ``out`` where the next byte belongs."""
    if address.startswith("pipe:"):
        out.seek(0)  # a command starts from its beginning
        _copy_pipe(address.removeprefix("pipe:"), out, timeout)
    elif address.startswith(HTTP):
        _copy_http(address, out, timeout, state)
    else:
        _copy_handler(address, out)


def _copy_http(address: str, out: BinaryIO, timeout: float, state: _State) -> None:
    begin = out.tell() if state.version else 0  # without a mark, two tries might join two versions of the file
    request = urllib.request.Request(address, headers={"User-Agent": "jepa_kit"})
    if begin:
        request.add_header("Range", f"bytes={begin}-")
        request.add_header("If-Range", state.version or "")
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if answer.status != 206:
            begin = 0
        out.seek(begin)
        mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        state.version = None if mark is None or mark.startswith("W/") else mark
        length = answer.headers.get("Content-Length")
        while block := answer.read1(BLOCK):  # what is there: read would wait for all, and lose it in a stall
            _write(out, block)
        # http.client says nothing where a body ends before its length
        if length is not None and out.tell() < begin + int(length):
            raise ConnectionError(f"the stream ended after {out.tell()} of {begin + int(length)} bytes")


def _copy_pipe(command: str, out: BinaryIO, timeout: float) -> None:
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
                    block = process.stdout.read(BLOCK)
                    if not block:
                        break
                    _write(out, block)
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


def _copy_handler(address: str, out: BinaryIO) -> None:
    begin = out.tell()
    with path_manager.open(address, "rb") as stream:
        if begin and stream.seekable():
            stream.seek(begin)
        else:
            out.seek(0)
        while block := stream.read(BLOCK):
            _write(out, block)
