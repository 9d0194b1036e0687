"""Whole runs on a device against a run on the CPU: the same bodies on a CPU, where they prove themselves, and on CUDA.

The reference is a float32 run on the CPU with attention by plain products, unless a test names another.
"""

import math
import os
import shutil
import subprocess
import sys

import one_rank_cases
import pytest
import torch

from jepa_kit import load_encoder
from jepa_kit.data.device import to_device
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.collectives import World
from jepa_kit.encoders import compiled
from jepa_kit.engine.build import build_run
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.step import train_step
from jepa_kit.interop.formats import convert
from jepa_kit.structures import View
from jepa_kit.training import train

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ALSO = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
"""For what other tests see on a CPU already: there it shows that the test itself is right."""
STILL = "encoder.drop_path=0.0"
"""Stochastic depth is drawn on the device, and devices draw other numbers."""


def column(folder, name="loss"):
    """A quantity of each step of a run."""
    return [line[name] for line in read_metrics(folder) if name in line]


@pytest.fixture
def run(tiny, tmp_path):
    """Trains six steps on a device in a folder of its own, and returns the folder."""

    def go(device, *overrides, resume=False, name=None):
        folder = tmp_path / (name or f"run{len(list(tmp_path.iterdir()))}")
        config = tiny(STILL, f"train.device={device}", f"train.output_dir={folder}", *overrides)
        return train(config, resume=resume)

    return go


@pytest.fixture
def reference(run):
    return column(run("cpu", "train.attention=reference"))


@DEVICES
def test_six_steps_have_the_losses_of_a_cpu(device, run, reference):
    folder = run(device)
    assert len(reference) == 6
    assert column(folder) == pytest.approx(reference, rel=1e-5)
    assert {value.device.type for value in load_checkpoint(folder).model.values()} == {"cpu"}


@DEVICES
def test_six_steps_in_bf16_are_close(device, run, reference):
    losses = column(run(device, "train.precision=bf16"))
    assert losses == pytest.approx(reference, rel=2e-2)
    assert losses != pytest.approx(reference, rel=1e-6), "nothing was rounded"


@ALSO
def test_a_resumed_run_goes_on_as_the_whole_one(device, run, tmp_path):
    whole = run(device)
    (tmp_path / "again").mkdir()
    shutil.copy(checkpoints(whole)[0], tmp_path / "again")  # of step 3
    again = run(device, resume=True, name="again")
    close = 0 if device == "cpu" else 1e-5  # sums on CUDA have no fixed order (docs/faults.md)
    assert column(again) == pytest.approx(column(whole)[3:], rel=close)
    first, second = (load_checkpoint(folder).model for folder in (whole, again))
    assert one_rank_cases.share_apart(first, second) <= (0 if device == "cpu" else 1e-3)


@ALSO
def test_accumulation_changes_no_loss(device, run, reference):
    assert column(run(device, "train.accumulate=2")) == pytest.approx(reference, rel=1e-5)


@ALSO
def test_checkpointed_activations_draw_the_same_numbers(device, run):
    """With stochastic depth: what is computed again must be what was computed first."""
    dropping = ("encoder.drop_path=0.3", "predictor.drop_path=0.3")
    wanted = column(run(device, *dropping))
    assert column(run(device, *dropping, "train.activation_checkpointing=true")) == pytest.approx(wanted, rel=1e-5)


@ALSO
def test_compiled_blocks_are_compiled_a_few_times_and_never_left(device, run, reference, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses = column(run(device, "encoder.compile=true", "predictor.compile=true"))
    assert losses == pytest.approx(reference, rel=1e-4 if device == "cuda" else 1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert not counters["graph_break"]
    assert not counters["unimplemented"]
    torch._dynamo.reset()


@ALSO
def test_the_target_encoder_is_the_average(device, tiny):
    """Against the average in float64, from the encoder's weights after each step."""
    made = build_run(tiny(f"train.device={device}"), World(), torch.device(device))
    target = {name: p.detach().cpu().double() for name, p in made.jepa.target_encoder.named_parameters()}
    for step, batch in to_device(made.loader.batches(0), made.device, prefetch=2):
        images = normalize(batch.images, made.config.data.mean, made.config.data.std)
        hyper = made.schedule(step)
        train_step(made.jepa, made.optimizer, hyper, [View(images, batch.masks)])
        for name, p in made.jepa.encoder.named_parameters():
            target[name].lerp_(p.detach().cpu().double(), 1 - hyper.momentum)
        if step == 2:
            break
    for name, p in made.jepa.target_encoder.named_parameters():
        assert p.device.type == device
        torch.testing.assert_close(p.detach().cpu().double(), target[name], rtol=1e-5, atol=1e-7)


@ALSO
def test_health_inside_a_run(device, run):
    evaluate = ("evaluate.every=3", "evaluate.samples=16")
    wanted = read_metrics(run("cpu", *evaluate, "train.attention=reference"))
    found = read_metrics(run(device, *evaluate))
    names = {name for name in wanted[2] if name.startswith("eval/")} - {"eval/seconds"}
    assert len(names) > 3
    for step in (2, 5):
        for name in names:
            if isinstance(wanted[step][name], float) and math.isfinite(wanted[step][name]):
                assert found[step][name] == pytest.approx(wanted[step][name], rel=1e-3, abs=1e-4), name


@DEVICES
def test_batches_of_a_worker_are_those_of_this_process(device, run, reference):
    """On CUDA they come out of pinned memory and are copied beside the steps."""
    losses = column(run(device, "data.num_workers=1", "data.prefetch=2"))
    assert losses == pytest.approx(reference, rel=1e-5)


@ALSO
@pytest.mark.parametrize(("format", "package"), [("safetensors", None), ("hf", None), ("onnx", "onnx")])
def test_weights_of_a_run_leave_in_other_formats(device, format, package, run, tmp_path):
    if package:
        pytest.importorskip(package)
    folder = run(device)
    path = tmp_path / {"safetensors": "e.safetensors", "hf": "e", "onnx": "e.onnx"}[format]
    convert(folder, path, to=format)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = (load_encoder(source) for source in (folder, path))
    torch.testing.assert_close(theirs.embed(images), ours.embed(images), rtol=0, atol=1e-6)
    on_device = ours.to(device).embed(images.to(device))
    torch.testing.assert_close(on_device.cpu(), theirs.embed(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "backend"),
    [pytest.param("cpu", "gloo", marks=pytest.mark.slow), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)],
)
def test_one_rank_under_torchrun(device, backend, tmp_path, repository):
    """DDP and FSDP2, whole batches and parts, have the numbers of a model without either."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*torchrun, one_rank_cases.__file__, device]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{backend}: 4 forms agree" in done.stdout
