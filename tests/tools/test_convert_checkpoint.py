"""tools/convert_checkpoint.py as a user meets it: examples, what it prints, messages and exit statuses."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from jepa_kit.interop.formats import read_encoder

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("jepa_kit.tools.convert_checkpoint")


@pytest.fixture
def released(fixtures):
    return str(fixtures / "released_layout.pth.tar")


def test_help_has_formats_and_examples(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "formats:\n  official " in printed
    assert "python tools/convert_checkpoint.py --from official --to hf IN1K" in printed


def test_it_says_what_was_written(tool, released, tmp_path, capsys):
    out = tmp_path / "a"
    assert tool.main(["--from", "official", "--to", "hf", "--num-heads", "4", released, str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{out} (hf): target encoder of released_layout.pth.tar (released layout); ViT of width 48"
    )
    assert "epoch 2, step 2; licence not stated (CC-BY-NC-4.0 if" in printed
    note = json.loads((out / "config.json").read_text())["jepa_kit"]
    assert (note["encoder"], note["step"]) == ("target", 2)


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_which_encoder(tool, released, tmp_path, encoder):
    out = tmp_path / "a"
    assert tool.main(["--to", "timm", "--encoder", encoder, "--num-heads", "4", released, str(out)]) == 0
    part = {"target": "target_encoder", "context": "encoder"}[encoder]
    expected = torch.load(released, weights_only=True)[part]["module.norm.weight"]
    assert torch.equal(read_encoder(out, encoder).state["norm.weight"], expected)


def test_a_graph_of_another_size(tool, released, tmp_path, capsys):
    pytest.importorskip("onnx")
    out = tmp_path / "a.onnx"
    assert tool.main(["--to", "onnx", "--image-size", "96", "--num-heads", "4", released, str(out)]) == 0
    assert "positions interpolated to (96, 96)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "hf"], "the number of heads is not in the weights"),
        (["--to", "jepa_kit", "--encoder", "target", "--num-heads", "4"], "encoder (='target') is for formats of one"),
        (["--from", "timm", "--to", "hf"], "is not in the format 'timm': by its content it is 'official'"),
        (["--to", "hf", "--num-heads", "4", "--sha256", "00"], "it is damaged, or another file"),
        (["--to", "hf", "--num-heads", "4", "--image-size", "96"], "is for onnx, whose graphs have a fixed size"),
    ],
)
def test_what_cannot_be_done(tool, released, tmp_path, capsys, arguments, message):
    assert tool.main([*arguments, released, str(tmp_path / "a")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("convert_checkpoint.py: ")
    assert message in printed
    assert not (tmp_path / "a").exists()


def test_no_such_file(tool, tmp_path, capsys):
    assert tool.main(["--to", "hf", str(tmp_path / "nowhere"), str(tmp_path / "a")]) == 2
    assert "there is no file" in capsys.readouterr().err
