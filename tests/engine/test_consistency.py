"""Processes of one run that were given different configs, data or code: an error on all of them, and no hang."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_cases import launch
from ranks import free_port

from jepa_kit.config import config_from_dict
from jepa_kit.distributed.collectives import process_group
from jepa_kit.engine import consistency
from jepa_kit.engine.build import open_together
from jepa_kit.engine.checkpoint.resume import FREE
from jepa_kit.engine.consistency import MAY_DIFFER, check_command, code_version, differences, flatten
from jepa_kit.tools import make_shards

ROOT = Path(__file__).parents[2]
MUST_AGREE = {
    "optim.lr=0.002": "0.002",
    "train.seed=1": "1",
    "target_update.momentum=[0.5, 1.0]": "0.5",
    "masker={name: random, ratio: 0.6}": "'random'",
    "train.batch_size=2": "2",
    "train.epochs=3": "3",
    "train.log_every=2": "2",
    "checkpoint.every=2": "2",
    "evaluate.every=2": "2",
    "train.parallel=fsdp": "'fsdp'",
    "train.on_nonfinite=skip": "'skip'",
    "train.output_dir=elsewhere": "'elsewhere'",
}
MAY = ("data.num_workers=1", "data.prefetch=1", "data.cache=cache", "data.cache_gb=1.0", "train.device=auto")


def refused(do):
    try:
        do()
    except ValueError as error:
        return str(error)
    return None


def one_rank(world, config, shards, other, same_size, out):
    """Rank 1 has other settings, one after another; then other data, a broken folder, and other code."""
    raw = config.to_dict()

    def mine(override):
        return config_from_dict(raw, [override] if world.rank == 1 else [])

    with process_group(world, torch.device("cpu")):
        for override, value in MUST_AGREE.items():
            message = refused(lambda override=override: check_command(mine(override), {"resume": False}))
            assert message is not None, override
            key = override.partition("=")[0].replace("{name", "")
            assert f"{key}" in message, message
            assert f"{value} on rank 1" in message, message
            assert "on rank 0" in message
        for override in MAY:
            assert refused(lambda override=override: check_command(mine(override), {"resume": False})) is None
        message = refused(lambda: check_command(config, {"resume": world.rank == 1}))
        assert "command.resume: False on rank 0, True on rank 1" in message
        consistency.sources_digest = lambda: f"digest of {world.rank}"
        message = refused(lambda: check_command(config, {}))
        assert "code.sources: 'digest of 0' on rank 0, 'digest of 1' on rank 1" in message

        assert refused(lambda: open_together(config, shards)) is None
        message = refused(lambda: open_together(config, other if world.rank else shards))
        assert "shards.samples: 20 on rank 0, 8 on rank 1" in message, message
        message = refused(lambda: open_together(config, same_size if world.rank else other))
        assert "shards.digest: " in message, message
        assert "shards.samples" not in message, message
        message = refused(lambda: open_together(config, f"{shards}/none" if world.rank else shards))
        assert "none" in message
    (out / f"rank_{world.rank}").touch()


@pytest.mark.integration
def test_ranks_that_differ(tiny, shards, tmp_path):
    other, out = tmp_path / "other", tmp_path / "out"
    out.mkdir()
    same_size = tmp_path / "same_size"
    for seed, folder in enumerate((other, same_size)):
        made = ["synthetic:scenes", str(folder), "--num-scenes", "8", "--image-size", "16", "--workers", "1"]
        assert make_shards.main([*made, "--seed", str(seed)]) == 0
    launch(2, one_rank, tiny(), shards, other, same_size, out)
    assert len(list(out.iterdir())) == 2


TOOL = """
import os, sys
from jepa_kit.tools.train_net import main
sys.exit(main([*sys.argv[1:], *(["train.epochs=3"] if os.environ["RANK"] == "1" else [])]))
"""


@pytest.mark.integration
def test_the_tool_ends_with_status_2_on_all_ranks(tiny, tmp_path):
    (tmp_path / "tool.py").write_text(TOOL)
    (tmp_path / "config.yaml").write_text(tiny().to_yaml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tool.py", "--config-file", "config.yaml"]
    with free_port() as port:
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], printed
    for rank, text in enumerate(printed):
        assert f"train_net.py (rank {rank}): the processes of this run must agree, but these differ:" in text
        assert "train.epochs: 2 on rank 0, 3 on rank 1" in text
    assert not (tmp_path / "run").exists()


def test_the_line_names_few_ranks_first():
    facts = [{"a": 1, "b": [1]} for _ in range(12)]
    facts[3] = {"a": 2, "b": [1]}
    facts[5] = {"b": [1], "c": None}
    assert differences(facts) == [
        "a: 2 on rank 3, (not set) on rank 5, 1 on rank 0, 1, 2, 4, 6, 7, 8, 9 and 2 more",
        "c: None on rank 5, (not set) on rank 0, 1, 2, 3, 4, 6, 7, 8 and 3 more",
    ]
    assert differences(facts[:3]) == []


def test_what_may_differ_are_options(tiny):
    config = tiny().to_dict()
    for key in MAY_DIFFER:
        section, option = key.split(".")
        assert option in config[section], key
    assert {"train.log_every", "checkpoint.every", "evaluate.every"} <= FREE - MAY_DIFFER


def test_flatten():
    assert flatten({"a": {"b": (1, {"c": 2}), "d": []}, "e": None}) == {
        "a.b[0]": 1,
        "a.b[1].c": 2,
        "a.d": [],
        "e": None,
    }


def test_the_code_of_imports_counts(tiny, tmp_path):
    """A file at another path on another machine is the same code; another text is not."""
    files = [tmp_path / name / "part.py" for name in "abc"]
    for file, text in zip(files, ("x = 1", "x = 1", "x = 2"), strict=True):
        file.parent.mkdir()
        file.write_text(text)
    found = [code_version(dataclasses.replace(tiny(), imports=(str(file),))) for file in files]
    assert found[0] == found[1]
    assert differences(list(map(flatten, itertools.chain(found[1:]))))[0].startswith("imports.part.py: ")
    assert code_version(dataclasses.replace(tiny(), imports=("json",)))["imports"]["json"]
