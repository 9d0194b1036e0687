"""CAPI: the check of the project on the recording, the recipe against plain maths, and two processes as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import capi_cases
import numpy as np
import pytest
import torch
from capi_cases import images, masks, recipe
from scipy.special import log_softmax
from torch import Tensor

from jepa_kit.config import load_config
from jepa_kit.engine.optimizer import optimizer_of
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.structures import View
from jepa_kit.trials.recorded import Report
from projects.capi import check

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests/fixtures/methods/capi"


def test_the_recording_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(FIXTURE), "--tolerance", "1e-13"]) == 0
    out = capsys.readouterr().out
    for quantity in ("call2: assignments", "call1: loss of the clusters", "call0: gradient", "clusters at the end"):
        assert f"\n{quantity} " in out
    assert "not read" not in out


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("target_temp", 0.07, "call0: assignments"),
        ("pred_temp", 0.1, "call0: loss of the clusters"),
        ("student_temp", 0.1, "call0: loss of the predictions"),
        ("n_sk_iter", 2, "call0: assignments"),
        ("positionwise_sk", False, "call0: assignments"),
        ("eps", {"sinkhorn": 1e-6}, "call0: assignments"),
        ("clustering_optimizer", "AdamW(lr 1e-3, betas (0.9, 0.95))", "clusters at the end"),
    ],
)
def test_another_setting_is_seen(altered: Any, key: str, value: Any, failed: str) -> None:
    report = Report()
    check.check(altered("capi", key, value), report)
    assert failed in report.failed


def test_clusters_without_a_bias() -> None:
    clusters = check.Clusters(
        3, 4, teacher_temperature=0.1, cluster_temperature=0.1, iterations=3, positionwise=True, bias=False
    )
    assert {name for name, _ in clusters.named_parameters()} == {"layer.weight"}


def plain_sinkhorn(scores: np.ndarray) -> np.ndarray:
    """Three iterations over [images, clusters]: clusters first, then images."""
    weights = np.exp(scores + 50 - scores.max(0))
    for _ in range(3):
        weights = weights / (weights.sum(0, keepdims=True) + 1e-8)
        weights = weights / (weights.sum(1, keepdims=True) + 1e-8)
    return weights


def test_the_loss_is_that_of_plain_maths() -> None:
    """Scores, assignments of each position and both cross entropies in numpy, from the tokens of the networks."""
    capi, view = recipe(), View(images(6), masks(6))
    out = capi(view)
    assert capi.target_encoder is not None
    tokens = capi.target_encoder(view.images).view(6, 16, -1).detach().numpy()
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    weight, bias = (x.detach().numpy() for x in (capi.clusters.layer.weight, capi.clusters.layer.bias))
    scores = unit @ weight.T + bias  # [B, N, K]
    assigned = np.stack([plain_sinkhorn(scores[:, n] / 0.06) for n in range(16)], axis=1)
    fit = -(assigned * log_softmax(scores / 0.12, axis=-1)).sum(-1).mean()
    assert out.terms["clusters"].item() == pytest.approx(fit, rel=1e-6)

    assert view.masks is not None
    predicted = capi.predictor(capi.encoder(view.images, view.masks.context), view.masks).detach().numpy()
    unit = predicted / np.linalg.norm(predicted, axis=-1, keepdims=True)
    prototypes = capi.head.weight.detach().numpy()
    unit = unit @ (prototypes / np.linalg.norm(prototypes, axis=-1, keepdims=True)).T
    rows = assigned[view.masks.targets.image_of_token, view.masks.targets.index]
    loss = -(rows * log_softmax(unit / 0.12, axis=-1)).sum(-1).mean()
    assert out.terms["cross_entropy"].item() == pytest.approx(loss, rel=1e-6)
    assert out.loss.item() == pytest.approx(fit + loss, rel=1e-6)
    entropy = -(rows * np.log(rows)).sum(-1).mean()
    assert out.figures["target_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert out.prediction is not None
    torch.testing.assert_close(out.prediction.target, torch.from_numpy(rows), rtol=0, atol=1e-7)
    torch.testing.assert_close(capi.predict(view).prediction, out.prediction.prediction)


def test_each_loss_moves_its_own_networks() -> None:
    """Clusters do not follow the predictions, nor the encoder the clusters."""
    view = View(images(6), masks(6))

    def gradients(weight: float) -> dict[str, Tensor]:
        capi = recipe(weight=weight)
        capi(view).loss.backward()
        return {name: p.grad for name, p in capi.named_parameters() if p.grad is not None}

    with_loss, without = gradients(1.0), gradients(0.0)
    names = {name for name, _ in recipe().named_parameters() if not name.startswith("target_")}
    assert set(with_loss) == names
    for name in names:
        same = name.startswith("clusters.")
        assert torch.equal(with_loss[name], without[name]) == same, name
        assert with_loss[name].any(), name


def test_all_positions_may_be_balanced_together() -> None:
    """Then a cluster may stand for a position: images that are all alike are assigned as one would be alone."""
    torch.manual_seed(0)
    alike = torch.randn(1, 16, 8, dtype=torch.float64).expand(4, -1, -1)
    options: dict[str, Any] = {"teacher_temperature": 0.06, "cluster_temperature": 0.12, "iterations": 200}
    clusters = {way: check.Clusters(8, 4, positionwise=way, **options).double() for way in (True, False)}
    clusters[False].load_state_dict(clusters[True].state_dict())
    assigned, together = (clusters[way](alike)[0] for way in (True, False))
    torch.testing.assert_close(assigned, torch.full_like(assigned, 0.25))  # each cluster gets a quarter everywhere
    assert together.amax(-1).mean() > 0.8
    torch.testing.assert_close(together.mean((0, 1)), torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=1e-3)


def test_clusters_have_the_learning_rate_and_decay_of_the_release() -> None:
    config = load_config(ROOT / "projects/capi/configs/in1k_vitl14.yaml")
    small = load_config(ROOT / "projects/capi/configs/quick.yaml")
    assert small.optim.groups == config.optim.groups
    optimizer = optimizer_of(recipe(), small.optim)
    set_hyper(optimizer, Hyper(1e-3, 0.1, 1.0))
    of = {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["param_names"]}
    assert of["clusters.layer.weight"] == of["clusters.layer.bias"] == pytest.approx((5e-4, 0.01))
    assert of["encoder.patch_embed.proj.weight"] == pytest.approx((2e-4, 0.1))
    assert of["encoder.blocks.0.norm1.weight"] == pytest.approx((1e-3, 0.01))
    assert of["encoder.blocks.0.norm1.bias"] == (1e-3, 0.0)
    assert of["encoder.blocks.0.mlp.fc1.weight"] == pytest.approx((1e-3, 0.1))


def test_the_cosine_ends_at_four_fifths() -> None:
    """The learning rate at the end is that of the released schedule, 0.8 of half a cosine after the warm-up."""
    from jepa_kit.engine.schedules import Schedule

    schedule = Schedule.of(load_config(ROOT / "projects/capi/configs/in1k_vitl14.yaml"), 1000)
    ours = np.array([schedule(step).lr for step in (0, 25_000, 49_999, 50_000, 250_000, 499_999)])
    after = np.array([0, 200_000, 449_999]) / 450_000
    theirs = [0, 1e-3 * 25_000 / 49_999, 1e-3, *(0.5e-3 * (1 + np.cos(np.pi * 0.8 * after)))]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.integration
def test_two_processes_are_as_one(ranks: Any) -> None:
    ranks(2, capi_cases.__file__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_temperature": 0.0}, r"teacher_temperature \(=0.0\) must be above 0"),
        ({"cluster_temperature": -1.0}, r"cluster_temperature \(=-1.0\) must be above 0"),
        ({"sinkhorn": -1}, r"sinkhorn \(=-1\) must be 0 or more iterations"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_the_fixture_states_its_origin() -> None:
    assert json.loads(FIXTURE.with_suffix(".json").read_text())["meta"]["repository"] == "facebookresearch/capi"
