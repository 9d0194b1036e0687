"""tools/plan_run.py as a user meets it."""

import importlib
import json
from pathlib import Path

import pytest

from jepa_kit.planning.device_specs import DEVICES

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "plan_run.py"
CONFIG = str(ROOT / "projects" / "ijepa" / "configs" / "in1k_vits16.yaml")


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("jepa_kit.tools.plan_run")


def test_a_plan(tool, capsys):
    assert tool.main(["--config-file", CONFIG, "--gpus", "8", "--device", "h100", "--gpu-hours", "100"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 x NVIDIA H100 SXM, 256 images each, at 40% of 989 TFLOP/s (bf16)\n")
    assert printed.splitlines()[-1].startswith("100 GPU hours would be ")


def test_a_table(tool, capsys):
    assert tool.main(["--config-file", CONFIG, "--gpus", "8,16", "--device", "h100"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["GPUs", "8", "16"]


def test_json(tool, capsys):
    arguments = ["--config-file", CONFIG, "--gpus", "8", "--device", "a100", "--json", "--samples", "20480"]
    assert tool.main([*arguments, "train.epochs=50"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plans"][0]["workload"]["steps"] == 500
    assert found["assumptions"]["device"]["bf16_tflops"] == 312
    assert "implied_share_of_peak" not in found


def test_a_card_by_its_figures(tool, capsys):
    given = ["--config-file", CONFIG, "--gpus", "8", "--peak", "100", "--memory", "31", "train.precision=auto"]
    assert tool.main([*given, "--json"]) == 0
    own = json.loads(capsys.readouterr().out)["plans"][0]
    assert tool.main([*given[:4], given[-1], "--device", "t4", "--json"]) == 0  # without bf16, auto is float32
    t4 = json.loads(capsys.readouterr().out)["plans"][0]
    assert (own["precision"], t4["precision"]) == ("bf16", "float32")
    assert t4["step_seconds"] / own["step_seconds"] == pytest.approx(100 / 8.1)
    assert own["fits"] == {name: held["total"] < 31e9 for name, held in own["memory"].items()}
    assert tool.main([*given, "--device", "t4", "train.precision=tf32"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 x NVIDIA T4, 256 images each, at 40% of 100 TFLOP/s (tf32)\n")


def test_this_machines_cpu(tool, capsys, monkeypatch):
    monkeypatch.setattr("jepa_kit.planning.device_specs.matrix_peak", lambda device, precision: 2e11)
    assert tool.main(["--config-file", CONFIG, "--gpus", "1", "--device", "cpu", "train.precision=float32"]) == 0
    assert "1 x this CPU, 2048 images each, at 40% of 0.2 TFLOP/s (float32)" in capsys.readouterr().out


def test_every_device_of_the_list(tool, capsys):
    assert {"3090", "4090", "5090", "v100", "a6000", "l40s", "a10", "t4", "b200"} < set(DEVICES)
    for name, device in DEVICES.items():
        assert device.source, name
        peaks = [device.bf16_tflops, device.tf32_tflops, device.float32_tflops]
        known = [peak for peak in peaks if peak is not None]
        assert known == sorted(known, reverse=True), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device", "v100", "train.precision=bf16"],
            "(='bf16') is not available on NVIDIA V100 SXM2 32 GB; train.precision=fl",
        ),
        ([], "--device must name a device, or --peak and --memory must be given"),
        (["--peak", "3"], "--device must name a device, or --peak and --memory must be given"),
        (["--device", "t4", "--peak", "0"], "--peak (=0.0) must be above 0 and finite"),
        (["--device", "t4", "--memory", "inf"], "--memory (=inf) must be above 0 and finite"),
    ],
)
def test_mistakes_in_devices(tool, capsys, arguments, message):
    assert tool.main(["--config-file", CONFIG, "--gpus", "1", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus (='0') must be numbers from 1 to 4096, such as 8 or 8,64,512"),
        (["--gpus", "8,x"], "--gpus (='8,x') must be numbers from 1 to 4096"),
        (["--gpus", "8", "--gpu-hours", "0"], "--gpu-hours (=0.0) must be above 0"),
        (["--gpus", "8", "--gpu-hours", "nan"], "--gpu-hours (=nan) must be above 0 and finite"),
        (["--gpus", "4096"], "train.batch_size (=2048) must be divisible by gpus (=4096)"),
        (["--gpus", "1", "encoder.depht=3"], "encoder.depht is not an option of 'vit'; did you mean 'depth'?"),
        (
            ["--gpus", "1", "data.shards=nothing-here"],
            "shards (='nothing-here') must be a folder of .tar",
        ),
        (
            ["--gpus", "1", "data.shards='pipe:touch opened'"],
            "--samples N must be given: data.shards (='pipe:to",
        ),
        (
            ["--gpus", "1", "data.shards=http://127.0.0.1:9/a.tar"],
            "has no index.json on this machine, and plan",
        ),
    ],
)
def test_mistakes(tool, capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool.main(["--config-file", CONFIG, "--device", "h100", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("plan_run.py: ")
    assert message in printed
    assert not list(tmp_path.iterdir()), "no command of pipe: was run"


def test_a_plan_for_shards_reads_their_index_alone(tool, tmp_path):
    write_index_alone = {"format": "jepa_kit shards", "version": 1, "samples": 7, "labels": {}, "refused": []}
    entries = [{"file": f"{k}.tar", "samples": k, "bytes": 10240, "sha256": None} for k in (3, 4)]
    (tmp_path / "index.json").write_text(json.dumps(write_index_alone | {"shards": entries}))
    config = tool.load_config(CONFIG, [f"data.shards={tmp_path}"])
    assert tool.samples_of(config, None) == 7
    (tmp_path / "3.tar").touch()
    assert tool.samples_of(tool.load_config(CONFIG, [f"data.shards={tmp_path}/3.tar"]), None) == 3
    assert tool.samples_of(config, 5) == 5


def test_an_unknown_device(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--config-file", CONFIG, "--gpus", "8", "--device", "abacus"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err
