"""Evaluation during a run: health, a verdict and a probe of the encoder to evaluate, every n steps.

It does not affect training: there are no gradients, and torch's random state and the modes of modules are restored.
Images are read once, at the start, and stay in each process's memory as uint8 (150 kB each at 224 x 224). Every process
measures the same, because a sharded model needs all of them; rank 0 prints.

The hook returns values for the step's line of metrics.jsonl:

    eval/<figure>    the figures and ratios of ``Health`` that are defined
    eval/knn, eval/linear    accuracy of the probe, in [0, 1]
    eval/verdict     index of the state in ``STATES``
    eval/seconds     duration of this evaluation

N = images    D = width of a feature    K = classes
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.transforms import normalize
from jepa_kit.data.workers import choose_workers
from jepa_kit.distributed.collectives import run_on_all_ranks
from jepa_kit.engine.build import open_together
from jepa_kit.engine.logging.curves import Panel
from jepa_kit.engine.run import Run
from jepa_kit.evaluation.feature_sources import encoder_named
from jepa_kit.evaluation.features import evaluating
from jepa_kit.evaluation.health.measure import BATCH, measure_health, tokens_and_features
from jepa_kit.evaluation.health.states import STATES
from jepa_kit.evaluation.health.verdict import Verdict, judge
from jepa_kit.evaluation.images import random_samples, read_images
from jepa_kit.evaluation.neighbours import nearest, vote
from jepa_kit.from_config import masker_of
from jepa_kit.interfaces import Masker
from jepa_kit.precision import autocast_of, precision_of
from jepa_kit.recipe import Recipe
from jepa_kit.rng import FloatArray, IntArray

RANKS = ("token_rank", "feature_rank", "rankme", "effective_rank", "lidar")
FRACTIONS = ("varying", "of_images", "within_images", "feature_varying")
PANELS = (
    Panel("accuracy of the probe, %", ("eval/knn", "eval/linear"), 100.0),
    Panel("verdict", ("eval/verdict",), names=STATES),
    Panel("cross-sample gap", ("eval/cross_sample_gap",)),
    Panel("loss over that of a mean target", ("eval/relative_to_position", "eval/relative_to_mean")),
    Panel("loss of predictions", ("eval/loss", "eval/loss_position", "eval/loss_mean", "eval/loss_other")),
    Panel("ranks, in directions", tuple(f"eval/{name}" for name in RANKS)),
    Panel("fractions of tokens, features, %", tuple(f"eval/{name}" for name in FRACTIONS), 100.0),
    Panel("deviation of features", ("eval/std", "eval/unit_std")),
    Panel("cosine of features", ("eval/cosine",)),
    Panel("uniformity of features", ("eval/uniformity",)),
    Panel("alpha of features", ("eval/alpha",)),
    Panel("seconds of an evaluation", ("eval/seconds",), 1.0, True, compared=False),
)
"""Panels of ``curves.png`` for what the hook returns; docs/evaluation.md explains how to read each."""
NEIGHBOURS = 20
"""The best number for DINO (Caron et al. 2021, arXiv 2104.14294)."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties to choose from, each multiplied by N."""
MASKS = 2
"""Masks of each image: enough for LiDAR, at half the cost of tools/health.py."""


@dataclass(eq=False)
class OnlineEvaluation:
    """A hook of the training loop (jepa_kit/engine/run.py).

    Args:
        every: steps between two evaluations.
        images: uint8 [N, 3, h, w], in random order; health is measured on the first ``samples``.
        samples: at least 16.
        masker: the recipe's; None if it has none.
        options: normalisation and precision, as in training.
        seed: of the masks.
        probe: the classifier of ``labels``, if any.
        labels: [N] classes of the images.
    """

    every: int
    images: Tensor
    samples: int
    masker: Masker | None
    options: ImageOptions
    seed: int = 0
    probe: Literal["none", "knn", "linear"] = "none"
    labels: IntArray | None = None
    last: Verdict | None = field(default=None, init=False)
    """The latest verdict."""

    def __call__(self, run: Run, step: int) -> dict[str, float]:
        """Evaluate after the update of ``step``; return the values that the module's docstring lists."""
        start = time.perf_counter()
        health = measure_health(
            run.jepa,
            self.images[: self.samples],
            self.masker,
            encoder=encoder_named(run.jepa),
            masks=MASKS,
            seed=self.seed,
            mean=self.options.mean,
            std=self.options.std,
            device=run.device,
            precision=self.options.precision,
        )
        verdict, before = judge(health), self.last
        record = {f"eval/{name}": float(v) for name, v in health.to_dict().items() if isinstance(v, float)}
        if self.labels is not None and self.probe != "none":
            rest = self.features(run.jepa, self.images[self.samples :], run.device)
            record[f"eval/{self.probe}"] = PROBES[self.probe](np.concatenate([health.features, *rest]), self.labels)
        record["eval/verdict"] = float(STATES.index(verdict.state))
        record["eval/seconds"] = time.perf_counter() - start
        self.last = verdict
        if run.world.is_main:
            tqdm.write(self._message(record, step, verdict, before))
        return record

    @torch.no_grad()
    def features(self, jepa: Recipe, images: Tensor, device: torch.device) -> list[FloatArray]:
        """Return [B, D] of each batch, as ``Health.features``."""
        parts, which = [], encoder_named(jepa)
        with evaluating(jepa):
            for part in images.split(BATCH) if len(images) else ():  # torch splits an empty tensor into one empty part
                x = normalize(part.to(device), self.options.mean, self.options.std)
                with autocast_of(self.options.precision, device)():
                    parts.append(tokens_and_features(jepa, which, x)[1].cpu().numpy())
        return parts

    def _message(self, record: dict[str, float], step: int, verdict: Verdict, before: Verdict | None) -> str:
        """Return a line with the main figures, and the reason if the verdict is new."""
        accuracy = record.get(f"eval/{self.probe}")
        probe = "" if accuracy is None else f"{self.probe} {100 * accuracy:.1f} %  "
        names = ["cross_sample_gap", "varying", "token_rank"]
        if "eval/cross_sample_gap" not in record:
            names = ["varying", "token_rank", "feature_varying", "feature_rank"]
        figures = "  ".join(f"{name} {record[f'eval/{name}']:.3g}" for name in names)
        seconds = f"{record['eval/seconds']:.1f} s"
        line = f"evaluation after {step + 1:,} updates: {verdict.state}  {probe}{figures}  {seconds}"
        if before is not None and before.state == verdict.state:
            return line
        was = "" if before is None else f" (it was {before.state})"
        return f"{line}\n  {verdict.state}{was}: {verdict.reason}"


