"""Every pair of formats, there and back: the same weights bit for bit, and the same words about them."""

import itertools
from dataclasses import replace

import pytest
import torch

import jepa_kit
from jepa_kit.errors import CheckpointError
from jepa_kit.interop import native
from jepa_kit.interop.formats import convert, read, read_encoder, write
from jepa_kit.interop.weights import Reading, architecture_of_vit

FORMATS = ["official", "jepa_kit", "hf", "timm", "safetensors", "onnx"]
HEADS = 4


def assert_equal_weights(found, expected):
    assert found.architecture == expected.architecture
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert found.state[name].dtype == value.dtype, name
        assert torch.equal(found.state[name], value), name
    assert torch.equal(found.table, expected.table)


@pytest.fixture(scope="module")
def expected(released):
    return read_encoder(released, "target", num_heads=HEADS)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMATS, FORMATS)))
def test_there_and_back(converted, expected, tmp_path, first, second):
    convert(converted[first], tmp_path / "there", to=second, num_heads=HEADS)
    convert(tmp_path / "there", tmp_path / "back", to=first, from_=second, num_heads=HEADS)
    for name in ("there", "back"):
        found = read_encoder(tmp_path / name, "target", num_heads=HEADS)
        assert_equal_weights(found, expected)
        held = found.provenance
        assert (held.encoder, held.step, held.epoch) == ("target", 2, 2)
        assert held.licence == expected.provenance.licence
        if "official" not in (first, second):  # which has no place for the name of another file
            assert held.source == expected.provenance.source


@pytest.mark.parametrize("format", FORMATS[2:])
@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": (16, 48)},
        {"qkv_bias": False},
        {"norm_eps": 1e-5},
        {"dtype": torch.bfloat16},
        {"encoder": "context", "licence": "CC-BY-NC-4.0"},
        {"in_chans": 1},
    ],
    ids=str,
)
def test_other_encoders(make_weights, tmp_path, format, sizes):
    weights = make_weights(**sizes)
    if format == "onnx" and "dtype" in sizes:
        with pytest.raises(CheckpointError, match=r"weights must be float32 for onnx, not torch.bfloat16"):
            write(weights, tmp_path / "a", format)
        return
    write(weights, tmp_path / "a", format)
    found = read(tmp_path / "a")
    assert_equal_weights(found, weights)
    assert found.provenance == weights.provenance


@pytest.mark.parametrize("format", FORMATS)
def test_a_table_of_its_own(make_weights, tmp_path, format):
    """Kept where there is a place for it, and only when asked for."""
    weights = make_weights()
    own = weights.table + 0.1
    weights = type(weights)(
        state=weights.state, architecture=weights.architecture, provenance=weights.provenance, positions=own
    )
    if format in ("official", "jepa_kit"):
        with pytest.raises(
            CheckpointError, match="a test has a position table of its own; this format's positions are"
        ):
            write(weights, tmp_path / "a", format)
        return
    write(weights, tmp_path / "a", format)
    with pytest.raises(CheckpointError, match=r"grid of 4 x 4: it differs by up to 0.1. .*positions='file' keeps it"):
        read(tmp_path / "a")
    assert torch.equal(read(tmp_path / "a", None, Reading(positions="file")).table, own)
    with pytest.raises(ValueError, match=r"positions \(='both'\) must be 'formula' or 'file'"):
        read_encoder(tmp_path / "a", positions="both")


@pytest.mark.parametrize("format", ["official", "jepa_kit"])
def test_an_encoder_alone_becomes_a_checkpoint_with_it_alone(make_weights, tmp_path, format):
    words = write(make_weights(encoder="context"), tmp_path / "a", format)
    assert words.startswith("encoder of a test; step 3; no optimiser")
    assert read_encoder(tmp_path / "a", "context", num_heads=2).provenance.step == 3
    with pytest.raises(
        CheckpointError,
        match=r"a \(jepa_kit\) has no target encoder; it contains 'context'; encoder='context' takes it",
    ):
        read_encoder(tmp_path / "a", "target", num_heads=2)
    with pytest.raises(
        CheckpointError, match="a test does not state which encoder it contains, and this format has both"
    ):
        write(make_weights(encoder=None), tmp_path / "b", format)


@pytest.mark.parametrize(
    ("data", "epochs"), [({"samples": 3 * 2048 + 5}, 2), ({"samples": 100}, None), ({}, None)], ids=str
)
def test_epochs_of_a_run_are_whole_ones(make_weights, data, epochs):
    """7 updates of 2,048 images; None where the data are not known, or too few for one update."""
    alone = native.checkpoint_of(make_weights(encoder="context"))
    run = replace(alone, step=7, data=data, origin={})
    held = native.encoder_of(run, "context", "a run").provenance
    assert (held.step, held.epoch) == (7, epochs)


@pytest.mark.parametrize("format", ["hf", "timm", "safetensors", "onnx"])
def test_which_encoder(make_weights, tmp_path, format):
    write(make_weights(encoder="context"), tmp_path / "a", format)
    assert read_encoder(tmp_path / "a", None).provenance.encoder == "context"
    with pytest.raises(
        CheckpointError, match="a test contains only the context encoder, not the target encoder; encoder="
    ):
        read_encoder(tmp_path / "a", "target")
    with pytest.raises(ValueError, match=r"encoder \(='teacher'\) must be 'target' or 'context', or None"):
        read_encoder(tmp_path / "a", "teacher")


