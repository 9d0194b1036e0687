import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from jepa_kit import precision as module
from jepa_kit.config import load_config
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.planning.device_specs import DEVICES
from jepa_kit.planning.planner import Assumptions, plan_run
from jepa_kit.precision import autocast_of, choose_precision, faster_on_cpu, products_in
from jepa_kit.training import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def measured(monkeypatch):
    """Sets the seconds that each precision takes."""

    def take(**seconds):
        faster_on_cpu.cache_clear()
        monkeypatch.setattr(module, "_seconds", lambda width, precision: seconds[precision])

    yield take
    faster_on_cpu.cache_clear()


def test_a_forward_pass_in_the_precision_of_the_run():
    product = torch.ones(2, 2)
    for precision, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        for _ in range(2):  # each call makes a context of its own
            with autocast_of(precision, CPU)():
                assert (product @ product).dtype == dtype


@pytest.mark.parametrize(("seconds", "chosen"), [((1.0, 0.9), "bf16"), ((0.9, 1.0), "float32")])
def test_auto_on_a_cpu_is_the_faster_one(measured, seconds, chosen):
    measured(float32=seconds[0], bf16=seconds[1])
    assert choose_precision(CPU) == chosen


def test_the_measurement_leaves_random_numbers_and_threads():
    faster_on_cpu.cache_clear()
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    with torch.no_grad():  # whatever the caller has
        assert choose_precision(CPU, 96) in ("float32", "bf16")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.integration
def test_a_restricted_instruction_set_is_seen():
    """bf16 is emulated on AVX2, and wins with AMX. With AVX-512 bf16 alone it depends on the CPU: docs/faq.md."""
    code = "import torch; from jepa_kit.precision import choose_precision as c; print(c(torch.device('cpu')))"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cases = [({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "float32")] if "avx2" in flags else []
    cases += [({}, "bf16")] if "amx_bf16" in flags else []
    for variables, expected in cases:
        done = subprocess.run(
            [sys.executable, "-c", code], env=module_environment(variables), capture_output=True, text=True, timeout=600
        )
        assert done.stdout.strip() == expected, (variables, done.stderr)


def module_environment(variables):
    kept = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables


@pytest.mark.parametrize(("has_it", "chosen"), [(True, "bf16"), (False, "float32")])
def test_auto_on_cuda_depends_on_the_card(monkeypatch, has_it, chosen):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it and not including_emulation)
    assert choose_precision(CUDA) == chosen


def test_what_auto_became_is_stored_and_kept(tiny, measured):
    measured(float32=2.0, bf16=1.0)
    folder = train(tiny("train.precision=auto", "train.steps_per_epoch=1"))
    assert load_config(folder).train.precision == "bf16"
    assert load_checkpoint(folder).config["train"]["precision"] == "bf16"
    measured(float32=1.0, bf16=2.0)  # another machine
    train(tiny("train.precision=auto", "train.steps_per_epoch=1"), resume=True)
    assert load_config(folder).train.precision == "bf16"
    with pytest.raises(ValueError, match=r"train.precision: 'bf16' in the checkpoint, 'float32' now"):
        train(tiny("train.precision=float32", "train.steps_per_epoch=1"), resume=True)


RANKS = """
import os, sys, torch
from jepa_kit.config import load_config
from jepa_kit import precision
from jepa_kit.distributed.collectives import process_group, read_environment
world = read_environment()
precision.faster_on_cpu = lambda width: "bf16" if world.rank == 0 else "float32"
config = load_config(sys.argv[1], ["train.precision=auto"])
cpu = torch.device("cpu")
with process_group(world, cpu):
    assert precision.resolve_precision(config, cpu).train.precision == "bf16"
"""


@pytest.mark.integration
def test_rank_0_decides_for_all(tiny, tmp_path, ranks):
    (tmp_path / "ranks.py").write_text(RANKS)
    ranks(2, tmp_path / "ranks.py", tiny().save(tmp_path / "config"))


def test_tf32_needs_cuda(tiny):
    with pytest.raises(ValueError) as error:
        train(tiny("train.precision=tf32"))
    assert str(error.value) == (
        "train.precision (='tf32') needs a CUDA device of compute capability 8.0 or above, but the run is on cpu: "
        "'auto', 'bf16' or 'float32' work there"
    )


def test_tf32_needs_a_recent_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"but the run is on cuda:0"), products_in("tf32", CUDA):
        pass


@pytest.mark.parametrize(("precision", "flags"), [("tf32", ("high", True)), ("float32", ("highest", False))])
def test_flags_of_float32_products_on_cuda(monkeypatch, precision, flags):
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    before = now()
    with products_in(precision, CUDA):
        assert now() == flags
    assert now() == before
    with products_in("bf16", CUDA):
        assert now() == before


def test_a_plan_takes_auto_for_bf16(tiny):
    given = Assumptions(device=DEVICES["h100"], samples=1000)
    plans = [plan_run(tiny(f"train.precision={name}"), [1], given) for name in ("auto", "bf16")]
    assert plans[0] == plans[1]
