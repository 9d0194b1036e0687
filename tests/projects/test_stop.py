"""StoP: the check passes on the recording and sees faults; the distribution of its queries; a run repeats its noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.engine.step import seed_torch
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.predictors import ViTPredictor
from jepa_kit.structures import MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import Recorded, Report
from projects.stop import check
from projects.stop.predictor import StochasticPredictor

PROJECT = Path(__file__).parents[2] / "projects/stop"
SMALL: dict[str, Any] = {"embed_dim": 6, "out_dim": 5, "grid": (4, 4), "width": 8, "depth": 1, "num_heads": 2}


def test_the_recording_is_reproduced(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(fixtures / "methods/stop"), "--tolerance", "1e-12"]) == 0
    out = capsys.readouterr().out
    assert "not read" not in out
    for quantity in ("context tokens", "queries", "targets", "predictions", "loss", "gradients"):
        assert f"\n{quantity} " in out


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("layer_norm_eps", 1e-4, "context tokens"),
        ("num_heads", 2, "context tokens"),
        ("predictor_num_heads", 2, "predictions"),
        ("target_blocks", 2, "target tokens"),
        ("num_targets", 3, None),
    ],
)
def test_another_setting_is_seen(altered: Any, key: str, value: Any, failed: str | None) -> None:
    report = Report()
    if failed is None:
        with pytest.raises(ValueError, match="queries: ours has shape"):
            check.check(altered("stop", key, value), report)
        return
    check.check(altered("stop", key, value), report)
    assert report.failed[0] == failed


def test_the_check_builds_the_config_of_the_project(fixtures: Path, same_parts: Any) -> None:
    """The norm of several blocks' mean is that of each block if there is one block."""
    recording = check.config_of(Recorded(fixtures / "methods/stop").meta)
    shipped = load_config(PROJECT / "configs/in1k_vitb16.yaml")
    same_parts(recording, shipped, without=("masker",), options=("norm", "mean_norm"))
    assert shipped.slots["target"].options["layers"] == 1


def masks_of(count: int) -> MaskBatch:
    """Context patch 0 and target patch 5 of so many images."""
    context, targets = (PatchSets.from_padded(torch.full((count, 1), patch)) for patch in (0, 5))
    return MaskBatch(context, targets, (4, 4), torch.arange(count))


def test_queries_are_normal_with_the_covariance_of_the_projection() -> None:
    """N(psi + b, std^2 B B^T), over 20,000 draws, within 5 standard errors."""
    torch.manual_seed(0)
    predictor = StochasticPredictor(**SMALL, noise_std=0.5).double()
    torch.nn.init.normal_(predictor.embed.weight)
    torch.nn.init.normal_(predictor.embed.bias)
    count = 20_000
    _, queries = predictor.tokens(torch.zeros(count, 6, dtype=torch.float64), masks_of(count), None)
    queries, b = queries.detach(), predictor.embed.weight.detach()
    mean, covariance = predictor.pos_embed[5] + predictor.embed.bias.detach(), 0.25 * b @ b.T
    variance = covariance.diagonal()
    assert ((queries.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    error = ((variance[:, None] * variance + covariance.square()) / count).sqrt()
    assert ((queries.T.cov() - covariance).abs() < 5 * error).all()
    assert float(covariance.abs().min()) > 0


def test_in_evaluation_queries_are_at_their_mean() -> None:
    predictor = StochasticPredictor(**SMALL).eval()
    torch.nn.init.normal_(predictor.embed.bias)
    _, queries = predictor.tokens(torch.zeros(3, 6), masks_of(3), None)
    torch.testing.assert_close(queries, (predictor.pos_embed[5] + predictor.embed.bias).expand(3, -1))


def test_without_noise_it_is_ijepas_predictor_with_the_bias_as_mask_token() -> None:
    ours, plain = StochasticPredictor(**SMALL, noise_std=0.0), ViTPredictor(**SMALL)
    torch.nn.init.normal_(ours.embed.bias)
    plain.load_state_dict(ours.state_dict() | {"mask_token": ours.embed.bias.detach()[None]})
    context, masks = torch.randn(3, 6), masks_of(3)
    torch.testing.assert_close(ours(context, masks), plain(context, masks))


def test_noise_is_a_function_of_seed_step_and_process() -> None:
    predictor = StochasticPredictor(**SMALL)

    def noise(step: int, rank: int) -> torch.Tensor:
        seed_torch(0, step, rank)
        return predictor.noise(masks_of(3))

    assert torch.equal(noise(4, 1), noise(4, 1))
    assert all(not torch.equal(noise(4, 1), noise(*other)) for other in ((4, 0), (5, 1)))


def test_the_mask_token_is_not_trained() -> None:
    config = load_config(PROJECT / "configs/quick.yaml")
    torch.manual_seed(0)
    recipe: Any = build_recipe(config)
    masks = build_masker(config)(np.arange(2), seed=0, epoch=0)
    recipe(View(torch.randn(2, 3, 64, 64), masks)).loss.backward()
    without = [name for name, p in recipe.predictor.named_parameters() if p.grad is None]
    assert without == ["mask_token"]


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_refuses(value: float) -> None:
    with pytest.raises(ValueError, match=rf"noise_std \(={value}\) must be at least 0 and finite"):
        StochasticPredictor(**SMALL, noise_std=value)


def test_the_config_has_the_sizes_of_the_readme() -> None:
    with torch.device("meta"):
        recipe: Any = build_recipe(load_config(PROJECT / "configs/in1k_vitb16.yaml"))
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (recipe.encoder, recipe.predictor)]
    assert f"| {counts[0]:.1f} M / {counts[1]:.1f} M |" in (PROJECT / "README.md").read_text()
