"""Damaged weights are refused: by a checksum that the file carries, and by what no weight can be."""

import errno
import hashlib
import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from jepa_kit.errors import CheckpointError
from jepa_kit.interop import onnx as ours
from jepa_kit.interop.digest import DIGEST, digest
from jepa_kit.interop.files import open_archive
from jepa_kit.interop.formats import convert, read_encoder, write
from jepa_kit.interop.frozen import load_encoder
from jepa_kit.interop.weights import ABOUT, Architecture, Provenance

HEADS = 4
OF_ONE = ("hf", "timm", "safetensors", "onnx")


def flip(data, place):
    """The bytes with one of them changed."""
    changed = bytearray(data)
    changed[place] ^= 0x15
    return bytes(changed)


def main_file(path):
    return path / "model.safetensors" if path.is_dir() else path


def same(found, expected):
    return found.state.keys() == expected.state.keys() and all(
        torch.equal(found.state[name], value) for name, value in expected.state.items()
    )


@pytest.mark.parametrize("format", ["official", "jepa_kit", *OF_ONE])
def test_one_changed_byte_is_refused(converted, tmp_path, format):
    """Everywhere in the file: what is accepted nevertheless is the same encoder."""
    if format == "onnx":
        pytest.importorskip("onnx")
    heads = {"num_heads": HEADS} if format == "official" else {}
    expected = read_encoder(converted[format], **heads)
    copy = tmp_path / converted[format].name
    (shutil.copytree if converted[format].is_dir() else shutil.copy)(converted[format], copy)
    file = main_file(copy)
    whole, refused = file.read_bytes(), 0
    places = [*range(0, 300, 60), *range(300, len(whole), len(whole) // 25), *range(len(whole) - 300, len(whole), 60)]
    for place in places:
        file.write_bytes(flip(whole, place))
        try:
            found = read_encoder(copy, **heads)
        except CheckpointError:
            refused += 1
        else:
            assert same(found, expected), place
            assert (found.architecture, found.provenance) == (expected.architecture, expected.provenance), place
    assert refused > len(places) // 2


def test_the_digest_is_that_of_sha256():
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3]])}
    by_hand = hashlib.sha256(b'{"x": "y"}')
    by_hand.update(b'["a", "torch.int64", [1, 1]]' + (3).to_bytes(8, "little"))
    by_hand.update(b'["b", "torch.float32", [2]]' + bytes.fromhex("0000803f00000040"))
    assert digest(tensors, {"x": "y", DIGEST: "whatever"}) == by_hand.hexdigest()


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_metadata_are_verified_too(make_weights, tmp_path, format):
    """Another standard deviation in the note; and a file whose digest was taken out."""
    write(make_weights(), tmp_path / "a", format)
    from safetensors import safe_open

    with safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "a")
    note = json.loads(metadata[ABOUT])
    save_file(state, tmp_path / "b", {**metadata, ABOUT: json.dumps(note | {"std": [1.0, 1.0, 1.0]})})
    with pytest.raises(CheckpointError, match=r"b is damaged, or was changed after .* SHA-256 is \w{16}\.\.\., not"):
        load_encoder(tmp_path / "b")
    assert load_encoder(tmp_path / "b", allow_unchecked=True).provenance.std == (1.0, 1.0, 1.0)
    del metadata[DIGEST]
    save_file(state, tmp_path / "c", metadata)
    with pytest.raises(CheckpointError, match=r"c is damaged: its checksum \(jepa_kit.sha256\) is missing; allow_unch"):
        load_encoder(tmp_path / "c")
    del note["sealed"]  # as files were before digests
    save_file(state, tmp_path / "d", {**metadata, ABOUT: json.dumps(note)})
    assert same(read_encoder(tmp_path / "d"), make_weights())


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_files_beside_the_weights_are_verified(make_weights, tmp_path, name):
    write(make_weights(), tmp_path / "a", "hf")
    file = tmp_path / "a" / name
    file.write_text(file.read_text().replace("2", "3", 1))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged, or was changed after jepa_kit wrote it"):
        read_encoder(tmp_path / "a")
    file.unlink()
    with pytest.raises(CheckpointError, match=name):
        read_encoder(tmp_path / "a")


