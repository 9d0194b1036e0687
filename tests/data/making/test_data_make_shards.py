"""Write shards: limits, splits, refused samples; a run that is interrupted anywhere resumes to the same bytes."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from small_shards import encoded, make_samples, picture

from jepa_kit import files
from jepa_kit.data.making import make_shards, write_log
from jepa_kit.data.making.make_shards import Limits, TooManyRefused, check_apart, make, orders, split_folder
from jepa_kit.data.making.write_log import WriteLog, lock_output, prepare_folders, unfinished
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import pack, tar_size
from jepa_kit.data.sources.base import Refused, single_split
from jepa_kit.data.sources.scenes import Scenes


class Stub:
    """A source of samples from a list; None is a refused one."""

    mask_classes = ()
    mixed = False
    notes = ()

    def __init__(self, samples, splits=None):
        self.classes = {"class": tuple("abcd")}
        self.samples, self.splits = samples, splits or single_split(len(samples))

    def __len__(self):
        return len(self.samples)

    def name(self, i):
        return f"file {i:03d}"

    def sample(self, i):
        if self.samples[i] is None:
            raise Refused(f"reason {i}")
        return self.samples[i]

    def fingerprint(self):
        return "stub"


SAMPLES = make_samples(40)
WITH_BAD = [None if k in (3, 4, 17, 39) else s for k, s in enumerate(SAMPLES)]


def run(source, out, *, shuffle=True, split_val=0.0, seed=0, workers=1, overwrite=False, made_by=None, **limits):
    out.mkdir(exist_ok=True)
    plan = orders(source, seed=seed, shuffle=shuffle, split_val=split_val)
    limits = {"samples": 6, "refused": 1.0} | limits
    made_by = made_by or {"source": "stub", "seed": seed, "split_val": split_val}
    logs = [WriteLog(split_folder(str(out), split), numbers, made_by) for split, numbers in plan.items()]
    prepare_folders(str(out), logs, overwrite=overwrite)
    shown = []
    made = make(source, logs, limits=Limits(**limits), workers=workers, show=shown.append)
    return made, shown


def tree(folder):
    """Return path -> digest of every file."""
    return {
        os.path.relpath(os.path.join(where, name), folder): hashlib.sha256(Path(where, name).read_bytes()).hexdigest()
        for where, _, names in os.walk(folder)
        for name in names
    }


def keys(folder):
    dataset = ShardDataset(folder)
    return [dataset.key(i) for i in range(len(dataset))]


@pytest.mark.parametrize("workers", [1, 3])
def test_all_samples_in_order(tmp_path, workers):
    (made,), shown = run(Stub(SAMPLES), tmp_path / "out", shuffle=False, workers=workers)
    assert (sum(shard.samples for shard in made.shards), len(made.shards), made.refused) == (40, 7, [])
    assert keys(tmp_path / "out") == [s.key for s in SAMPLES]
    assert ShardDataset(tmp_path / "out").shard_sizes.tolist() == [6] * 6 + [4]
    assert shown == list(range(41))


def test_the_number_of_workers_and_the_chunks_change_nothing(tmp_path, monkeypatch):
    run(Stub(WITH_BAD), tmp_path / "a", workers=1)
    run(Stub(WITH_BAD), tmp_path / "b", workers=3)
    monkeypatch.setattr("jepa_kit.data.making.sample_workers.CHUNK_BYTES", 1)
    run(Stub(WITH_BAD), tmp_path / "c", workers=2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


@pytest.mark.integration
def test_processes_that_start_from_nothing(tmp_path, monkeypatch):
    """Processes that are not forked, as on macOS, receive sources by pickle."""
    source = Scenes(num_scenes=20, size=(16, 16), seed=0)
    run(source, tmp_path / "forked", workers=1)
    monkeypatch.setattr("jepa_kit.data.making.sample_workers.sys.platform", "darwin")
    run(source, tmp_path / "spawned", workers=2)
    assert tree(tmp_path / "spawned") == tree(tmp_path / "forked")


def test_shards_of_bytes(tmp_path):
    limit = 30720
    run(Stub(SAMPLES), tmp_path / "out", shuffle=False, samples=None, bytes=limit)
    assert keys(tmp_path / "out") == [s.key for s in SAMPLES]
    index = json.loads((tmp_path / "out/index.json").read_text())
    sizes = [entry["bytes"] for entry in index["shards"]]
    assert max(sizes) <= limit
    firsts = np.cumsum([0] + [entry["samples"] for entry in index["shards"]])
    for k in range(len(sizes) - 1):  # no shard had room for the next one's first sample
        needed = sum(len(pack(s).data) for s in SAMPLES[firsts[k] : firsts[k + 1] + 1])
        assert tar_size(needed) > limit


def test_a_sample_that_is_longer_than_a_shard_may_be_has_its_own(tmp_path):
    (made,), _ = run(Stub(SAMPLES[:5]), tmp_path / "out", samples=None, bytes=10)
    assert (sum(shard.samples for shard in made.shards), len(made.shards)) == (5, 5)


def test_both_limits(tmp_path):
    run(Stub(SAMPLES), tmp_path / "out", samples=2, bytes=10**9)
    assert ShardDataset(tmp_path / "out").shard_sizes.tolist() == [2] * 20


def test_what_is_refused_leaves_no_gap(tmp_path):
    (made,), _ = run(Stub(WITH_BAD), tmp_path / "out", shuffle=False)
    assert ShardDataset(tmp_path / "out").shard_sizes.tolist() == [6] * 6
    expected = [(f"file {k:03d}", f"reason {k}") for k in (3, 4, 17, 39)]
    assert made.refused == expected
    listed = json.loads((tmp_path / "out/index.json").read_text())["refused"]
    assert listed == [{"name": name, "reason": reason} for name, reason in expected]


def test_too_many_refused_stops_and_resumes_when_more_are_allowed(tmp_path):
    with pytest.raises(TooManyRefused) as stopped:
        run(Stub(WITH_BAD), tmp_path / "out", shuffle=False, refused=0.05)
    assert str(stopped.value) == (
        "3 of 40 samples were refused, above --max-refused (=0.05): file 003 (reason 3); file 004 (reason 4); "
        "file 017 (reason 17)"
    )
    assert unfinished(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="are unfinished"):
        ShardDataset(tmp_path / "out")
    run(Stub(WITH_BAD), tmp_path / "out", shuffle=False, refused=0.1)
    run(Stub(WITH_BAD), tmp_path / "whole", shuffle=False)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("split_val", [0.0, 0.25])
def test_nothing_but_refusals(tmp_path, split_val):
    with pytest.raises(ValueError, match=r"source \(='stub'\) has no image for .*: file 000 \(reason 0\); .*; and "):
        run(Stub([None] * 20), tmp_path / "out", split_val=split_val, shuffle=False)
    assert not list((tmp_path / "out").glob("*.tar"))


class Cut(Exception):
    """Ends a run."""


@contextlib.contextmanager
def cut_off(module, name, calls, *, before, certain=True):
    """Make one call of a function raise, before or after its work, which ends the block."""
    real, count = getattr(module, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == calls and before:
            raise Cut
        result = real(*args, **kwargs)
        if count[0] == calls:
            raise Cut
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counted)
        with pytest.raises(Cut) if certain else contextlib.suppress(Cut):
            yield


PLACES = [
    ("a shard's bytes", files, "flush", True),
    ("a shard's name", os, "replace", True),
    ("after its name", os, "replace", False),
    ("the log", os, "fsync", False),
    ("the index", make_shards, "write_index", False),
]


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize(("where", "module", "name", "before"), PLACES, ids=[p[0] for p in PLACES])
def test_a_run_that_is_cut_off_anywhere_ends_in_the_same_bytes(tmp_path, where, module, name, before, calls):
    """A kill leaves what is on disk; here only the temporary file of a shard is deleted after the cut."""
    source = Stub(WITH_BAD)
    run(source, tmp_path / "whole", split_val=0.3)
    with cut_off(module, name, calls, before=before, certain=calls == 1):
        run(source, tmp_path / "cut", split_val=0.3)
    run(source, tmp_path / "cut", split_val=0.3)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("rest", ['{"shard": {"file": "shard-0', '{"shard": "x"}'])
def test_a_log_that_was_cut_in_its_last_line(tmp_path, rest):
    source = Stub(SAMPLES)
    run(source, tmp_path / "whole")
    with cut_off(make_shards, "write_packed", 3, before=False):
        run(source, tmp_path / "cut")
    log = tmp_path / "cut/UNFINISHED"
    assert len(log.read_text().splitlines()) == 3  # the command, and two shards
    with log.open("a") as f:
        f.write(rest)  # without a line break
    (tmp_path / "cut/.shard-000003.tar.77.partial").write_text("half a shard")
    run(source, tmp_path / "cut")
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_what_is_written_is_not_made_again(tmp_path):
    source = Stub(SAMPLES)
    with cut_off(make_shards, "write_packed", 4, before=True):
        run(source, tmp_path / "out", shuffle=False)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert len(times) == 3
    _, shown = run(source, tmp_path / "out", shuffle=False)
    assert shown[0] == 18
    assert {n: t for n, t in times.items() if (tmp_path / "out" / n).stat().st_mtime_ns == t} == times


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_shard_of_the_interrupted_run_that_changed(tmp_path, damage):
    source = Stub(SAMPLES)
    with cut_off(make_shards, "write_packed", 4, before=True):
        run(source, tmp_path / "out")
    shard = tmp_path / "out/shard-000001.tar"
    os.remove(shard) if damage == "gone" else os.truncate(shard, 512)
    with pytest.raises(
        ValueError, match=r"shard-000001.tar of the interrupted run is missing or has changed: start again"
    ):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    assert len(ShardDataset(tmp_path / "out")) == 40


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    run(Stub(SAMPLES), tmp_path / "out", split_val=0.2)
    before = tree(tmp_path / "out")
    made, shown = run(Stub(SAMPLES), tmp_path / "out", split_val=0.2)
    assert (made, shown) == ([], [40])
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_command_gets_an_error_that_names_the_difference(tmp_path, finished):
    with contextlib.nullcontext() if finished else cut_off(make_shards, "write_packed", 2, before=False):
        run(Stub(SAMPLES), tmp_path / "out", seed=1)
    before = tree(tmp_path / "out")
    what = r"already has shards \(.*\)" if finished else "has an unfinished run"
    with pytest.raises(ValueError, match=rf"OUT_DIR \(=.*\) {what} of another command \(seed was 1, is 2\): name an"):
        run(Stub(SAMPLES), tmp_path / "out", seed=2)
    with pytest.raises(ValueError, match=r"already has shards in .*out: name another folder, or --overwrite"):
        run(Stub(SAMPLES), tmp_path / "out", seed=1, split_val=0.2)
    assert tree(tmp_path / "out") == before


def test_overwrite_removes_what_a_writer_wrote_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    run(Stub(SAMPLES), out, split_val=0.2)
    for name in ("notes.txt", "train/notes.txt", "other/shard-000000.tar"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    run(Stub(SAMPLES), out, overwrite=True)
    run(Stub(SAMPLES), tmp_path / "whole")
    mine = {"notes.txt", "train/notes.txt", "other/shard-000000.tar"}
    assert set(tree(out)) - set(tree(tmp_path / "whole")) == mine


def test_shards_of_unknown_origin_are_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000000.tar").write_text("theirs")
    with pytest.raises(ValueError, match=r"already has shards \(.*shard-000000.tar\) of unknown origin: name another"):
        run(Stub(SAMPLES), tmp_path / "out")


def test_two_at_once(tmp_path):
    with lock_output(str(tmp_path)):
        pid = os.fork()
        if pid == 0:
            try:
                with lock_output(str(tmp_path)):
                    os._exit(0)
            except ValueError as error:
                os._exit(7 if "is being written by another make_shards: wait, or stop it" in str(error) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_cleared_and_left(tmp_path):
    """Killed while it deletes old shards: the rest is no data set, and any command may replace it."""
    run(Stub(SAMPLES), tmp_path / "out", seed=1)
    with cut_off(write_log.os, "remove", 3, before=True):
        run(Stub(SAMPLES), tmp_path / "out", seed=2, overwrite=True)
    with pytest.raises(ValueError, match="are unfinished"):
        ShardDataset(tmp_path / "out")
    run(Stub(SAMPLES), tmp_path / "out", seed=3)
    run(Stub(SAMPLES), tmp_path / "whole", seed=3)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_orders_of_a_source_with_splits():
    source = Stub(SAMPLES, {"train": np.arange(30), "test": np.arange(30, 40)})
    plan = orders(source, seed=4, shuffle=True, split_val=0.2)
    assert {k: len(v) for k, v in plan.items()} == {"train": 24, "val": 6, "test": 10}
    assert sorted(np.concatenate([plan["train"], plan["val"]]).tolist()) == list(range(30))
    assert sorted(plan["test"].tolist()) == list(range(30, 40))
    assert plan["test"].tolist() != list(range(30, 40))
    again = orders(source, seed=4, shuffle=False, split_val=0.2)
    assert all(again[k].tolist() == sorted(plan[k].tolist()) for k in plan)
    whole_order = orders(Stub(SAMPLES), seed=4, shuffle=True, split_val=0.2)
    assert orders(Stub(SAMPLES), seed=5, shuffle=True, split_val=0.2)["val"].tolist() != whole_order["val"].tolist()


@pytest.mark.parametrize(
    ("splits", "share", "message"),
    [
        (None, 0.01, r"--split-val \(=0.01\) must leave samples on both sides, but there are 40"),
        (None, 0.99, r"--split-val \(=0.99\) must leave samples on both sides, but there are 40"),
        (("train", "val"), 0.5, r"--split-val \(=0.5\) cannot be used: the source has a validation split"),
        (("train", "validation"), 0.5, "the source has a validation split"),
        (("one", "two"), 0.5, r"--split-val \(=0.5\) needs a split train, but the source has: one, two"),
    ],
)
def test_splits_that_cannot_be(splits, share, message):
    parts = None if splits is None else dict(zip(splits, np.arange(40).reshape(2, 20), strict=True))
    with pytest.raises(ValueError, match=message):
        orders(Stub(SAMPLES, parts), seed=0, shuffle=True, split_val=share)


def test_the_order_of_a_folder_is_that_of_earlier_releases():
    """The first ten of a permutation, recorded when the order was chosen."""
    plan = orders(Stub(SAMPLES), seed=0, shuffle=True, split_val=0.0)
    assert plan[""][:10].tolist() == [20, 27, 19, 5, 6, 22, 21, 10, 26, 14]


def test_what_is_read_is_not_written_over(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "a/x.jpg").write_bytes(encoded(picture(0)))
    run(Stub(SAMPLES), tmp_path / "old")
    check_apart(str(tmp_path / "a"), str(tmp_path / "b"))
    check_apart(f"wds:{tmp_path}/old", str(tmp_path / "new"))
    check_apart("synthetic:scenes", str(tmp_path / "old"))
    for source, out, message in (
        ("a", "file", "must be a folder, but is a file"),
        ("a", "a", "must be outside the source"),
        ("a", "a/b", "must be outside the source"),
        ("wds:old", "old", "must not be a shard in OUT_DIR, which would be replaced"),
        ("wds:old/shard-{000000..000001}.tar", "old", "must not be a shard in OUT_DIR"),
        ("old/shard-000000.tar", "old", "must not be a shard in OUT_DIR"),
    ):
        name = source.replace("wds:", f"wds:{tmp_path}/") if "wds:" in source else f"{tmp_path}/{source}"
        with pytest.raises(ValueError, match=message):
            check_apart(name, str(tmp_path / out))
