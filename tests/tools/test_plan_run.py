"""tools/plan_run.py as a user meets it."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "plan_run.py"
CONFIG = str(ROOT / "projects" / "ijepa" / "configs" / "in1k_vits16.yaml")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plan_run", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_plan(tool, capsys):
    assert tool.main(["--config-file", CONFIG, "--gpus", "8", "--device", "h100", "--gpu-hours", "100"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 x NVIDIA H100 SXM, 256 images each, at 40% of 989 TFLOP/s\n")
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
