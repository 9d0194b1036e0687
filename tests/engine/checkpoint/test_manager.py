"""Checkpoints outside the run folder: uploads, retention, resume, and every way they can fail."""

import dataclasses
import shutil
import threading
from pathlib import Path

import pytest
import torch
from places import Bucket, Disk

from jepa_kit.config import load_config
from jepa_kit.data.remote.fetch import path_manager
from jepa_kit.engine.checkpoint import locate
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.checkpoint.locate import to_read
from jepa_kit.engine.checkpoint.manager import Store
from jepa_kit.engine.checkpoint.resume import plan_resume
from jepa_kit.engine.job import Job
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.submit import prepare
from jepa_kit.errors import CheckpointError, ConfigError, SaveError
from jepa_kit.evaluation.features import load_run
from jepa_kit.interop import load_encoder
from jepa_kit.interop.start import init_from
from jepa_kit.training import train


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Register a handler of a class, with a local folder behind it."""
    monkeypatch.setattr(path_manager, "_path_handlers", dict(path_manager._path_handlers))

    def make(kind):
        handler = kind(tmp_path / "elsewhere")
        path_manager.register_handler(handler)
        return handler

    return make


@pytest.fixture
def handler(request, elsewhere):
    return elsewhere(getattr(request, "param", Bucket))


BOTH = pytest.mark.parametrize("handler", [Bucket, Disk], indirect=True)


@pytest.fixture
def away(tiny, handler):
    """Return the config of a run whose checkpoints are uploaded to ``.../a``."""
    return lambda *overrides: tiny(
        f"checkpoint.dir={handler.PREFIX}a", "checkpoint.every=2", "train.tensorboard=false", *overrides
    )


def there(handler):
    """Return the names in the remote folder, without empty folders."""
    folder = handler.folder / "a"
    return sorted(p.name for p in folder.iterdir() if p.is_file() or any(p.iterdir()))


def same(first, second):
    one, two = load_checkpoint(first), load_checkpoint(second)
    assert one.step == two.step
    assert one.model.keys() == two.model.keys()
    assert all(torch.equal(value, two.model[name]) for name, value in one.model.items())
    assert all(
        torch.equal(value, two.optimizer[n][k]) for n, state in one.optimizer.items() for k, value in state.items()
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(tiny, kept):
    """Return the folder of an uninterrupted run with local checkpoints."""
    return kept if checkpoints(kept) else train(tiny(f"train.output_dir={kept}"))


FORMS = pytest.mark.parametrize(("handler", "form"), [(Bucket, "sharded"), (Disk, "file")], indirect=["handler"])


@FORMS
def test_a_run_whose_checkpoints_are_elsewhere(whole, away, handler, capsys, form):
    end = ".pt" if form == "file" else ""
    run = train(away(f"checkpoint.format={form}"))
    assert f"checkpoints: {handler.PREFIX}a\n" in capsys.readouterr().out
    assert there(handler) == [f"checkpoint_00000004{end}", f"checkpoint_00000006{end}", "config.yaml"]
    assert not [p.name for p in run.iterdir() if "checkpoint" in p.name or p.name.startswith(".")]
    last = handler.folder / "a" / f"checkpoint_00000006{end}"
    same(whole, last)
    shutil.rmtree(last) if form == "sharded" else last.unlink()  # as if it had been stopped after step 4
    train(away(f"checkpoint.format={form}"), resume=True)
    assert "resumed at step 4\n" in capsys.readouterr().out
    same(whole, last)
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (whole, run)]
    assert losses[0] == losses[1]
    assert not (run / ".fetched").exists()


def test_those_of_every_so_many_steps_stay(away, handler):
    keep = ("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=3")
    train(away("checkpoint.format=sharded", *keep))
    assert there(handler) == ["checkpoint_00000003", "checkpoint_00000006", "config.yaml"]


@FORMS
def test_a_copy_that_breaks_off_loses_nothing(whole, away, handler, tmp_path, capsys, form):
    end = ".pt" if form == "file" else ""
    config = away(f"checkpoint.format={form}")
    handler.refuse = lambda address: "checkpoint_00000004" in address and "metadata" not in address
    message = (
        rf"checkpoints could not be uploaded to {handler.PREFIX}a: {handler.PREFIX}a/\S+ could not be written: "
        rf"(the bucket is full|No space left on device); "
        rf"still in the run folder: .*run/checkpoint_00000004{end}; --resume continues"
    )
    with pytest.raises(SaveError, match=message):
        train(config)
    place = Store(tmp_path / "run", f"{handler.PREFIX}a")
    assert [location.name for location in place.checkpoints()] == [f"checkpoint_0000000{n}{end}" for n in (2, 4)]
    handler.refuse = lambda address: False
    capsys.readouterr()
    train(config, resume=True)
    assert "resumed at step 4\n" in capsys.readouterr().out
    assert there(handler) == [f"checkpoint_00000004{end}", f"checkpoint_00000006{end}", "config.yaml"]
    assert checkpoints(tmp_path / "run") == []
    same(whole, handler.folder / "a" / f"checkpoint_00000006{end}")


def test_what_the_last_copy_left_is_brought_by_a_resume_with_no_steps(away, handler, tmp_path):
    handler.refuse = lambda address: "checkpoint_00000006" in address
    with pytest.raises(SaveError, match=r"still in the run folder: .*run/checkpoint_00000006.pt"):
        train(away())
    handler.refuse = lambda address: False
    train(away(), resume=True)
    assert "checkpoint_00000006.pt" in there(handler)
    assert checkpoints(tmp_path / "run") == []


def test_what_a_kill_left_in_the_place(away, handler):
    folder = handler.folder / "a"
    folder.mkdir(parents=True)
    (folder / ".checkpoint_00000002.pt.part").write_text("half")
    (folder / "checkpoint_00000001").mkdir()
    (folder / "checkpoint_00000001" / "__0_0.distcp").write_text("some")  # and no run.pt
    train(away(), resume=True)
    assert there(handler) == ["checkpoint_00000004.pt", "checkpoint_00000006.pt", "config.yaml"]


def test_the_steps_go_on_while_it_is_copied(away, handler, tmp_path):
    copying, done = threading.Event(), threading.Event()

    def wait(address):
        if "checkpoint_00000002" in address:
            copying.set()
            assert done.wait(60)
        return False

    handler.refuse = wait
    run = threading.Thread(target=train, args=(away(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jepa_kit.distributed.signals.signal.signal", lambda *args: None)  # no main thread here
        run.start()
        assert copying.wait(60)
        for _ in range(600):
            if len(read_metrics(tmp_path / "run")) == 4:  # the next checkpoint waits for this one
                break
            threading.Event().wait(0.1)
        done.set()
        run.join()
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(6))


@pytest.mark.parametrize("handler", [Disk], indirect=True)
def test_damaged_ones_elsewhere(away, handler, tmp_path, capsys):
    config = away("checkpoint.keep=9")
    train(config)
    address = f"{handler.PREFIX}a/checkpoint_0000000"
    latest = handler.folder / "a" / "checkpoint_00000006.pt"
    latest.write_bytes(latest.read_bytes()[:-200])  # a copy that was cut short
    message = (
        rf"^{address}6.pt \(\d+ bytes\) is cut short: its end is missing; the last good one is checkpoint_00000004.pt; "
        rf"`--resume {address}4.pt` resumes from it"
    )
    with pytest.raises(CheckpointError, match=message):
        train(config, resume=True)
    capsys.readouterr()
    train(config, resume=True, resume_from=f"{address}4.pt")
    assert "resumed at step 4\nset aside: checkpoint_00000006.pt\n" in capsys.readouterr().out
    names = [f"checkpoint_0000000{n}.pt" for n in (2, 4, 6)]
    assert there(handler) == sorted([*names, "checkpoint_00000006.pt.set_aside", "config.yaml"])
    assert load_checkpoint(latest).step == 6
    with pytest.raises(FileNotFoundError, match=rf"there is no checkpoint {address}5.pt; its folder has: chec"):
        train(config, resume=True, resume_from=f"{address}5.pt")
    for name in names:
        torch.save({"state_dict": {}}, latest.with_name(name))
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of jepa_kit: .*; no earlier checkpoint of th"):
        train(config, resume=True)


def test_shards_elsewhere_are_set_aside(away, handler):
    config = away("checkpoint.format=sharded", "checkpoint.keep=9")
    train(config)
    train(config, resume=True, resume_from=f"{handler.PREFIX}a/checkpoint_00000004")
    assert "checkpoint_00000006.set_aside" in there(handler)
    assert (handler.folder / "a" / "checkpoint_00000006.set_aside" / "run.pt").exists()


def test_a_roll_back_takes_the_latest_from_there(away, handler, monkeypatch):
    from jepa_kit.engine import step as update

    plain, bad = update.train_step, []

    def step(jepa, optimizer, hyper, views, **options):
        if not bad and sum(optimizer.state[p]["step"] for p in list(optimizer.state)[:1]) == 4:
            bad.append(1)
            views = [dataclasses.replace(view, images=view.images * float("nan")) for view in views]
        return plain(jepa, optimizer, hyper, views, **options)

    monkeypatch.setattr(update, "train_step", step)
    run = train(away("train.on_nonfinite=rollback"))
    assert bad
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 5]


# --- mistakes, before the first step ---


def test_an_address_that_nothing_opens(tiny, tmp_path):
    config = tiny("checkpoint.dir=bukcet://a")
    with pytest.raises(ValueError, match=r"checkpoint.dir \(='bukcet://a'\) must be a folder, or begin with"):
        train(config)
    job = Job(time="10")
    with pytest.raises(ValueError, match=r"checkpoint.dir \(='bukcet://a'\) must be"):
        prepare(config, job, tool=tmp_path / "train_net.py")
    assert not (tmp_path / "run").exists()


def test_a_place_that_takes_nothing(away, handler, tmp_path):
    handler.refuse = lambda address: True
    with pytest.raises(ValueError, match=rf"checkpoint.dir \(='{handler.PREFIX}a'\) cannot be written to: \S+ could"):
        train(away())
    assert not read_metrics(tmp_path / "run")


def test_an_output_folder_is_no_address(tiny):
    with pytest.raises(ConfigError, match=r"output_dir \(='bucket://a'\) must be a local path, not a URL"):
        tiny("train.output_dir=bucket://a")


def test_a_place_that_holds_another_run(away, handler, tmp_path):
    train(away())
    message = (
        rf"{handler.PREFIX}a already contains a run \({{}}\): give --resume to resume it, or another --output-dir and "
        "checkpoint.dir"
    )
    with pytest.raises(ValueError, match=message.format("checkpoint_00000006.pt")):
        train(away(f"train.output_dir={tmp_path / 'other'}"))
    for path in (handler.folder / "a").glob("*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match=message.format("config.yaml")):
        train(away(f"train.output_dir={tmp_path / 'other'}"))


def test_a_run_whose_folder_is_lost_goes_on(away, handler, tmp_path, capsys):
    """Each start may be on another machine, with an empty disk."""
    train(away())
    (handler.folder / "a" / "checkpoint_00000006.pt").unlink()
    capsys.readouterr()
    run = train(away(f"train.output_dir={tmp_path / 'other'}"), resume=True)
    assert "resumed at step 4\n" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(run)] == [4, 5]


def test_a_place_that_is_not_where_the_run_left_off(away, tiny, handler, tmp_path):
    train(away())
    message = (
        rf"checkpoint.dir leads to .*run, which has no checkpoint, but the run in .*run has {handler.PREFIX}a/"
        "checkpoint_00000006.pt: bring its checkpoints there first, or leave the option as it was"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny(), resume=True)
    shutil.copytree(handler.folder / "a", tmp_path / "moved")
    assert plan_resume(Store(tmp_path / "run", str(tmp_path / "moved")), resume=True).name == "checkpoint_00000006.pt"


# --- another folder here ---


def test_another_folder(tiny, tmp_path, capsys):
    config = tiny(f"checkpoint.dir={tmp_path / 'kept'}", "checkpoint.every=2")
    run = train(config)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        "checkpoint_00000004.pt",
        "checkpoint_00000006.pt",
        "config.yaml",
    ]
    assert checkpoints(run) == []
    (tmp_path / "kept" / "checkpoint_00000006.pt").unlink()
    capsys.readouterr()
    train(config, resume=True)
    assert "resumed at step 4\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"kept already contains a run \(checkpoint_00000006.pt\)"):
        train(tiny(f"checkpoint.dir={tmp_path / 'kept'}", f"train.output_dir={tmp_path / 'other'}"))
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint.dir \(='.*a file'\) must be a folder, but it is a file"):
        train(tiny(f"checkpoint.dir={tmp_path / 'a file'}", f"train.output_dir={tmp_path / 'other'}"))


# --- whoever reads ---


@BOTH
def test_readers_of_a_place(away, handler):
    run = train(away())
    place = f"{handler.PREFIX}a"
    assert load_config(place) == load_config(f"{place}/checkpoint_00000004.pt") == away()
    assert load_run(f"{place}/checkpoint_00000004.pt").step == 4
    assert [load_run(named).step for named in (place, run)] == [6, 6]  # the run folder leads there
    assert load_encoder(place, encoder="target").embed(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
    for named in (place, str(run)):
        start = init_from(load_run(run).jepa, named)
        assert start.origin["source"] == "checkpoint_00000006.pt"
    with pytest.raises(FileNotFoundError, match=rf"there is no {place}/checkpoint_00000009.pt"):
        load_run(f"{place}/checkpoint_00000009.pt")
    with pytest.raises(ValueError, match=r"\(='bukcet://a'\) must be a folder, or begin with a prefix"):
        to_read("bukcet://a")
    with pytest.raises(ConfigError, match=rf"'{place}/none.yaml' does not exist"):
        load_config(f"{place}/none.yaml")


def test_readers_of_shards_in_a_place(away, handler):
    train(away("checkpoint.format=sharded"))
    place = f"{handler.PREFIX}a"
    assert load_config(f"{place}/checkpoint_00000006").checkpoint.format == "sharded"
    assert [load_run(f"{place}{end}").step for end in ("", "/checkpoint_00000004")] == [6, 4]


def test_a_handler_that_the_command_line_imports(away, handler, tmp_path, monkeypatch):
    train(away())
    monkeypatch.setattr(path_manager, "_path_handlers", {})
    (tmp_path / "my_handler.py").write_text(
        "from places import Bucket, Disk\n"
        "from jepa_kit.data.remote.fetch import path_manager\n"
        f"path_manager.register_handler({type(handler).__name__}({str(handler.folder)!r}))\n"
    )
    imports = f"imports=[{tmp_path / 'my_handler.py'}]"
    assert load_config(f"{handler.PREFIX}a", [imports]).train.epochs == 2
    with pytest.raises(ConfigError, match="cannot import"):
        load_config(f"{handler.PREFIX}a", ["imports=[nowhere_at_all]"])


def test_what_was_fetched_goes_with_the_process(away, handler):
    train(away())
    assert Path(locate._downloads().name) in to_read(f"{handler.PREFIX}a").parents
