"""check_parity against the recording of the released code, and against one made by plain functional code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_recording import record
from safetensors.torch import load_file, save_file
from torch import Tensor

from projects.ijepa.check_parity import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "released_step"


@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_the_released_code_is_reproduced(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{FIXTURE}{suffix}"]) == 0
    printed = capsys.readouterr().out
    for quantity in ("encoder, context", "target ", "prediction", "gradient predictor/mask_token", "schedule of lr"):
        assert quantity in printed
    assert "loss, step 29" in printed
    assert "30 steps in torch.float64 on cpu: all quantities within 1e-08" in printed
    # It holds no final weights; 40, 31 and 40 are the parameters of a ViT and a predictor of its sizes.
    _, _, lacking = printed.partition("not in the fixture, so not compared:\n")
    assert [line.strip() for line in lacking.split("\n\n")[0].splitlines()] == [
        "final weights of the encoder (final/encoder/, 40 tensors)",
        "final weights of the predictor (final/predictor/, 31 tensors)",
        "final weights of the target_encoder (final/target_encoder/, 40 tensors)",
    ]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_either_precision_on_either_device(dtype: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FIXTURE), "--device", device, "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    tolerance = {"float64": "1e-08", "float32": "1e-05"}[dtype]
    assert f"30 steps in torch.{dtype} on {device}: all quantities within {tolerance}\n" in printed


def test_float32_is_compared_with_what_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording that is wrong by what float32 could not hold is seen as such, and rounding is a difference."""

    def change(_: Any, tensors: dict[str, Tensor]) -> None:
        tensors["step0/prediction"].view(-1)[3] += 1e-4

    path = copy_fixture(tmp_path, change)
    assert main([path, "--dtype", "float32"]) == 1
    above = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("<-- above")]
    assert above == ["prediction"]
    assert main([str(FIXTURE), "--dtype", "float32", "--tolerance", "1e-8"]) == 1


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(FIXTURE), "--device", "cuda"]) == 2
    assert "check_parity: device (='cuda') needs CUDA" in capsys.readouterr().err
    assert main([str(FIXTURE), "--device", "tpu"]) == 2
    assert "device (='tpu') must be 'auto', 'cpu', 'cuda' or 'cuda:N'" in capsys.readouterr().err


