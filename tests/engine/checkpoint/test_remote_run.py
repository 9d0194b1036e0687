"""A run on remote shards equals the run on the same local shards, bit for bit."""

import http.server
import threading
from functools import partial

import pytest

from jepa_kit.engine import build
from jepa_kit.engine.build import open_shards
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.training import train


class Breaking(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, but only half of the first shard."""

    broke = False

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        data = source.read()
        if self.path.endswith(".tar") and not Breaking.broke:
            Breaking.broke, data = True, data[: len(data) // 2]
        outputfile.write(data)


@pytest.fixture
def address(shards):
    Breaking.broke = False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Breaking, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_run_over_http_through_a_broken_stream(tiny, shards, address, tmp_path, capsys):
    changes = ["train.log_every=1", "data.backoff=0", f"data.cache={tmp_path / 'cache'}"]
    local = train(tiny(*changes[:1], f"train.output_dir={tmp_path / 'local'}"))
    remote = train(
        tiny(*changes, f"data.shards=[{address}/shard-000000.tar, {address}/shard-000001.tar]", "data.num_workers=1")
    )
    assert Breaking.broke
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (local, remote)]
    assert losses[0] == losses[1]
    assert "GB of shards in an epoch; data.cache is shared by the ranks" in capsys.readouterr().out


def test_rank_0_is_the_first_to_open_shards(tiny, shards, monkeypatch):
    """One process creates a missing index, and the others find it."""
    opened = []
    monkeypatch.setattr(build, "joined", lambda: True)
    monkeypatch.setattr(build, "broadcast_from_rank0", lambda decide: opened.append(("rank 0", decide())))
    assert len(build.open_together(tiny(), f"{shards}/shard-000001.tar")) == 10
    assert opened == [("rank 0", 10)]
    monkeypatch.setattr(build, "joined", lambda: False)
    assert len(build.open_together(tiny())) == 20
    assert len(opened) == 1


def test_the_options_of_data_reach_the_reader(tiny, shards, tmp_path):
    changes = [f"data.cache={tmp_path}", "data.cache_gb=3", "data.retries=7", "data.backoff=0.5", "data.timeout=9"]
    access = open_shards(tiny(*changes))._access
    assert (access.cache, access.cache_gb, access.retries, access.backoff, access.timeout) == (
        str(tmp_path),
        3.0,
        7,
        0.5,
        9.0,
    )
    assert open_shards(tiny(), f"{shards}/shard-000001.tar").shard_sizes.tolist() == [10]
