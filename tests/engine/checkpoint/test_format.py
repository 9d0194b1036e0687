import dataclasses
import pickle
import re
import zipfile
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import nn

from jepa_kit.config.check import SECTIONS
from jepa_kit.data.shards.index import identity
from jepa_kit.encoders import ViT
from jepa_kit.engine.checkpoint.files import FORMAT
from jepa_kit.engine.checkpoint.format import (
    Checkpoint,
    check_state,
    checkpoints,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from jepa_kit.engine.checkpoint.manager import Store
from jepa_kit.engine.checkpoint.resume import FREE, check_folders, check_resumable, plan_resume
from jepa_kit.engine.checkpoint.state_dict import optimizer_state
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.errors import CheckpointError
from jepa_kit.predictors import ViTPredictor

SHARDS = [{"file": f"shard-{k}.tar", "samples": 50, "bytes": 10240, "sha256": f"{k:064x}"} for k in range(2)]
DATA = identity(SHARDS)
CONFIG = {"encoder": {"name": "vit", "depth": 2}, "train": {"seed": 0, "device": "cpu"}, "data": {"mean": [0.5, 0.4]}}


def make_model(width=3):
    torch.manual_seed(width)
    return nn.ModuleDict({"encoder": nn.Linear(2, width), "predictor": nn.Linear(width, 2)})


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        set_hyper(optimizer, Hyper(lr=0.1, weight_decay=0.1, momentum=1.0))
        model["predictor"](model["encoder"](torch.randn(4, 2))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def take(model, optimizer, step=3):
    return Checkpoint(
        step=step,
        model=model.state_dict(),
        optimizer=optimizer_state(optimizer),
        config=CONFIG,
        versions={"torch": "2"},
        data=DATA,
    )


@pytest.fixture
def trained():
    model = make_model()
    optimizer = build_optimizer(model)
    train(model, optimizer, 3)
    return model, optimizer


def test_goes_on_bit_for_bit(tmp_path, trained):
    model, optimizer = trained
    path = save_checkpoint(tmp_path, take(model, optimizer))
    assert path.name == "checkpoint_00000003.pt"
    train(model, optimizer, 2, first=3)

    other = make_model()
    other_optimizer = build_optimizer(other)
    loaded = load_checkpoint(path)
    restore(loaded, other, other_optimizer)
    path.unlink()  # nothing may hang on the file any more
    assert loaded.step == 3
    train(other, other_optimizer, 2, first=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_holds_config_versions_and_data(tmp_path, trained):
    save_checkpoint(tmp_path, take(*trained))
    loaded = load_checkpoint(tmp_path)  # the folder: its latest
    assert (loaded.config, loaded.versions, loaded.data) == (CONFIG, {"torch": "2"}, DATA)


def test_part(trained):
    model, optimizer = trained
    assert sorted(take(model, optimizer).part("encoder")) == ["bias", "weight"]
    message = "the checkpoint of step 3 has no 'target_encoder'; it has: encoder, predictor"
    with pytest.raises(CheckpointError, match=message):
        take(model, optimizer).part("target_encoder")


def test_keeps_the_latest(tmp_path, trained):
    for step in (1, 9, 10, 11):
        save_checkpoint(tmp_path, take(*trained, step=step))
        Store(tmp_path).prune(keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint_00000010.pt", "checkpoint_00000011.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in checkpoints(tmp_path)]


def test_keeps_every_so_many(tmp_path, trained):
    for step in (2, 3, 4, 5, 6, 8):
        save_checkpoint(tmp_path, take(*trained, step=step))
        Store(tmp_path).prune(keep=1, keep_every=4)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint_00000004.pt", "checkpoint_00000008.pt"]


def test_holds_the_position(tmp_path, trained):
    position = {"epoch": 1, "step_in_epoch": 2, "samples": 12}
    save_checkpoint(tmp_path, dataclasses.replace(take(*trained), position=position))
    assert load_checkpoint(tmp_path).position == position


@pytest.mark.parametrize("record", ["data/3", "data.pkl"])
def test_an_altered_byte(tmp_path, trained, record):
    path = save_checkpoint(tmp_path, take(*trained))
    with zipfile.ZipFile(path) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith(record))
    content = bytearray(path.read_bytes())
    content[member.header_offset + 30 + len(member.filename) + 80] ^= 1  # in its padding or its content
    start = content.index(b"PK\x03\x04", member.header_offset)
    name, extra = (int.from_bytes(content[start + k : start + k + 2], "little") for k in (26, 28))
    content[start + 30 + name + extra] ^= 1
    path.write_bytes(content)
    message = rf"checkpoint_00000003.pt \(\d+ bytes\) is damaged: the checksum of its record \S+{record} differs"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_hostile_file_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    path = tmp_path / "checkpoint_00000003.pt"
    torch.save({"format": FORMAT, "model": Hostile()}, path)
    with pytest.raises(CheckpointError, match="which could run code and are not read"):
        load_checkpoint(path)
    assert not (tmp_path / "it ran").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, trained, monkeypatch):
    before = save_checkpoint(tmp_path, take(*trained)).read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, take(*trained))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_missing(tmp_path, trained):
    save_checkpoint(tmp_path, take(*trained))
    message = r"there is no checkpoint .*checkpoint_7.pt; its folder has: checkpoint_00000003.pt"
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(tmp_path / "checkpoint_7.pt")
    with pytest.raises(FileNotFoundError, match="its folder has: none"):
        load_checkpoint(tmp_path / "none" / "x.pt")


