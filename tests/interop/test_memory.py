"""A checkpoint of 1.2 GB is converted within about its own size of memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jepa_kit.interop.formats import convert
from jepa_kit.interop.weights import Architecture

ROOT = Path(__file__).parents[2]

# Not ru_maxrss: at exec a process inherits the largest resident memory of the one that started it.
MEASURED = """
import re, sys
from jepa_kit.interop.formats import convert
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], num_heads=16)
print(peak() - before)
"""


def rise(source, target, format):
    """Bytes by which the largest resident memory rose; pages of mapped files are counted."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(target), format],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def size_of(path):
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A ViT-L twice, and a predictor, in the released layout; made tensor by tensor from zeros."""
    from jepa_kit.interop.official import TABLE, sincos_2d
    from jepa_kit.predictors.vit import ViTPredictor

    shape = Architecture(image_size=(64, 64), patch_size=16, embed_dim=1024, depth=12, num_heads=16, mlp_hidden=4096)
    with torch.device("meta"):
        encoder = shape.build().state_dict()
        predictor = ViTPredictor(embed_dim=1024, out_dim=1024, grid=(4, 4), num_heads=16).state_dict()
    token = predictor.pop("mask_token")
    predictor = {"mask_token": token[None], **{f"predictor_{name}": value for name, value in predictor.items()}}
    parts = {"encoder": encoder, "target_encoder": encoder, "predictor": predictor}
    content = {part: {name: torch.zeros(v.shape) for name, v in state.items()} for part, state in parts.items()}
    for part, state in content.items():
        state[TABLE[part]] = sincos_2d(384 if part == "predictor" else 1024, (4, 4))[None]
    path = tmp_path_factory.mktemp("large") / "large.pth.tar"
    torch.save({**content, "epoch": 1}, path)
    del content
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which Linux has")
def test_memory_of_conversions(large, tmp_path):
    convert(large, tmp_path / "encoder", to="safetensors", num_heads=16)
    for source, formats in (
        (large, ("jepa_kit", "safetensors")),
        (tmp_path / "encoder", ("hf", "onnx", "official")),
    ):
        for format in formats:
            target = tmp_path / f"{source.name}.{format}"
            rose, size = rise(source, target, format), size_of(source)
            print(f"{source.name} -> {format}: {rose / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB")
            assert rose < 1.15 * size + 100e6, format
    rose, size = rise(tmp_path / "encoder.hf", tmp_path / "back", "timm"), size_of(tmp_path / "encoder.hf")
    print(f"hf -> timm: {rose / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB")
    shutil.rmtree(tmp_path)
    assert rose < 1.4 * size + 100e6  # q, k and v are joined, a quarter of the weights
