"""Seeded damage to checkpoints, files and shards, gives an error that names the file, or the state as written."""

import os
import random
import zipfile

import pytest
import torch
from torch import nn

from jepa_kit.engine.checkpoint.dcp import save_sharded
from jepa_kit.engine.checkpoint.files import FORMAT, checksum, verify
from jepa_kit.engine.checkpoint.format import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from jepa_kit.engine.checkpoint.state_dict import state_of
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.errors import CheckpointError
from jepa_kit.files import write_archive
from jepa_kit.run_folder import HEADER

ABOUT = {"step": 3, "config": {"a": {"b": [1]}}, "versions": {"torch": "2"}, "data": {"samples": 4}}


def run():
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(2, 3), "predictor": nn.Linear(3, 2)})
    optimizer = build_optimizer(model)
    model["predictor"](model["encoder"](torch.randn(4, 2))).square().mean().backward()
    optimizer.step()
    return model, optimizer


def in_one_file(folder):
    model, optimizer = state_of(*run())
    return save_checkpoint(folder, Checkpoint(model=model, optimizer=optimizer, **ABOUT))


def in_shards(folder):
    path = checkpoint_path(folder, ABOUT["step"], sharded=True)
    save_sharded(path, *state_of(*run()))
    files = {file.name: [file.stat().st_size, checksum(file)] for file in sorted(path.iterdir())}
    write_archive({"format": FORMAT, **ABOUT, "origin": {}, "position": {}, "files": files}, path / HEADER)
    return path


def damaged(content, chance):
    """Return a copy that is cut short, has bits or a byte near its end changed, or a part overwritten or removed."""
    content = bytearray(content)
    at = chance.randrange(len(content))
    match chance.randrange(5):
        case 0:
            del content[at:]
        case 1:
            for _ in range(chance.randint(1, 3)):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        case 2:
            content[chance.randrange(len(content) // 2, len(content))] = chance.randrange(256)
        case 3:
            content[at : at + chance.randint(1, 600)] = bytes(chance.randint(1, 600))
        case 4:
            del content[at : at + chance.randint(1, 600)]
    return bytes(content)


def same(first, second):
    """Compare tensors bit by bit, and everything else."""
    names = set(Checkpoint.__dataclass_fields__) - {"model", "optimizer"}
    torch.testing.assert_close(first.model, second.model, rtol=0, atol=0)
    torch.testing.assert_close(first.optimizer, second.optimizer, rtol=0, atol=0)
    return all(getattr(first, name) == getattr(second, name) for name in names)


@pytest.mark.parametrize("make", [in_one_file, in_shards])
def test_damage_is_named_or_harmless(tmp_path, make):
    path = make(tmp_path)
    wanted = load_checkpoint(path)
    files = [path] if path.is_file() else sorted(path.iterdir())
    messages = []
    for file in files:
        whole, chance = file.read_bytes(), random.Random(file.name)
        for _ in range(400 // len(files)):
            file.write_bytes(damaged(whole, chance))
            try:  # bytes of a zip archive that nothing depends on are harmless
                assert same(load_checkpoint(path), wanted)
            except CheckpointError as error:
                messages.append(str(error))
        file.write_bytes(whole)
    assert len(messages) > 250
    assert all(str(path) in message for message in messages)


def test_every_rank_verifies_its_files_up_to_the_last(tmp_path):
    path = in_shards(tmp_path)
    names = [name for name in sorted(os.listdir(path)) if name != HEADER]
    assert len(names) >= 2
    for number, name in enumerate(names):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1])
        for size in (1, 2, len(names), len(names) + 1):
            for rank in range(size):
                if rank == number % size:
                    with pytest.raises(CheckpointError, match=rf"{name} \(\d+ bytes\) is cut short"):
                        verify(path, rank=rank, size=size)
                else:
                    verify(path, rank=rank, size=size)
        (path / name).write_bytes(whole)


@pytest.mark.parametrize("files", [None, {"a": 1}, {"../a": [1, 2]}, {3: [1, 2]}, {"a": [1, 2, 3]}, {"a": ["1", 2]}])
def test_a_header_without_sizes_and_checksums(tmp_path, files):
    path = in_shards(tmp_path)
    write_archive({"format": FORMAT, **ABOUT, "files": files}, path / HEADER)
    with pytest.raises(CheckpointError, match="it names no files with sizes and checksums"):
        load_checkpoint(path)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = in_one_file(tmp_path)

    def fails(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fails)
    with pytest.raises(CheckpointError, match=r"checkpoint_00000003.pt cannot be read: Input/output error"):
        load_checkpoint(path)