def test_weights_beside_a_graph_are_verified(make_weights, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(ours, "LARGE", 1000)
    write(make_weights(), tmp_path / "a.onnx", "onnx")
    data = tmp_path / "a.onnx.data"
    data.write_bytes(flip(data.read_bytes(), 100))
    with pytest.raises(CheckpointError, match=r"a.onnx is damaged, or was changed after jepa_kit wrote it"):
        read_encoder(tmp_path / "a.onnx")


@pytest.mark.parametrize("kind", ["official", "timm"])
def test_archives_without_crcs(released_content, make_weights, tmp_path, kind):
    content = released_content if kind == "official" else dict(make_weights().state)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(True)
    heads = {"num_heads": HEADS}
    with pytest.raises(CheckpointError, match=r"was written without checksums \(torch.serialization.set_crc32_options"):
        read_encoder(tmp_path / "a", None, **heads)
    size = None if kind == "official" else (32, 32)
    assert read_encoder(tmp_path / "a", None, allow_unchecked=True, image_size=size, **heads).state


def test_a_record_with_another_crc(released, tmp_path):
    whole = released.read_bytes()
    (tmp_path / "a").write_bytes(flip(whole, len(whole) // 2))
    with pytest.raises(CheckpointError, match=r"is damaged: the checksum of its record .* differs"):
        open_archive(tmp_path / "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["official", "jepa_kit", *OF_ONE])
def test_weights_that_are_not_finite(make_weights, tmp_path, format, value):
    weights = make_weights()
    weights.state["blocks.1.mlp.fc2.bias"][3] = value
    write(weights, tmp_path / "a", format)
    with pytest.raises(CheckpointError, match=r"has weights that are NaN or infinite: .*blocks.1.mlp.fc2.bias$"):
        read_encoder(tmp_path / "a", num_heads=2, allow_unchecked=True)


@pytest.mark.parametrize("part", ["predictor", "opt"])
def test_other_parts_that_are_not_finite(released_content, saved, part):
    if part == "opt":
        released_content["opt"]["state"][1]["exp_avg"][0] = float("nan")
    else:
        released_content["predictor"]["module.predictor_norm.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinite: "):
        read_encoder(saved(released_content), num_heads=HEADS)


@pytest.mark.parametrize("format", OF_ONE)
def test_a_table_that_is_not_finite(make_weights, tmp_path, format):
    weights = make_weights()
    own = weights.table.clone()
    own[0, 0] = float("nan")
    write(replace(weights, positions=own), tmp_path / "a", format)
    for positions in ("formula", "file"):
        with pytest.raises(CheckpointError, match=r"NaN or infinite: "):
            read_encoder(tmp_path / "a", positions=positions)


def test_weights_of_another_type(make_weights, tmp_path):
    state = {name: value.long() for name, value in make_weights().state.items()}
    save_file({"pos_embed": make_weights().table[None], **state}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"must be float64, float32, float16 or bfloat16: .* \(torch.int64\)"):
        read_encoder(tmp_path / "a", None, num_heads=2)


@pytest.mark.parametrize(
    "header",
    [
        '{"__metadata__": ["a"]}',
        '{"__metadata__": {"a": 1}}',
        '{"a": []}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": "xy"}}',
        '{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a":' + "[" * 100_000,
    ],
)
def test_headers_of_safetensors(tmp_path, header):
    text = header.encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(CheckpointError, match="damaged"):
        read_encoder(tmp_path / "x", None)


def test_json_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json is not JSON: "):
        read_encoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 10**9}, "too few for 1000000000 blocks"),
        ({"embed_dim": "x"}, "sizes must be ints of at least 1"),
        ({"patch_size": 0}, "sizes must be ints of at least 1"),
        ({"norm_eps": -1.0}, r"norm_eps \(=-1.0\) must be"),
        ({"qkv_bias": 1}, r"qkv_bias \(=1\) must be true or false"),
    ],
)
def test_notes_with_impossible_sizes(make_weights, tmp_path, change, message):
    weights = make_weights()
    note = json.loads(weights.about(sealed=False))
    note["architecture"] |= change
    state = {"pos_embed": weights.table, **weights.state}
    save_file(state, tmp_path / "x", {"format_name": "jepa_kit.encoder/1", ABOUT: json.dumps(note)})
    with pytest.raises(CheckpointError, match=message):
        read_encoder(tmp_path / "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"std": (1.0, 0.0, 1.0)}, r"std \(=\(1.0, 0.0, 1.0\)\) must be 3 finite numbers above 0"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "mean .* must be 3 finite numbers"),
        ({"mean": (0.5,)}, "mean .* must be 3 finite numbers"),
        ({"encoder": "teacher"}, r"encoder \(='teacher'\) must be 'target', 'context' or null"),
    ],
)
def test_a_provenance_that_cannot_be(value, message):
    with pytest.raises(ValueError, match=message):
        Provenance(**{"encoder": None, "source": "x", **value})
    with pytest.raises(ValueError, match="sizes must be ints"):
        Architecture(image_size=(32, 32), patch_size=8, embed_dim=8, depth=True, num_heads=1, mlp_hidden=1)


@pytest.fixture
def short_of_space():
    """Files may have 20 kB: a write beyond fails as on a full disk, with another number of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", ["official", "jepa_kit", *OF_ONE, "onnx with data"])
def test_a_full_disk_leaves_nothing(released, tmp_path, monkeypatch, short_of_space, format):
    if format == "onnx with data":
        monkeypatch.setattr(ours, "LARGE", 1000)
        format = "onnx"
    with pytest.raises(OSError, match="a could not be written, and has been removed: File too large") as failed:
        convert(released, tmp_path / "a", to=format, num_heads=HEADS)
    assert failed.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_graph_are_not_overwritten(make_weights, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(ours, "LARGE", 1000)
    (tmp_path / "a.onnx.data").write_text("mine")
    with pytest.raises(FileExistsError, match=r"a.onnx.data, for the weights of a.onnx, already exists"):
        write(make_weights(), tmp_path / "a.onnx", "onnx")
    assert (tmp_path / "a.onnx.data").read_text() == "mine"