def copy_fixture(folder: Path, change: Any, *, of: Path = FIXTURE, steps: int = 2) -> str:
    """A copy of a fixture's first steps after ``change(content, tensors)``."""
    content = json.loads(of.with_suffix(".json").read_text())
    tensors = load_file(of.with_suffix(".safetensors"))
    content["trajectory"] = content["trajectory"][:steps]
    change(content, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (folder / "f.json").write_text(json.dumps(content))
    save_file(tensors, folder / "f.safetensors")
    return str(folder / "f")


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("step0/prediction", "prediction"),
        ("step0/target", "target"),
        ("step0/grad/encoder/blocks.1.attn.qkv.weight", "gradient encoder/blocks.1.attn.qkv.weight"),
        ("init/encoder/pos_embed", "positions of the encoder"),
    ],
)
def test_a_difference_is_found(name: str, failed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(_: Any, tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] += 1e-6 * tensors[name].abs().max()

    path = copy_fixture(tmp_path, change)
    assert main([path]) == 1
    printed = capsys.readouterr().out
    above = [line.split("  ")[0] for line in printed.splitlines() if line.endswith("<-- above")]
    assert above == [failed]
    assert "quantities differ by more than 1e-08" in printed
    assert main([path, "--tolerance", "1e-2"]) == 0


@pytest.mark.parametrize(
    ("setting", "value", "failed"),
    [
        ("step0_mean_squared_error", 1.02, "mean squared error, step 0"),
        ("no_weight_decay", ["predictor/mask_token"], "parameters without weight decay"),
    ],
)
def test_recorded_settings_are_compared(
    setting: str, value: Any, failed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([copy_fixture(tmp_path, lambda c, t: c["meta"].update({setting: value}))]) == 1
    above = [line for line in capsys.readouterr().out.splitlines() if line.endswith("<-- above")]
    assert [line.split("  ")[0] for line in above] == [failed]


def drop(tensors: dict[str, Tensor], prefix: str) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        (lambda c, t: drop(t, "step0/grad/"), "gradients of the predictor (step0/grad/predictor/, 31 tensors)"),
        (lambda c, t: drop(t, "step0/grad/encoder"), "gradients of the encoder (step0/grad/encoder/, 40 tensors)"),
        (lambda c, t: drop(t, "step0/"), "prediction (step0/prediction)"),
        (lambda c, t: drop(t, "step0/encoder_full"), "encoder, all patches (step0/encoder_full_output)"),
        (lambda c, t: drop(t, "init/predictor/predictor_pos"), "positions of the predictor (init/predictor/"),
        (lambda c, t: [step.pop("momentum") for step in c["trajectory"]], "momentum of each step"),
        (lambda c, t: c.update(trajectory=[{}, {}]), "loss of each step"),
    ],
)
def test_what_is_not_recorded_is_named(
    change: Any, lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([copy_fixture(tmp_path, change)]) == 0
    before, _, after = capsys.readouterr().out.partition("not in the fixture, so not compared:\n")
    assert f"  {lacking}" in after
    assert lacking.split(" (")[0] + "  " not in before, "and yet compared"


def test_what_is_not_looked_at_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        content["meta"]["clip_grad"] = 3.0
        tensors["step0/attention"] = torch.zeros(3)

    assert main([copy_fixture(tmp_path, change)]) == 0
    named = "in the fixture, but not compared: masks of later steps, meta.clip_grad, step0/attention\n"
    assert named in capsys.readouterr().out


def test_nan_is_a_difference(tmp_path: Path) -> None:
    def change(content: dict[str, Any], _: Any) -> None:
        content["trajectory"][1]["loss"] = math.nan

    assert main([copy_fixture(tmp_path, change)]) == 1


OF_META = ("no_weight_decay", "step0_mean_squared_error")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.pop("meta"), "has no 'meta': it is not a recording of training steps"),
        (lambda c, t: c.update(meta=[1]), "meta (=[1]) must be a mapping"),
        (lambda c, t: c["meta"].pop("depth"), "the fixture's meta has no depth"),
        (lambda c, t: c["meta"].update(depth=2), "unexpected: blocks.2.attn.proj.bias"),
        (lambda c, t: c["meta"].update(patch_size=7), "patch_size (=7) must divide"),
        (
            lambda c, t: c["meta"].update(batch_size=True),
            "batch_size (=True) of the fixture's meta must be a whole number",
        ),
        (lambda c, t: c["meta"].update(dtype="torch.foo"), "dtype (='torch.foo') of the fixture's meta must be torch."),
        (lambda c, t: c["meta"].update(ema=None), "ema (=None) of the fixture's meta must be two numbers from 0 to 1"),
        (lambda c, t: c["meta"].update(ema=0.99), "ema (=0.99) of the fixture's meta must be two numbers from 0 to 1"),
        (lambda c, t: c["meta"].update(optimizer={"eps": 1}), "optimizer (={'eps': 1}) of the fixture's meta must be"),
        (
            lambda c, t: c["meta"].update(optimizer="SGD"),
            "optimizer (='SGD') of the fixture's meta must be a text with",
        ),
        (lambda c, t: c["meta"].update(optimizer="AdamW(eps=x)"), "must have numbers after eps="),
        (lambda c, t: c["meta"].update(ref_lr="1e-3"), "ref_lr (='1e-3') of the fixture's meta must be a number"),
        (lambda c, t: c["meta"].update(wd=math.inf), "wd (=inf) of the fixture's meta must be a number from 0"),
        (
            lambda c, t: c["meta"].update(final_lr=0.1),
            "final_lr (=0.1) of the fixture's meta must be at most ref_lr (=0",
        ),
        (
            lambda c, t: c["meta"].update(ipe_scale=0.8),
            "ipe_scale (=0.8) of the fixture's meta must be a number from 1",
        ),
        (lambda c, t: c["meta"].update(epochs=1, iterations_per_epoch=1), "2 steps, but epochs * iterations_per_epoch"),
        (lambda c, t: c["meta"].update(num_target_blocks=3), "masks/0/target/ must have sets 0 to 2, not 0, 1, 2, 3"),
        (lambda c, t: c.update(trajectory=[]), "trajectory (=[]) must be a list with a mapping for each step"),
        (lambda c, t: c.update(trajectory=[1, 2]), "trajectory[0] (=1) must be a mapping with loss, lr"),
        (lambda c, t: c["trajectory"][1].pop("lr"), "trajectory[1] has no lr, which other steps have"),
        (lambda c, t: c["trajectory"][1].update(loss=None), "trajectory[1].loss (=None) must be a number"),
        (lambda c, t: c["trajectory"][1].update(loss=10**400), "trajectory[1].loss (=10000"),
        (lambda c, t: c["trajectory"][1].update(step=5), "trajectory[1].step (=5) must be 1"),
        (lambda c, t: t.pop("images"), "the fixture has no tensor 'images'; it has"),
        (lambda c, t: t.update(images=t["images"][:0]), "images must be [K, B, 3, h, w] with K of 1 or more and the"),
        (
            lambda c, t: t.update(images=t["images"][..., :32]),
            "the rest (4, 3, 64, 64) as meta says, not (5, 4, 3, 64, 32",
        ),
        (
            lambda c, t: t.update(images=t["images"].float()),
            "images is torch.float32, but the run of the fixture's meta",
        ),
        (lambda c, t: t.pop("masks/1/context/0"), "no tensor masks/1/context/0, so step 1 has no context patches"),
        (lambda c, t: t.pop("masks/0/target/0"), "masks/0/target/ must have sets 0 to 3, not 1, 2, 3"),
        (
            lambda c, t: t.update({"masks/0/context/0": t["masks/0/context/0"][0]}),
            "int64 with B = 4 (batch_size of meta)",
        ),
        (lambda c, t: t.update({"masks/0/context/0": t["masks/0/context/0"][:2]}), "not torch.int64 of shape (2, 7)"),
        (lambda c, t: t.update({"masks/0/context/0": t["masks/0/context/0"] / 2}), "not torch.float32 of shape (4, 7)"),
        (lambda c, t: t["masks/0/context/0"].add_(64), "masks/0/context/0 has patch"),
        (lambda c, t: t["masks/0/target/2"].zero_(), "masks/0/target/2 has a patch twice in one image"),
        (
            lambda c, t: t.update({"masks/0/target/1": t["masks/0/target/1"][:, 1:]}),
            "masks/0/target/1 has 11 patches per",
        ),
        (lambda c, t: drop(t, "init/target_encoder"), "(checkpoint: init/target_encoder/) does not fit"),
        (lambda c, t: t.pop("init/predictor/mask_token"), "missing: mask_token"),
        (
            lambda c, t: t.pop("step0/grad/encoder/norm.bias"),
            "lacks 1 of 40 tensors of step0/grad/encoder/ (it must have",
        ),
        (
            lambda c, t: t.update({"step0/grad/encoder/x": torch.ones(1)}),
            "has step0/grad/encoder/x: no parameter has this",
        ),
        (
            lambda c, t: t.update({"final/head/x": torch.ones(1)}),
            "trajectory has 2 steps, but its final weights are those",
        ),
        (
            lambda c, t: (c["meta"].pop("steps"), t.update({"final/head/x": torch.ones(1)})),
            "has final/head/x: no parameter",
        ),
        (
            lambda c, t: (c["meta"].pop("steps"), t.update({"final/encoder/norm.bias": torch.ones(48)})),
            "lacks 39 of 40",
        ),
        (
            lambda c, t: t.update({"step0/target": t["step0/target"][:3]}),
            "target has shape (16, 12, 48), but in the fixture (3, 12, 48)",
        ),
        (
            lambda c, t: t.update({"step0/prediction": t["step0/prediction"].transpose(0, 1)}),
            "prediction has shape (16, 12, 48), but in the fixture (12, 16, 48)",
        ),
        (
            lambda c, t: (drop(t, "step0"), [c["meta"].pop(name) for name in OF_META], c.update(trajectory=[{}, {}])),
            "the fixture has nothing of a run to compare",
        ),
    ],
)
def test_a_bad_fixture_is_named(change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([copy_fixture(tmp_path, change)]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_fixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "a fixture is NAME.json and NAME.safetensors" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    assert main([str(tmp_path / "a")]) == 2
    assert "a.json is not JSON" in capsys.readouterr().err
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    assert main([str(tmp_path / "a")]) == 2
    assert "a.json is not JSON: 'utf-8' codec" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{}")
    assert main([str(tmp_path / "a.json")]) == 2
    assert "a.safetensors is not a safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "-1", "small"])
def test_a_tolerance_is_a_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(FIXTURE), f"--tolerance={value}"])
    assert stopped.value.code == 2
    assert f"--tolerance: (={value}) must be a number of 0 or more" in capsys.readouterr().err


def test_other_sizes_two_contexts_and_a_stretched_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(tmp_path, steps=9)
    status = main([path])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "final target_encoder/norm.weight" in printed
    assert "not compared" not in printed


@pytest.mark.parametrize(
    "changes",
    [{"warmup_epochs": 3}, {"warmup_epochs": 40}, {"start_lr": 4e-3}, {"warmup_epochs": 0, "final_lr": 2e-3}],
    ids=str,
)
def test_schedules_that_a_config_may_not_have(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([record(tmp_path, steps=9, **changes)])
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("final/predictor/mask_token", "final predictor/mask_token"),
        ("final/target_encoder/norm.weight", "final target_encoder/norm.weight"),
        ("init/target_encoder/pos_embed", "positions of the target_encoder"),
        ("step0/encoder_full_output", "encoder, all patches"),
        ("step0/grad/predictor/predictor_proj.bias", "gradient predictor/predictor_proj.bias"),
    ],
)
def test_a_difference_anywhere_is_found(
    name: str, failed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(_: Any, tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] += 1e-6 * tensors[name].abs().max()

    of = Path(record(tmp_path, steps=2))
    assert main([copy_fixture(tmp_path, change, of=of)]) == 1
    above = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("<-- above")]
    assert above == [failed]
