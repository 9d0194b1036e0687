import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.encoders import ViT
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.planning import planner
from jepa_kit.planning.device_specs import DEVICES
from jepa_kit.planning.flops import Lengths, count_flops, model_flops
from jepa_kit.planning.memory import kept_by_an_image, training_memory
from jepa_kit.planning.planner import Assumptions, describe, draw_lengths, plan_run, table
from jepa_kit.registry import ENCODERS

CONFIGS = sorted((Path(__file__).parents[2] / "projects" / "ijepa" / "configs").glob("*.yaml"))
H14 = next(file for file in CONFIGS if file.stem == "released_in1k_vith14")


@pytest.fixture
def config():
    def make(*overrides):
        raw = {
            "masker": {"name": "multiblock"},
            "encoder": {"name": "vit", "embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4},
            "predictor": {"name": "vit", "width": 32, "depth": 2, "num_heads": 2},
            "target": {"name": "representation"},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": "ema"},
            "data": {"image_size": 32},
            "optim": {"warmup_epochs": 1},
            "train": {"batch_size": 64, "epochs": 10},
        }
        return config_from_dict(raw, overrides)

    return make


def given(**options):
    return Assumptions(**{"device": DEVICES["h200"], "samples": 1000, **options})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_has_a_plan(file, monkeypatch):
    """Without memory for its weights."""
    monkeypatch.setattr(planner, "DRAWN", 16)
    monkeypatch.setattr(planner, "kept_by_an_image", partial(kept_by_an_image, images=1))
    monkeypatch.setattr("jepa_kit.planning.flops.count_flops", partial(count_flops, images=1))
    config = load_config(file, ["train.batch_size=16"])
    (plan,) = plan_run(config, [2], given(samples=10_000))
    assert plan.gpu_hours > 0
    assert set(plan.fits) == {"DDP", "DDP, checkpointed", "FSDP", "FSDP, checkpointed"}
    totals = [memory["total"] for memory in plan.memory.values()]
    assert totals[0] > totals[1] > totals[3]


def test_time_is_operations_over_speed(config):
    held = config()
    (plan,) = plan_run(held, [4], given(peak_share=0.25, bytes_per_image=1e5, decode_ms=8.0))
    jepa, lengths = build_recipe(held), draw_lengths(held, 16)
    assert lengths.images == planner.DRAWN
    an_image = model_flops(jepa).training(lengths) / lengths.images
    assert plan.workload.steps == 10 * (1000 // 64)
    assert plan.workload.flop == pytest.approx(150 * 64 * an_image)
    assert plan.step_seconds == pytest.approx(64 * an_image / (4 * 989e12 * 0.25))
    assert plan.gpu_hours == pytest.approx(plan.workload.flop / (989e12 * 0.25) / 3600)
    assert plan.hours == pytest.approx(plan.gpu_hours / 4)
    assert plan.read_mb_per_second == pytest.approx(plan.images_per_second / 10)
    assert plan.decode_cores == pytest.approx(plan.images_per_second * 0.008)
    assert plan.workload.parameters["encoder"] == sum(p.numel() for p in jepa.encoder.parameters())


def test_what_the_network_carries(config):
    """A ring: each device sends (N - 1) / N of a tensor to scatter it, and as much to gather it."""
    held = config()
    jepa = build_recipe(held)
    encoder, predictor = (4 * sum(p.numel() for p in m.parameters()) for m in (jepa.encoder, jepa.predictor))
    (plan,) = plan_run(held, [4], given())
    sent = {name: speed * plan.step_seconds * 1e9 for name, speed in plan.network_gb_per_second.items()}
    assert sent["DDP"] == pytest.approx(2 * 0.75 * (encoder + predictor))
    assert sent["FSDP"] == pytest.approx(0.75 * (3 * (encoder + predictor) + encoder))
    (alone,) = plan_run(held, [1], given())
    assert alone.network_gb_per_second == {}
    assert set(alone.memory) == {"one process", "one process, checkpointed"}


def test_accumulation_needs_less_memory(config):
    whole, parts = (plan_run(config(f"train.accumulate={n}"), [1], given())[0] for n in (1, 4))
    kept = [plan.memory["one process"]["activations"] for plan in (whole, parts)]
    assert kept[0] == pytest.approx(4 * kept[1], rel=1e-3)
    assert whole.step_seconds == parts.step_seconds


def test_the_released_masks_hang_on_the_images_of_a_process(config):
    """Contexts are cut to the shortest of a process's batch."""
    released = ["masker.truncation=released", "masker.size_per=batch"]
    few, many = (draw_lengths(config(*released), part).context.mean() for part in (2, 64))
    assert many < few
    assert draw_lengths(config(), 2).context.mean() == pytest.approx(
        draw_lengths(config(), 64).context.mean(), rel=1e-12
    )


def test_steps_of_an_epoch_may_be_given(config):
    (plan,) = plan_run(config("train.steps_per_epoch=7"), [1], given())
    assert plan.workload.steps == 70


def test_the_papers_run():
    """ViT-H/14 took under 72 hours on 16 A100 (section 1): a fifth of their peak, or more."""
    (plan,) = plan_run(load_config(H14), [16], Assumptions(device=DEVICES["a100"], samples=1_281_167, peak_share=1.0))
    assert plan.workload.steps == 187_500
    assert 0.15 < plan.gpu_hours / (16 * 72) < 0.3
    assert plan.fits["DDP"]  # as it was run
    by_hand = 2 * 630e6 * 256 / 1e9  # two operations a weight and patch: all but attention's products
    assert plan.workload.gflop_per_image["target encoder"] == pytest.approx(by_hand, rel=0.05)


@pytest.mark.parametrize(
    ("gpus", "overrides", "options", "message"),
    [
        ([0], [], {}, r"gpus \(=0\) must be at least 1"),
        ([3], [], {}, r"train.batch_size \(=64\) must be divisible by gpus \(=3\)"),
        ([1], [], {"samples": 63}, r"train.batch_size \(=64\) must be at most the data set's 63 samples"),
        ([1], [], {"samples": 0}, r"samples \(=0\) must be above 0"),
        ([1], [], {"peak_share": 1.1}, r"peak_share \(=1.1\) must be above 0 and at most 1"),
        ([1], [], {"peak_share": 0.0}, r"peak_share \(=0.0\) must be above 0 and at most 1"),
        ([1], [], {"bytes_per_image": float("nan")}, r"bytes_per_image \(=nan\) must be above 0 and finite"),
        ([1], [], {"decode_ms": float("inf")}, r"decode_ms \(=inf\) must be above 0 and finite"),
        ([2], ["train.accumulate=5"], {}, r"divisible by gpus \(=2\) times train.accumulate \(=5\)"),
        ([1], [], {"decode_ms": -1.0}, r"decode_ms \(=-1.0\) must be above 0"),
    ],
)
def test_what_cannot_be_planned(config, gpus, overrides, options, message):
    with pytest.raises(ValueError, match=message):
        plan_run(config(*overrides), gpus, given(**options))


def test_what_people_read(config):
    assumptions = given(decode_ms=5.0)
    plans = plan_run(config(), [1, 8], assumptions)
    text = describe(plans[1], assumptions)
    assert text.startswith("8 x NVIDIA H200 SXM, 8 images each, at 40% of 989 TFLOP/s (bf16)\n")
    for word in (
        "parameters ",
        "an image ",
        "GPU hours",
        "shards of 256 MB",
        "cores to decode",
        "network ",
        "FSDP, chec",
    ):
        assert word in text
    assert "network" not in describe(plans[0], assumptions)
    lines = table(plans).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    json.dumps(asdict(plans[1]))


def test_lengths_are_those_of_the_masks(config):
    masks = build_masker(config())(np.arange(5), seed=0, epoch=0)
    lengths = Lengths.of(masks, 5)
    assert lengths.patches == 64
    assert lengths.context.sum() == len(masks.context.index)
    assert torch.equal(torch.from_numpy(lengths.sequences), lengths_of_sequences(masks))


def lengths_of_sequences(masks):
    context = torch.tensor(masks.context.lengths.on_host)[masks.context_of]
    return context + torch.tensor(masks.targets.lengths.on_host)


class TwiceAsDeep(ViT):
    """Runs its blocks twice, of which the formula of ViT knows nothing."""

    def forward(self, images, patches=None):
        return super().forward(images, patches) + super().forward(images, patches)


def test_networks_without_a_formula(config, monkeypatch):
    """FLOP are counted, and the values that are kept for the backward pass are measured."""
    monkeypatch.setattr(ENCODERS, "_obj_map", dict(ENCODERS._obj_map))
    ENCODERS.register("twice")(TwiceAsDeep)
    held = config("encoder={name: twice, embed_dim: 48, depth: 3, num_heads: 3, patch_size: 4}")
    (plan,) = plan_run(held, [2], given())
    counted = count_flops(held, torch.device("cpu"))
    assert plan.workload.gflop_per_image["training step"] == counted / 1e9
    (usual,) = plan_run(config(), [2], given())
    assert 1.2 < plan.gpu_hours / usual.gpu_hours < 2
    assert plan.workload.parameters == usual.workload.parameters
    assert plan.network_gb_per_second.keys() == usual.network_gb_per_second.keys()
    assert "encoder" not in plan.workload.gflop_per_image
    assert plan.measured
    assert "values kept are those of a trial on this machine" in describe(plan, given()).splitlines()[-1]
    assert table([plan]).splitlines()[-1].endswith("  DDP")


THREE = "target={name: representation, layers: 3, combine: concat}"


@pytest.mark.parametrize(
    "overrides",
    [[], [THREE], ["target_update={name: tied, stop_gradient: false}", THREE]],
    ids=["one layer", "three layers", "three trained layers"],
)
def test_measured_activations_are_those_of_the_formula(config, overrides):
    """What torch saves in a trial, against the formula, which test_memory_of_runs.py compares with another count."""
    held = config(*overrides)
    jepa, lengths = build_recipe(held), draw_lengths(held, 64)
    for again in (False, True):
        formula = training_memory(jepa, lengths, precision="float32", checkpointing=again).activations / lengths.images
        assert kept_by_an_image(held, precision="float32", checkpointing=again) == pytest.approx(formula, rel=0.2)


def test_a_part_that_breaks_its_contract_is_not_planned(config, monkeypatch):
    class Broken(TwiceAsDeep):
        def forward(self, images, patches=None):
            return super().forward(images, patches) * float("nan")

    monkeypatch.setattr(ENCODERS, "_obj_map", dict(ENCODERS._obj_map))
    ENCODERS.register("broken")(Broken)
    with pytest.raises(ValueError, match="encoder 'broken' gave values that are not finite"):
        plan_run(config("encoder={name: broken, patch_size: 4, embed_dim: 48, depth: 3, num_heads: 3}"), [2], given())
