"""The graph in onnxruntime, for any number of images, against the encoder itself."""

import numpy as np
import pytest
import torch

from jepa_kit.errors import CheckpointError
from jepa_kit.interop import onnx as ours
from jepa_kit.interop.formats import read_encoder, write
from jepa_kit.interop.frozen import FrozenEncoder

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(["tokens", "features"], {"images": images.numpy()})]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"patch_size": 16, "image_size": (32, 64), "embed_dim": 32, "num_heads": 4},
        {"qkv_bias": False, "in_chans": 1},
    ],
    ids=str,
)
def test_tokens_and_features(make_weights, tmp_path, sizes, batch):
    weights = make_weights(**sizes)
    write(weights, tmp_path / "a.onnx", "onnx")
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    images = torch.randn(batch, weights.architecture.in_chans, *weights.architecture.image_size)
    encoder = FrozenEncoder(weights)
    tokens, features = run(tmp_path / "a.onnx", images)
    assert tokens.shape == (batch, *weights.table.shape)
    assert (tokens - encoder.forward_features(images)).abs().max() < 1e-4
    assert (features - encoder.embed(images)).abs().max() < 1e-4


def test_the_fixture(converted, recorded):
    tokens, _ = run(converted["onnx"], recorded["images"])
    assert (tokens - recorded["target_encoder_output"]).abs().max() < 1e-4


def test_old_runtimes_can_read_it(make_weights, tmp_path):
    """Its format is the oldest that has its operators, whatever the newest is that the library could write."""
    write(make_weights(), tmp_path / "a.onnx", "onnx")
    model = onnx.load(tmp_path / "a.onnx")
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)


def test_another_image_size(make_weights, tmp_path):
    weights = make_weights()
    words = write(weights, tmp_path / "a.onnx", "onnx", image_size=(48, 40))
    assert words.endswith("positions interpolated to (48, 40)")
    images = torch.randn(3, 3, 48, 40)
    tokens, _ = run(tmp_path / "a.onnx", images)
    assert (tokens - FrozenEncoder(weights).forward_features(images)).abs().max() < 1e-4
    assert torch.equal(read_encoder(tmp_path / "a.onnx").table, weights.table)
    with pytest.raises(ValueError, match=r"patch_size \(=8\) must divide the height \(=48\) and the width \(=41\)"):
        write(weights, tmp_path / "b.onnx", "onnx", image_size=(48, 41))


def test_many_weights_are_a_file_of_their_own(make_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "LARGE", 1000)
    weights = make_weights()
    write(weights, tmp_path / "a.onnx", "onnx")
    size = (tmp_path / "a.onnx.data").stat().st_size
    assert size > 4 * sum(v.numel() for v in weights.state.values())
    for limit, apart in ((size, True), (size + 1, False)):
        monkeypatch.setattr(ours, "LARGE", limit)
        write(weights, tmp_path / f"{limit}.onnx", "onnx")
        assert (tmp_path / f"{limit}.onnx.data").exists() is apart
    images = torch.randn(2, 3, 32, 32)
    assert (run(tmp_path / "a.onnx", images)[0] - FrozenEncoder(weights).forward_features(images)).abs().max() < 1e-4
    found = read_encoder(tmp_path / "a.onnx")
    assert all(torch.equal(found.state[name], value) for name, value in weights.state.items())
    (tmp_path / "a.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"a.onnx has its weights in a.onnx.data, which is not beside it"):
        read_encoder(tmp_path / "a.onnx")


def test_a_graph_of_another_maker(tmp_path):
    helper = onnx.helper
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match=r"a.onnx is an ONNX file, but none of jepa_kit"):
        read_encoder(tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_bytes((tmp_path / "a.onnx").read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"b.onnx is damaged, or not an ONNX file"):
        read_encoder(tmp_path / "b.onnx")


def test_without_the_package(make_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"ONNX files need the package onnx: pip install 'jepa_kit\[onnx\]'"):
        write(make_weights(), tmp_path / "a.onnx", "onnx")


def test_gelu_is_the_exact_one(make_weights, tmp_path):
    write(make_weights(), tmp_path / "a.onnx", "onnx")
    model = onnx.load(str(tmp_path / "a.onnx"))
    gelus = [node for node in model.graph.node if node.op_type == "Gelu"]
    assert len(gelus) == 2
    assert not any(node.attribute for node in gelus)  # the default is not the tanh approximation
    assert np.isclose(
        next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "scale"), 8**-0.5
    )
