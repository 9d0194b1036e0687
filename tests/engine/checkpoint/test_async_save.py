"""Checkpoints written while the steps continue: their content, errors, and full disks."""

import errno
import os
import re
import subprocess
import threading
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import saving_cases
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kit.engine.checkpoint import async_save
from jepa_kit.engine.checkpoint.async_save import Saver
from jepa_kit.engine.checkpoint.format import Checkpoint, checkpoints, load_checkpoint
from jepa_kit.engine.checkpoint.manager import Store
from jepa_kit.engine.logging.telemetry import Journal, read_metrics
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.errors import CheckpointError, SaveError
from jepa_kit.files import delete
from jepa_kit.interop import load_encoder
from jepa_kit.interop.files import recognise
from jepa_kit.training import train


class Model(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.encoder = torch.nn.Linear(width, width)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def header(step):
    return Checkpoint(step=step, model={}, optimizer={}, config={}, versions={}, data={})


def save(saver, model, step):
    saver.save(model, build_optimizer(model), header(step))


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system with the given options, such as a size."""
    mounted = []

    def make(name, options):
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_what_is_written_is_the_state_at_the_call(tmp_path, model, monkeypatch):
    go = threading.Event()
    plain = async_save.save_checkpoint

    def slow(*args):
        go.wait(30)
        return plain(*args)

    monkeypatch.setattr(async_save, "save_checkpoint", slow)
    before = model.encoder.weight.detach().clone()
    with Saver(Store(tmp_path), keep=2) as saver:
        save(saver, model, 1)
        with torch.no_grad():
            model.encoder.weight.zero_()  # the next step, while the file is being written
        assert checkpoints(tmp_path) == []
        go.set()
    assert torch.equal(load_checkpoint(tmp_path).model["encoder.weight"], before)


def test_the_host_waits_once_for_all_copies(monkeypatch):
    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    saver = Saver(Store(Path("nowhere")), keep=1)
    with FakeTensorMode():
        for device, wanted in (("cpu", 0), ("cuda", 1)):
            model = {f"weight{k}": torch.empty(3, device=device) for k in range(4)}
            moments = {name: {"exp_avg": torch.empty(3, device=device)} for name in model}
            held, held_moments = saver._copy_to_host(model, moments)
            assert len(waits) == wanted
            assert {v.device.type for v in (*held.values(), held_moments["weight0"]["exp_avg"])} == {"cpu"}


def test_one_at_a_time(tmp_path, model, monkeypatch):
    running, most = [], []
    plain = async_save.save_checkpoint

    def counted(*args):
        running.append(1)
        most.append(len(running))
        plain(*args)
        running.pop()

    monkeypatch.setattr(async_save, "save_checkpoint", counted)
    with Saver(Store(tmp_path), keep=5) as saver:
        for step in range(1, 6):
            save(saver, model, step)
    assert most == [1] * 5
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint_0000000{step}.pt" for step in range(1, 6)]


def test_an_error_is_raised_by_the_next_call_or_at_the_end(tmp_path, model, monkeypatch):
    with Saver(Store(tmp_path), keep=5) as saver:
        save(saver, model, 1)
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    message = (
        r"the checkpoint of step 2 could not be written to .*: No space left; the last good one is checkpoint_00000001"
    )
    with pytest.raises(SaveError, match=message), Saver(Store(tmp_path), keep=5) as saver:
        save(saver, model, 2)
    saver = Saver(Store(tmp_path), keep=5)
    save(saver, model, 2)
    wait([saver.pending])
    assert saver.failed
    with pytest.raises(SaveError, match=message):
        save(saver, model, 3)
    assert not saver.failed


def test_an_error_beside_another_one_is_printed(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))

    def interrupted():
        with Saver(Store(tmp_path), keep=5) as saver:
            save(saver, model, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "No space left; there is no earlier one" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_and_loses_nothing(tiny, small_disk):
    folder = small_disk("small", "size=4m") / "run"
    config = tiny(f"train.output_dir={folder}", "checkpoint.every=1", "train.tensorboard=false")
    ballast = []

    def fill(*args):  # once a checkpoint is there, something else fills the disk
        if len(checkpoints(folder)) == 2 and not ballast:
            ballast.append(folder.parent / "ballast")
            free = os.statvfs(folder)
            ballast[0].write_bytes(b"x" * (free.f_bavail * free.f_frsize - 50_000))
        return plain(*args)

    plain = async_save.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_save, "save_checkpoint", fill)
        message = r"the checkpoint of step 3 could not be written to .*: No space left on device; the last good one is "
        with pytest.raises(SaveError, match=message + "checkpoint_00000002.pt"):
            train(config)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint_00000001.pt", "checkpoint_00000002.pt"]
    assert not list(folder.glob(".checkpoint_*"))
    assert load_checkpoint(folder).step == 2
    ballast[0].unlink()
    train(config, resume=True)
    assert [line["step"] for line in read_metrics(folder)] == list(range(6))


def test_a_full_disk_that_takes_no_line(tiny, monkeypatch):
    def full(journal, record):
        if record["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(journal, record)

    plain = Journal.write
    monkeypatch.setattr(Journal, "write", full)
    message = r"run cannot be written to: No space left on device; the last good checkpoint is checkpoint_00000003.pt"
    with pytest.raises(SaveError, match=message):
        train(tiny())


def test_a_folder_that_cannot_be_written_to(tiny, small_disk):
    folder = small_disk("still", "ro") / "run"
    message = rf"train.output_dir \(='{re.escape(str(folder))}'\) cannot be written to: Read-only file system"
    with pytest.raises(ValueError, match=message):
        train(tiny(f"train.output_dir={folder}"))


def test_a_disk_that_becomes_read_only(tiny, monkeypatch):
    def refused(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(async_save, "save_checkpoint", refused)
    with pytest.raises(
        SaveError, match=r"step 3 could not be written to .*: Read-only file system; there is no earlier"
    ):
        train(tiny())


def test_what_a_killed_run_left_is_cleared(tiny):
    folder = Path(tiny().train.output_dir)
    (folder / ".checkpoint_00000002.part").mkdir(parents=True)
    (folder / ".checkpoint_00000002.part" / "__0_0.distcp").write_text("half")
    (folder / ".checkpoint_00000003.pt.part").write_text("half")
    train(tiny("train.epochs=1", "optim.warmup_epochs=0"))
    assert not list(folder.glob(".*"))


def test_a_damaged_checkpoint_is_not_gone_on_from(tiny, capsys):
    config = tiny("checkpoint.every=2", "checkpoint.keep=9")
    folder = train(config)
    whole = {line["step"]: line["loss"] for line in read_metrics(folder)}
    latest, good = checkpoints(folder)[-1], checkpoints(folder)[-2]
    latest.write_bytes(latest.read_bytes()[:-200])
    message = (
        r"checkpoint_00000006.pt \(\d+ bytes\) is cut short: its end is missing; the last good one is "
        rf"checkpoint_00000004.pt; `--resume {re.escape(str(good))}` resumes from it"
    )
    with pytest.raises(CheckpointError, match=message):
        train(config, resume=True)
    assert latest.exists()
    train(config, resume=True, resume_from=str(good))
    printed = capsys.readouterr().out
    assert "resumed at step 4\nset aside: checkpoint_00000006.pt\n" in printed
    assert (folder / "checkpoint_00000006.pt.set_aside").exists()
    assert {line["step"]: line["loss"] for line in read_metrics(folder)} == whole
    assert load_checkpoint(folder).step == 6
    for path in checkpoints(folder):
        path.write_bytes(b"PK")
    with pytest.raises(
        CheckpointError, match=r"no earlier checkpoint of the run is good; give another --output-dir to start a new run"
    ):
        train(config, resume=True)


def test_a_foreign_file_is_named(tiny):
    folder = train(tiny("train.epochs=1", "optim.warmup_epochs=0"))
    torch.save({"state_dict": {}}, folder / "checkpoint_00000009.pt")
    message = (
        r"checkpoint_00000009.pt is not a checkpoint of jepa_kit: its format is None, .*; the last good one is checkp"
    )
    with pytest.raises(CheckpointError, match=message):
        train(tiny("train.epochs=1", "optim.warmup_epochs=0"), resume=True)


def test_a_named_checkpoint_that_is_not_there(tiny):
    folder = train(tiny())
    named = folder / "checkpoint_00000005.pt"
    message = r"there is no checkpoint .*checkpoint_00000005.pt; its folder has: checkpoint_00000003.pt, checkpoint_000"
    with pytest.raises(FileNotFoundError, match=message):
        train(tiny(), resume=True, resume_from=str(named))


def test_keep_every_reaches_the_run(tiny):
    folder = train(tiny("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=2"))
    assert [load_checkpoint(path).step for path in checkpoints(folder)] == [2, 4, 6]
    assert load_checkpoint(folder).position == {"epoch": 1, "step_in_epoch": 1, "samples": 24}


# --- shards ---


def state(folder):
    held = load_checkpoint(folder)
    return held.model | {f"{n} {k}": v for n, moments in held.optimizer.items() for k, v in moments.items()}


@pytest.fixture
def in_shards(tiny):
    return lambda *overrides: tiny("checkpoint.format=sharded", "checkpoint.every=2", *overrides)


def test_shards_hold_what_a_file_holds(tiny, in_shards, tmp_path):
    one = train(tiny(f"train.output_dir={tmp_path / 'file'}"))
    folder = train(in_shards())
    assert [path.name for path in checkpoints(folder)] == ["checkpoint_00000004", "checkpoint_00000006"]
    expected, found = state(one), state(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    last = checkpoints(folder)[-1]
    delete(last)
    train(in_shards(), resume=True)  # from step 4
    found = state(folder)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    train(tiny("checkpoint.format=file", "checkpoint.every=6"), resume=True)  # the other form may go on


def test_damaged_shards(in_shards):
    folder = train(in_shards())
    latest = checkpoints(folder)[-1]
    shard = next(latest.glob("*.distcp"))
    content = bytearray(shard.read_bytes())

    def fails(message):
        with pytest.raises(CheckpointError, match=message + r".*; the last good one is checkpoint_00000004; `--resume"):
            train(in_shards(), resume=True)

    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    fails(rf"checkpoint_00000006/{shard.name} \(\d+ bytes\) is damaged: its checksum differs")
    shard.write_bytes(content[:-1])
    fails(rf"checkpoint_00000006/{shard.name} \(\d+ bytes\) is cut short: it had \d+ bytes")
    shard.unlink()
    fails(rf"checkpoint_00000006 is damaged: {shard.name} is missing")
    (latest / "run.pt").unlink()
    fails(r"checkpoint_00000006 is not a checkpoint: it has no run.pt")


def test_shards_that_cannot_be_written(in_shards, small_disk):
    folder = small_disk("small", "size=200k") / "run"
    with pytest.raises(SaveError, match=r"the checkpoint of step \d could not be written to .*No space left on device"):
        train(in_shards(f"train.output_dir={folder}", "train.tensorboard=false", "checkpoint.keep=99"))
    assert not list(folder.glob(".checkpoint_*"))


@pytest.mark.integration
def test_fsdp_writes_shards_that_one_process_goes_on_from(tiny, ranks, tmp_path, repository):
    still = ("encoder.drop_path=0.0", "checkpoint.every=3", "checkpoint.keep=9")
    one = train(tiny(*still))
    two = tmp_path / "two"
    tool = repository / "tools" / "train_net.py"
    ranks(2, tool, "--config-file", one / "config.yaml", "--output-dir", two, "train.parallel=fsdp")
    assert [path.name for path in checkpoints(two)] == ["checkpoint_00000003", "checkpoint_00000006"]
    expected, found = load_checkpoint(one).model, load_checkpoint(two).model
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
    delete(checkpoints(two)[-1])
    train(tiny(*still, f"train.output_dir={two}"), resume=True)  # by one process, from the shards of two
    found = load_checkpoint(two).model
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.integration
def test_two_processes_write_shards_beside_their_steps(ranks, tmp_path):
    ranks(1, saving_cases.__file__, tmp_path, "beside", "again", "fails", "file_fails", "elsewhere")


@pytest.mark.integration
@pytest.mark.parametrize("case", ["killed", "one_killed"])
def test_two_processes_killed_while_shards_are_written(ranks, tmp_path, case):
    with pytest.raises(AssertionError):
        ranks(1, saving_cases.__file__, tmp_path, case)
    folder = tmp_path / case
    assert [path.name for path in checkpoints(folder)] == ["checkpoint_00000001"]
    if case == "killed":  # a rank that survives cleans up
        assert len(list((folder / ".checkpoint_00000002.part").glob("*.distcp"))) == 2
    Store(folder).begin("")
    assert [path.name for path in folder.iterdir()] == ["checkpoint_00000001"]
    assert load_checkpoint(folder).step == 1


def test_shards_are_weights_for_everybody(in_shards):
    folder = train(in_shards())
    (last,) = checkpoints(folder)[-1:]
    assert recognise(last) == recognise(folder) == "jepa_kit"
    held = load_checkpoint(last)
    assert (held.step, held.config["checkpoint"]["format"]) == (6, "sharded")
    encoder = load_encoder(folder, encoder="target")
    assert encoder.embed(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
