"""What a file is by its content, and every way in which it can be something else; downloads."""

import functools
import hashlib
import http.server
import json
import pickle
import shutil
import threading

import pytest
import torch
from iopath.common.file_io import HTTPURLHandler, PathManager

from jepa_kit.errors import CheckpointError
from jepa_kit.interop import files
from jepa_kit.interop.files import fetch, open_archive, recognise
from jepa_kit.interop.formats import read_encoder
from jepa_kit.interop.frozen import load_encoder


class Hostile:
    """A pickle that runs a command when it is read."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def test_each_format_is_recognised(converted):
    assert {format: recognise(path) for format, path in converted.items()} == {format: format for format in converted}


def test_names_count_for_nothing(converted, tmp_path):
    for format in ("official", "jepa_kit", "timm", "safetensors", "onnx"):
        (tmp_path / "weights.bin").write_bytes(converted[format].read_bytes())
        assert recognise(tmp_path / "weights.bin") == format


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x \(0 bytes\) is empty"),
        (b"\n <!DOCTYPE html><html>", r"x \(\d+ bytes\) is a web page, not weights: the URL is that of a page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a git-lfs pointer, not the weights: run `git lfs pull`",
        ),
        (pickle.dumps({"encoder": 1}), "is a bare pickle, which can run code when it is read, and is rejected"),
        (b"GGUF....", r"has none of the formats official, jepa_kit, .*: it begins with b'GGUF....'"),
        (b"PK\x03\x04 and no more", "is cut short: its end is missing"),
        ((50).to_bytes(8, "little") + b"{not json", "is cut short: it has 17 bytes, but its header has 50"),
        ((9).to_bytes(8, "little") + b"{not json", "begins like a safetensors file, but its header is damaged"),
        ((12).to_bytes(8, "little") + b'{"a": [1,2]}', "begins like a safetensors file, but its header is damaged"),
    ],
)
def test_what_is_not_weights(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_encoder(tmp_path / "x")


@pytest.mark.parametrize("format", ["official", "jepa_kit", "timm", "safetensors", "onnx"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_file_cut_short(converted, tmp_path, format, share):
    whole = converted[format].read_bytes()
    (tmp_path / "x").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"is cut short|is damaged"):
        read_encoder(tmp_path / "x")


@pytest.mark.parametrize("kind", ["archive", "bare", "inside"])
def test_code_in_a_pickle_is_not_run(tmp_path, kind, released_content):
    trace = tmp_path / "trace"
    hostile = Hostile(f"touch {trace}")
    if kind == "bare":
        (tmp_path / "x").write_bytes(pickle.dumps(hostile))
        message = "is a bare pickle, which can run code"
    else:
        torch.save({**released_content, "loss": hostile} if kind == "inside" else hostile, tmp_path / "x")
        message = r"contains more than tensors and plain values, which could run code, and is rejected: .*system"
    with pytest.raises(CheckpointError, match=message):
        load_encoder(tmp_path / "x")
    assert not trace.exists()


def test_archives_of_other_things(tmp_path):
    torch.save([1, 2], tmp_path / "x")
    with pytest.raises(CheckpointError, match="must contain a mapping of names to tensors, not a list"):
        open_archive(tmp_path / "x")


def test_a_zip_that_torch_did_not_write(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match="is damaged, or not a checkpoint: "):
        recognise(tmp_path / "x")


def test_folders_of_other_things(tmp_path):
    with pytest.raises(CheckpointError, match=r"is neither a run folder .* nor one of transformers \(config.json\)"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(CheckpointError, match=r"model_type \(='swin'\) must be one of ijepa, vit_mae"):
        load_encoder(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere.pt"):
        load_encoder(tmp_path / "nowhere.pt")


def test_a_note_that_is_damaged(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x", {"jepa_kit": '{"architecture": 3}'})
    with pytest.raises(CheckpointError, match="the file's note 'jepa_kit' is damaged"):
        load_encoder(tmp_path / "x")


@pytest.fixture
def served(converted, tmp_path, monkeypatch):
    """The address of a folder with the weights, and iopath's cache in tmp_path."""
    monkeypatch.setenv("IOPATH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    monkeypatch.setattr(files, "path_manager", manager)
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    handler = functools.partial(quiet, directory=str(converted["safetensors"].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_with_its_checksum(served, converted, recorded):
    good = hashlib.sha256(converted["safetensors"].read_bytes()).hexdigest()
    encoder = load_encoder(f"{served}/a.safetensors", sha256=good.upper())
    found = encoder.forward_features(recorded["images"])
    assert (found - recorded["target_encoder_output"]).abs().max() < 1e-5
    path = fetch(f"{served}/a.safetensors")
    with pytest.raises(CheckpointError, match=f"has SHA-256 {good}, not {'0' * 64}: it is damaged, or another file"):
        load_encoder(f"{served}/a.safetensors", sha256="0" * 64)
    assert not path.exists()


def test_an_address_that_gives_nothing(served):
    with pytest.raises(CheckpointError, match=r"http://.*/nothing could not be downloaded: .*404"):
        load_encoder(f"{served}/nothing")


def test_what_lies_elsewhere_is_brought_here(converted, tmp_path, monkeypatch):
    """Any address that a handler of iopath takes, and the checkpoints of a run folder; but not those that are in it."""
    asked = []
    monkeypatch.setattr(files, "to_read", lambda named: asked.append(named) or converted["safetensors"])
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for folder in (elsewhere, run):
        folder.mkdir()
    shutil.copy(converted["jepa_kit"], run / "checkpoint_00000003.pt")
    assert fetch("bucket://a/b.safetensors") == fetch(elsewhere) == converted["safetensors"]
    assert fetch(run) == run
    assert asked == ["bucket://a/b.safetensors", str(elsewhere)]


def test_a_checksum_of_a_folder(converted):
    with pytest.raises(CheckpointError, match="is a folder, but sha256 is the checksum of one file"):
        load_encoder(converted["hf"], sha256="0" * 64)
