"""Streams that break, stall and are refused: what is tried again, what is given up, and what came is kept."""

import io
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bad_server import serving
from iopath.common.file_io import PathHandler

from jepa_kit.data.remote import fetch
from jepa_kit.data.remote.fetch import Access, copy, expand, is_remote, is_shard, read
from jepa_kit.errors import StreamError

DATA = bytes(range(256)) * 400  # 102,400 bytes
QUICK = Access(retries=3, backoff=0.0)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    with serving(tmp_path) as found:
        yield found


@pytest.fixture
def no_ranges(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    with serving(tmp_path, ranges=False) as found:
        yield found


def fetched(address, access=QUICK, size=None):
    out = io.BytesIO()
    copy(address, out, access, size)
    return out.getvalue()


def test_patterns_are_those_of_webdataset():
    assert expand("/x/a-{008..010}.tar") == ["/x/a-008.tar", "/x/a-009.tar", "/x/a-010.tar"]
    assert expand(["/x/{a,b}", "c.tar::d.tar"]) == ["/x/a", "/x/b", "c.tar", "d.tar"]
    assert expand("pipe:cat /x/{0..1}.tar") == ["pipe:cat /x/0.tar", "pipe:cat /x/1.tar"]
    assert expand(["file:///x/a.tar", "file:b.tar"]) == ["/x/a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0..", r"shards \(='a-\{0..'\) must be a pattern whose braces match: "),
        ([], r"shards \(=\[\]\) must name at least one folder or shard"),
        (["a", ""], r"shards \(=\['a', ''\]\) must name at least one folder or shard, and none may be empty"),
        ("s3://b/t", r"shards \(='s3://b/t'\) cannot be opened: no handler is registered for s3://. Register one in a"),
        ("gs://b/t-{0..1}.tar", r"shards \(='gs://b/t-0.tar'\) cannot be opened: no handler is registered for gs://"),
        ("http://[bad", r"shards \(='http://\[bad'\) must be a URL such as http://host/path/.*: Invalid IPv6 URL"),
        ("http:///a.tar", r"shards \(='http:///a.tar'\) must be a URL such as .*: it has no host"),
        ("http://a:b/c.tar", r"shards \(='http://a:b/c.tar'\) must be a URL such as .*: Port could not be cast"),
        (
            "https://a/b c.tar",
            r"shards \(='https://a/b c.tar'\) must be .*: it contains a space or a control character; write",
        ),
    ],
)
def test_patterns_that_are_none(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand(pattern)


def test_kinds_of_addresses():
    assert [is_remote(a) for a in ("/x", "x.tar", "file:/x", "http://h/x", "s3://b/x", "pipe:cat x")] == [
        *[False] * 3,
        *[True] * 3,
    ]
    assert [is_shard(a) for a in ("/x", "x.tar", "http://h/x.tar?key=1", "pipe:cat x", "http://h/x")] == [
        False,
        *[True] * 3,
        False,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gb": 0.0}, r"cache_gb \(=0.0\) must be above 0"),
        ({"retries": -1}, r"retries \(=-1\) must be at least 0"),
        ({"backoff": -1.0}, r"backoff \(=-1.0\) must be at least 0 seconds"),
        ({"timeout": 0.0}, r"timeout \(=0.0\) must be above 0 seconds"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        Access(**options)


def test_a_broken_stream_goes_on_where_it_broke(server):
    server.plans["a.tar"] = [("stop", 30_000), ("stop", 70_000), None]
    assert fetched(f"{server.address}/a.tar") == DATA
    assert [wanted for _, wanted in server.requests] == [None, "bytes=30000-", "bytes=70000-"]


def test_without_ranges_it_starts_anew(no_ranges):
    no_ranges.plans["a.tar"] = [("stop", 30_000), ("stop", 20_000), None]
    assert fetched(f"{no_ranges.address}/a.tar") == DATA
    assert [wanted for _, wanted in no_ranges.requests] == [None, None, None]


def test_a_file_that_changed_between_two_tries_is_not_joined(server, tmp_path):
    server.plans["a.tar"] = [("stop", 30_000), None]
    changed = DATA[::-1] + b"more"

    def change(record):
        (tmp_path / "a.tar").write_bytes(changed)
        return True

    fetch.log.addFilter(change)
    try:
        assert fetched(f"{server.address}/a.tar") == changed
    finally:
        fetch.log.removeFilter(change)
    assert [wanted for _, wanted in server.requests] == [None, "bytes=30000-"]


def test_a_stream_that_stalls_is_left_and_tried_again(server):
    server.plans["a.tar"] = [("stall", 50_000), None]
    start = time.monotonic()
    assert fetched(f"{server.address}/a.tar", replace(QUICK, timeout=1.0)) == DATA
    assert 0.9 < time.monotonic() - start < 10
    assert server.requests[1] == ("a.tar", "bytes=50000-")


def test_one_that_always_breaks_is_given_up_and_what_came_is_kept(server, caplog):
    server.plans["a.tar"] = [("stop", 60_000)]
    out = io.BytesIO()
    with caplog.at_level(logging.WARNING), pytest.raises(StreamError, match=r"gave up after 4 tries and 60000 bytes"):
        copy(f"{server.address}/a.tar", out, QUICK)
    assert out.getvalue() == DATA[:60_000]
    assert len(server.requests) == 4
    assert "try 3 of 3" in caplog.text


def test_one_that_always_stalls_is_given_up(server):
    server.plans["a.tar"] = [("stall", 10)]
    with pytest.raises(StreamError, match=r"the stream stalled: no data for 0.2 s; gave up after 2 tries"):
        fetched(f"{server.address}/a.tar", Access(retries=1, backoff=0.0, timeout=0.2))


def test_progress_gives_new_tries(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(8 << 20))
    with serving(tmp_path) as server:
        server.plans["a.tar"] = [("stop", k << 20) for k in range(1, 8)] + [None]
        assert len(fetched(f"{server.address}/a.tar", Access(retries=1, backoff=0.0))) == 8 << 20


def test_the_length_of_an_index_finds_a_cut_that_the_server_does_not_tell(server):
    server.plans["a.tar"] = [("length", 30_000), None]
    assert fetched(f"{server.address}/a.tar", size=len(DATA)) == DATA
    assert len(server.requests) == 2


@pytest.mark.parametrize("code", [503, 429, 500])
def test_a_busy_server_is_asked_again(server, code):
    server.plans["a.tar"] = [("status", code), None]
    assert fetched(f"{server.address}/a.tar") == DATA


def test_a_range_that_is_refused_is_not_asked_for_again(server):
    server.plans["a.tar"] = [("stop", 30_000), ("status", 416), None]
    assert fetched(f"{server.address}/a.tar") == DATA
    assert [wanted for _, wanted in server.requests] == [None, "bytes=30000-", None]


@pytest.mark.parametrize("code", [404, 403, 410, 401])
def test_a_refusal_is_taken_for_one(server, code):
    server.plans["a.tar"] = [("status", code)]
    with pytest.raises(StreamError, match=rf"^HTTP {code} "):
        fetched(f"{server.address}/a.tar")
    assert len(server.requests) == 1


def test_waits_double(server, monkeypatch):
    waits = []
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    server.plans["a.tar"] = [("status", 503)]
    with pytest.raises(StreamError, match=r"HTTP Error 503: .*; gave up after 10 tries and 0 bytes"):
        fetched(f"{server.address}/a.tar", Access(retries=9, backoff=0.5))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_a_machine_that_is_not_there(server):
    with pytest.raises(StreamError, match=r"gave up after 2 tries and 0 bytes"):
        fetched("http://127.0.0.1:9/a.tar", Access(retries=1, backoff=0.0, timeout=1.0))


def test_pipes(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    assert fetched(f"pipe:cat '{tmp_path}/a.tar'") == DATA
    assert read(f"pipe:head -c 5 '{tmp_path}/a.tar'", QUICK) == DATA[:5]


def test_a_command_that_fails_is_run_again_from_its_start(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    command = (
        f"cd '{tmp_path}'; if [ -e tried ]; then cat a.tar; else touch tried; head -c 9000 a.tar; echo lost it >&2; "
        "exit 3; fi"
    )
    assert fetched(f"pipe:{command}") == DATA
    (tmp_path / "tried").unlink()
    with pytest.raises(StreamError, match=r"the command ended with status 3: lost it; gave up after 1 tries and 9000"):
        fetched(f"pipe:{command}", Access(retries=0))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_a_command_that_stalls_is_killed_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    command = f"sh -c 'echo $$ > \"{pid}\"; sleep 60'; true"
    with pytest.raises(StreamError, match=r"the stream stalled: no data for 1.5 s"):
        fetched(f"pipe:{command}", Access(retries=0, timeout=1.5))
    status, deadline = Path("/proc", pid.read_text().strip(), "stat"), time.monotonic() + 5

    def lives():
        return status.exists() and status.read_text().split()[2] not in "ZX"  # gone, or waiting to be reaped

    while lives() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not lives()


class _Memory(PathHandler):
    """An address scheme of its own, whose streams break once."""

    def __init__(self):
        self.breaks = [50_000]

    def _get_supported_prefixes(self):
        return ["memory://"]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        if path != "memory://a.tar":
            raise FileNotFoundError(f"{path} is not there")
        stream = io.BytesIO(DATA)
        if self.breaks:
            end, read_all = self.breaks.pop(), stream.read

            def broken(n):
                if stream.tell() >= end:
                    raise ConnectionResetError("reset")
                return read_all(min(n, end - stream.tell()))

            stream.read = broken
        return stream


class _Stream(io.BytesIO):
    """BytesIO with a ``read`` that can be replaced."""


def test_whatever_iopath_opens(monkeypatch):
    monkeypatch.setattr(io, "BytesIO", _Stream)
    handler = _Memory()
    fetch.path_manager.register_handler(handler, allow_override=True)
    assert expand("memory://{a,b}.tar") == ["memory://a.tar", "memory://b.tar"]
    assert fetched("memory://a.tar") == DATA
    assert handler.breaks == []
    with pytest.raises(StreamError, match=r"memory://b.tar is not there"):
        fetched("memory://b.tar")