def online_evaluation(run: Run) -> OnlineEvaluation | None:
    """Return the hook of the config's section ``evaluate`` with its images; None if ``evaluate.every`` is null.

    Raises:
        ValueError: on every rank, if shards cannot be read, lack the label, or have fewer than 16 images.
    """
    config, wanted = run.config, run.config.evaluate
    if wanted.every is None:
        return None
    dataset = run.dataset if wanted.shards is None else open_together(config, wanted.shards)
    if len(dataset) < 16:
        raise ValueError(f"evaluate.shards (={dataset.path!r}) must have at least 16 images, not {len(dataset)}")
    count = wanted.samples if wanted.probe == "none" else max(wanted.samples, wanted.probe_samples)
    samples = random_samples(dataset, count, seed=config.train.seed)
    labels = None if wanted.label is None else dataset.labels(wanted.label)[samples]
    workers = choose_workers(config.data.num_workers, run.device)
    options = ImageOptions.from_config(config.data, num_workers=workers, precision=precision_of(config))
    return OnlineEvaluation(
        every=wanted.every,
        images=run_on_all_ranks(lambda: read_images(dataset, options, samples)),
        samples=wanted.samples,
        masker=masker_of(config),
        options=options,
        seed=config.train.seed,
        probe=wanted.probe,
        labels=labels,
    )


def knn_accuracy(features: FloatArray, labels: IntArray) -> float:
    """Return the leave-one-out accuracy of a vote of the 20 nearest neighbours by cosine; see ``vote``.

    Args:
        features: [N, D].
        labels: [N].
    """
    classes, truth = np.unique(labels, return_inverse=True)
    k = min(NEIGHBOURS, len(features) - 1)
    found = nearest(features, features, k, leave_out=np.arange(len(features)))
    return float(np.mean(vote(found, truth, len(classes), [k])[0] == truth))


def linear_accuracy(features: FloatArray, labels: IntArray) -> float:
    """Return the leave-one-out accuracy of ridge regression of the classes (one-hot, with an intercept).

    Features are standardised. One fit is enough: from predictions y' = H y on all samples, the prediction for sample i
    without it is (y'_i - h_ii y_i) / (1 - h_ii). The penalty is the one with the least squared leave-one-out error.

    Args:
        features: [N, D].
        labels: [N].
    """
    classes, truth = np.unique(labels, return_inverse=True)
    one_hot = np.eye(len(classes))[truth]  # [N, K]
    centred, n = features - features.mean(0), len(features)
    scale = centred.std(0)
    x = centred / np.where(scale > 1e-7 * np.abs(features).max(initial=0.0), scale, np.inf)
    with threadpool_limits(1):
        u, s, _ = np.linalg.svd(x, full_matrices=False)  # [N, r], [r]
        projected = u.T @ one_hot  # [r, K]
        tried = []
        for penalty in PENALTIES:
            shrink = np.square(s) / (np.square(s) + penalty * n)  # [r]
            own = np.square(u) @ shrink + 1.0 / n  # [N] h_ii, of which 1 / N is the intercept's
            fitted = u @ (shrink[:, None] * projected) + one_hot.mean(0)  # [N, K]
            left_out = (fitted - own[:, None] * one_hot) / np.maximum(1.0 - own, 1e-12)[:, None]
            error = float(np.square(left_out - one_hot).mean())
            tried.append((error, float(np.mean(left_out.argmax(1) == truth))))
    return min(tried)[1]


PROBES: dict[str, Callable[[FloatArray, IntArray], float]] = {"knn": knn_accuracy, "linear": linear_accuracy}