def test_words_about_a_whole_run(released, converted, tmp_path):
    held = read(converted["jepa_kit"])
    words = write(held, tmp_path / "a", "jepa_kit")
    assert words.startswith(
        "encoder, predictor, target_encoder of released_layout.pth.tar (released layout); step 2; mom"
    )
    began = replace(held, origin={"source": "x", "licence": "L"})
    words = write(began, tmp_path / "b", "official")
    assert "of a run of jepa_kit that began from x; step 2; moments of 71 parameters; licence L" in words


def test_both_encoders_are_told_apart(released, released_content, tmp_path):
    for which, part in (("target", "target_encoder"), ("context", "encoder")):
        convert(released, tmp_path / which, to="safetensors", encoder=which, num_heads=HEADS)
        found = read_encoder(tmp_path / which, which)
        assert torch.equal(found.state["norm.weight"], released_content[part]["module.norm.weight"])
        assert found.words().startswith(f"{which} encoder of released_layout.pth.tar")
    with pytest.raises(ValueError, match=r"encoder \(='teacher'\) must be"):
        read_encoder(released, "teacher", num_heads=HEADS)


def test_what_cannot_be_converted(released, converted, tmp_path):
    with pytest.raises(FileExistsError, match=r"a.pt already exists"):
        convert(released, converted["jepa_kit"], to="jepa_kit", num_heads=HEADS)
    with pytest.raises(CheckpointError, match="is not in the format 'hf': by its content it is 'official'"):
        convert(released, tmp_path / "x", to="timm", from_="hf")
    with pytest.raises(
        ValueError, match=r"to \(='keras'\) must be one of official, jepa_kit, hf, timm, safetensors, onnx"
    ):
        convert(released, tmp_path / "x", to="keras")
    with pytest.raises(ValueError, match=r"encoder \(='target'\) is for formats of one encoder; jepa_kit keeps all"):
        convert(released, tmp_path / "x", to="jepa_kit", encoder="target", num_heads=HEADS)
    with pytest.raises(
        ValueError, match=r"image_size \(=\(32, 32\)\) is for onnx, whose graphs have a fixed size; hf has"
    ):
        convert(released, tmp_path / "x", to="hf", image_size=(32, 32), num_heads=HEADS)
    with pytest.raises(CheckpointError, match="gone"):
        write(_Unwritable(), tmp_path / "x", "hf")
    assert list(tmp_path.iterdir()) == []


class _Unwritable:
    """Weights whose note cannot be made."""

    class provenance:
        encoder, source = "target", "x"

    class architecture:
        own: dict[str, object] = {}  # noqa: RUF012
        relative_bias, positions, class_token, grid = "none", "sincos", False, (4, 4)

    def about(self, sealed=True):
        raise CheckpointError("gone")


OPTIONS = [
    {"class_token": True, "registers": 2, "positions": "learned", "interpolation_offset": 0.1, "mask_token": True},
    {"positions": "none", "relative_bias": "per_block", "layer_scale": 0.1},
    {"positions": "rotary", "rotary_base": 50.0, "final_norm": False, "relative_bias": "shared"},
    {"causal": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_options_that_other_code_does_not_have_are_kept_in_our_own_formats(make_weights, tmp_path, options):
    weights = make_weights(**options)
    assert weights.architecture.own == options
    vit = weights.module()
    assert architecture_of_vit(vit) == weights.architecture
    images = torch.randn(2, 3, 16, 24)
    for format in ("safetensors", "jepa_kit"):
        write(weights, tmp_path / format, format)
        kept = jepa_kit.load_encoder(tmp_path / format)
        assert kept.architecture == weights.architecture
        torch.testing.assert_close(kept(images).flatten(0, 1), vit(images), rtol=1e-4, atol=1e-4)
    for name in options:
        assert f"{name} {options[name]}" in kept.about
    for format in ("official", "hf", "timm", "onnx"):
        with pytest.raises(
            CheckpointError, match=rf"encoder.\w+ \(=.*\) cannot be stored in {format}: its readers would"
        ):
            write(weights, tmp_path / "other", format)


@pytest.mark.parametrize("format", ["official", "hf", "timm", "onnx"])
def test_an_encoder_that_prepares_its_images_stays_at_home(make_weights, tmp_path, format):
    weights = make_weights()
    weights = replace(weights, architecture=replace(weights.architecture, input_norm="image"))
    with pytest.raises(CheckpointError, match=rf"input_norm \(='image'\) cannot be stored in {format}: its readers"):
        write(weights, tmp_path / "out", format)
    write(weights, tmp_path / "kept", "safetensors")
    kept = jepa_kit.load_encoder(tmp_path / "kept")
    images = torch.randn(2, 3, *kept.image_size)
    assert kept.vit.input_norm == "image"
    assert torch.allclose(kept.embed(images + 3.0), kept.embed(images), atol=1e-5)
