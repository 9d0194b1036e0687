"""Opening a checkpoint runs no code: not of a pickle (test_files.py), nor of `imports` in its config."""

import pytest
import torch

from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.errors import ConfigError
from jepa_kit.evaluation.features import load_run
from jepa_kit.from_config import build_recipe
from jepa_kit.interop.formats import convert
from jepa_kit.interop.frozen import load_encoder
from jepa_kit.registry import MASKERS
from jepa_kit.tools import convert_checkpoint, eval_net, health, visualize

PARTS = """
import pathlib
pathlib.Path({trace!r}).touch()
from jepa_kit.maskers.random import Random
from jepa_kit.registry import MASKERS

@MASKERS.register("theirs")
class Theirs(Random):
    pass
"""


@pytest.fixture
def foreign(tiny, tmp_path):
    """A checkpoint of a run with a masker of its own, and the trace that importing it leaves."""
    trace = tmp_path / "trace"
    (tmp_path / "parts.py").write_text(PARTS.format(trace=str(trace)))
    config = tiny()
    state = build_recipe(config).state_dict()
    raw = config.to_dict() | {"imports": [str(tmp_path / "parts.py")], "masker": {"name": "theirs", "ratio": 0.5}}
    yield save_checkpoint(tmp_path, Checkpoint(3, state, {}, raw, {}, {})), trace
    MASKERS._obj_map.pop("theirs", None)


def test_an_encoder_is_loaded_and_converted_without_imports(foreign, tmp_path):
    file, trace = foreign
    assert load_encoder(file).provenance.step == 3
    for format in ("official", "hf", "timm", "safetensors", "jepa_kit"):
        convert(file, tmp_path / format, to=format)
        assert load_encoder(tmp_path / format, num_heads=2).architecture.depth == 2
    assert not trace.exists()


@pytest.mark.parametrize("slot", ["predictor", "target", "loss", "target_update", "encoder"])
def test_only_an_encoder_of_ones_own_stays_in_our_format(tiny, tmp_path, capsys, slot):
    config = tiny()
    raw = config.to_dict() | {"imports": [str(tmp_path / "nowhere.py")], slot: {"name": "mine", "sharpness": 3}}
    file = save_checkpoint(tmp_path, Checkpoint(3, build_recipe(config).state_dict(), {}, raw, {}, {}))
    for to in ("hf", "timm", "safetensors", "jepa_kit"):
        status = convert_checkpoint.main(["--to", to, str(file), str(tmp_path / to)])
        error = capsys.readouterr().err
        if slot == "encoder" and to != "jepa_kit":
            assert (status, (tmp_path / to).exists()) == (2, False)
            assert "encoder.name (='mine') must be 'vit', the only one that formats share; another stays in" in error
        else:
            assert (status, error) == (0, "")


def test_a_run_needs_trust(foreign, shards, capsys):
    file, trace = foreign
    common = ["--checkpoint", str(file)]
    calls = [
        (eval_net, [*common, "--protocol", "knn", "--train-shards", str(shards), "--test-shards", str(shards)]),
        (health, common),
        (visualize, common),
    ]
    for tool, arguments in calls:
        assert tool.main(arguments) == 2
        assert "parts.py' would run as code, and does not ship with jepa_kit. If you trust" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="would run as code"):
        load_run(file)
    assert not trace.exists()
    assert load_run(file, trust_imports=True).config.slots["masker"].name == "theirs"
    assert trace.exists()
    for tool, _ in calls:
        assert tool.parser().parse_intermixed_args([*common, "--trust-imports"]).trust_imports


def test_a_run_with_weights_that_are_not_finite(tiny, tmp_path):
    config = tiny()
    state = build_recipe(config).state_dict()
    state["encoder.norm.bias"][0] = torch.nan
    file = save_checkpoint(tmp_path, Checkpoint(3, state, {}, config.to_dict(), {}, {}))
    for load in (load_run, load_encoder):
        with pytest.raises(
            ValueError, match=r"checkpoint_00000003.pt has weights that are NaN or infinite: encoder.norm"
        ):
            load(file)


def test_a_checkpoint_with_old_names_of_options_is_converted(tiny, tmp_path):
    config = tiny()
    raw = config.to_dict()
    raw["train"] |= {"keep_checkpoints": raw["checkpoint"].pop("keep"), "bad_numbers": raw["train"].pop("on_nonfinite")}
    raw["data"] |= {"transforms": None, "crop_scale": [0.5, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.5}
    file = save_checkpoint(tmp_path, Checkpoint(3, build_recipe(config).state_dict(), {}, raw, {}, {}))
    convert(file, tmp_path / "official", to="official")
    assert load_encoder(tmp_path / "official", num_heads=2).provenance.step == 3