def test_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} has no checkpoint (checkpoint_<step>.pt)")):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_cut_short(tmp_path, trained, share):
    path = save_checkpoint(tmp_path, take(*trained))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"checkpoint_00000003.pt \(\d+ bytes\) is cut short: its end is missing"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})], ids=["empty", "text", "pickle"])
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "checkpoint_1.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\(\d+ bytes\) is not a checkpoint: it does not start like one"):
        load_checkpoint(path)


def test_another_archive(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(CheckpointError, match=r"images.zip \(\d+ bytes\) is damaged, or not a checkpoint: "):
        load_checkpoint(path)


def test_objects_are_not_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"model": re.compile("x")}, path)
    message = "is not a checkpoint of jepa_kit: it contains more than tensors and plain values, which could run code"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"encoder": {}, "epoch": 3},
            r"its format is None, not 'jepa_kit/1' \(it contains: encoder, epoch\); jepa-convert",
        ),
        ({"format": "jepa_kit/9"}, r"its format is 'jepa_kit/9', not 'jepa_kit/1' \(it contains: format\)"),
        ([1, 2], r"its format is None, not 'jepa_kit/1' \(it contains: list\)"),
    ],
)
def test_checkpoints_of_other_code(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": None, "step": None}, "it has no 'step', no 'optimizer'"),
        ({"step": "twelve"}, r"it has 'step' \('twelve'\)"),
        ({"step": -3}, r"it has 'step' \(-3\)"),
        ({"model": [1, 2]}, r"it has 'model' \(\[1, 2\]\)"),
        ({"model": {"encoder.weight": "x"}}, r"it has 'model' \({'encoder.weight': 'x'}\)"),
        ({"optimizer": {"encoder.weight": {"step": 3}}}, r"it has 'optimizer' \({'encoder.weight': "),
        ({"config": [1]}, r"it has 'config' \(\[1\]\)"),
    ],
)
def test_fields_of_another_kind(tmp_path, trained, changes, message):
    path = save_checkpoint(tmp_path, take(*trained))
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=rf"checkpoint_00000003.pt is not a checkpoint of jepa_kit: {message}"):
        load_checkpoint(path)


def test_misfits_are_listed_and_nothing_is_changed(trained):
    other = make_model(width=4)
    other["extra"] = nn.Linear(1, 1, bias=False)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    kept = take(*trained)
    kept = dataclasses.replace(kept, model={**kept.model, "old.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        restore(kept, other, build_optimizer(other))
    assert str(caught.value) == (
        "the model does not fit the checkpoint; missing: extra.weight; unexpected: old.weight; "
        "misshapen: encoder.weight ((3, 2), not (4, 2)), encoder.bias ((3,), not (4,)), "
        "predictor.weight ((2, 3), not (2, 4))"
    )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_long_lists_are_cut():
    expected = {f"w{number}": torch.zeros(1) for number in range(12)}
    with pytest.raises(CheckpointError, match=r"missing: w0, w1, .*, w9 and 2 more$"):
        check_state(expected, {}, "the model")


def test_optimiser_of_other_parameters(trained):
    model, optimizer = trained
    kept = take(model, optimizer)
    del kept.optimizer["encoder.bias"]
    with pytest.raises(CheckpointError, match=r"the optimiser does not fit the checkpoint; missing: encoder.bias"):
        restore(kept, make_model(), build_optimizer(model))


def test_a_parameter_without_a_gradient(tmp_path):
    model = make_model()
    model["encoder"].unused = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(model)
    train(model, optimizer, 1)
    save_checkpoint(tmp_path, take(model, optimizer))
    again = build_optimizer(model)
    restore(load_checkpoint(tmp_path), model, again)
    assert optimizer_state(again)["encoder.unused"] == {}


def test_resume_policy(tmp_path, trained):
    assert plan_resume(Store(tmp_path), resume=False) is None
    assert plan_resume(Store(tmp_path), resume=True) is None
    path = save_checkpoint(tmp_path, take(*trained))
    assert str(plan_resume(Store(tmp_path), resume=True)) == str(path)
    message = r"already contains a run \(checkpoint_00000003.pt\): give --resume to resume it, or another --output-dir"
    with pytest.raises(ValueError, match=message):
        plan_resume(Store(tmp_path), resume=False)


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"train.output_dir \(='.*run'\) must be a folder, but it is a file"):
        check_folders(Store(tmp_path / "run"))


def test_a_run_without_a_checkpoint_is_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert plan_resume(Store(tmp_path), resume=True) is None
    with pytest.raises(ValueError, match=r"already contains a run \(metrics.jsonl\)"):
        plan_resume(Store(tmp_path), resume=False)


def test_differences_of_config_are_listed(trained):
    now = {
        "encoder": {"name": "vit", "depth": 3},
        "train": {"seed": 0, "device": "cuda"},
        "data": {"mean": (0.5, 0.3), "flip": 0.5},
        "versions": {"torch": "9"},
    }
    with pytest.raises(CheckpointError) as caught:
        check_resumable(take(*trained), now, data=DATA)
    assert str(caught.value) == (
        "the run of the checkpoint (step 3) has another config, so it cannot be resumed:\n"
        "  data.flip: '(not set)' in the checkpoint, 0.5 now\n"
        "  data.mean[1]: 0.4 in the checkpoint, 0.3 now\n"
        "  encoder.depth: 2 in the checkpoint, 3 now\n"
        "Give the values of the checkpoint; or, for a longer run or any other one, start a new run from its weights: "
        "train.init_from=CHECKPOINT and another --output-dir"
    )


def test_options_that_are_newer_than_a_checkpoint_have_their_defaults(trained, tiny):
    """A run of an earlier version resumes, and only a value other than the default is a difference."""
    now = tiny().to_dict()
    older = {key: dict(value) if isinstance(value, dict) else value for key, value in now.items() if key != "recipe"}
    del older["encoder"]["class_token"], older["optim"]["clip_grad"]
    checkpoint = dataclasses.replace(take(*trained), config=older)
    check_resumable(checkpoint, now, data=DATA)
    now["encoder"] = {**now["encoder"], "class_token": True}
    with pytest.raises(CheckpointError, match=r"encoder.class_token: False in the checkpoint, True now\n"):
        check_resumable(checkpoint, now, data=DATA)


def test_what_moves_no_number_may_differ(trained):
    now = {section: dict(options) for section, options in CONFIG.items()}
    for key in FREE:
        section, name = key.split(".")
        now.setdefault(section, {})[name] = "other"
    check_resumable(take(*trained), now, data=DATA)
    now["data"]["shards"] = ["another", "and one more"]
    check_resumable(take(*trained), now, data=DATA)


def test_other_data(trained):
    """Names, counts and sizes agree: the contents of one shard do not."""
    message = (
        r"the run of the checkpoint \(step 3\) had another data set than data.shards names, so it cannot be resumed: "
        rf"shard 1 differs: shard-1.tar had SHA-256 {1:064x}, but here shard-1.tar has {9:064x}$"
    )
    with pytest.raises(CheckpointError, match=message):
        check_resumable(take(*trained), CONFIG, identity([SHARDS[0], SHARDS[1] | {"sha256": f"{9:064x}"}]))


MAY_DIFFER = {
    "checkpoint": "dir every format keep keep_every",
    "data": "backoff cache cache_gb max_skipped num_workers prefetch retries shards timeout",
    "train": "accumulate activation_checkpointing attention deterministic device init_from log_every nonfinite_limit "
    "on_nonfinite output_dir parallel tensorboard wandb",
    "optim": "",
}


@pytest.mark.parametrize("section", MAY_DIFFER)
def test_every_other_option_of_a_section_must_agree(trained, section):
    """Written here again, option by option: what changes numbers (optim.lr, data.decoder) is never free."""
    options = {entry.name: f"{entry.name} then" for entry in dataclasses.fields(SECTIONS[section])}
    checkpoint = dataclasses.replace(take(*trained), config={section: options})
    check_resumable(checkpoint, {section: options}, data=DATA)
    free = set()
    for name in options:
        try:
            check_resumable(checkpoint, {section: options | {name: "another"}}, data=DATA)
            free.add(name)
        except CheckpointError as error:  # noqa: PERF203 (each option alone)
            assert f"{section}.{name}: '{name} then' in the checkpoint, 'another' now" in str(error)  # noqa: PT017
    assert free == set(MAY_DIFFER[section].split()) & options.keys()


def test_what_may_differ_are_options():
    for key in FREE:
        section, name = key.split(".")
        if section in SECTIONS:
            assert name in SECTIONS[section].__dataclass_fields__
        else:
            assert name in signature({"encoder": ViT, "predictor": ViTPredictor}[section]).parameters
