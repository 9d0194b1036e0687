"""Evaluation inside a run: health, a verdict and a probe of the target encoder, every n steps.

It never touches the run: no gradient, no random number of torch's, modules back in their modes. The images are read
once, at the start, and kept as uint8 in each process's memory (150 kB each at 224 x 224). Every process measures the
same, so that a model that is sharded over them is whole where it is asked; rank 0 writes.

What it gives, in the step's line of metrics.jsonl:

    eval/<figure>    the figures of ``Health``, and its ratios; those that are not defined are left out
    eval/knn, eval/linear    accuracy of the probe, in [0, 1]
    eval/verdict     its number in ``STATES``; the words are printed
    eval/seconds     what this evaluation took

N = images    D = width of a feature    K = classes    k = neighbours
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from jepa_kit.build import build_masker
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.collectives import run_on_all_ranks
from jepa_kit.engine.build import open_together
from jepa_kit.engine.logging.curves import Panel
from jepa_kit.engine.run import Run
from jepa_kit.engine.workers import choose_workers
from jepa_kit.evaluation.features import evaluating
from jepa_kit.evaluation.health.measure import BATCH, measure_health
from jepa_kit.evaluation.health.verdict import State, Verdict, judge
from jepa_kit.evaluation.neighbours import Bank
from jepa_kit.interfaces import Masker
from jepa_kit.precision import autocast_of, precision_of
from jepa_kit.recipe import JEPA
from jepa_kit.rng import FloatArray, IntArray, Stream, generator, permutation
from jepa_kit.structures import Precision

STATES: tuple[State, ...] = get_args(State)
"""``eval/verdict`` is a place in here: 0 is healthy, 1 not learned, the others are collapses."""
PANELS = (
    Panel("accuracy of the probe, %", ("eval/knn", "eval/linear"), 100.0),
    Panel("verdict", ("eval/verdict",), names=STATES),
    Panel("cross-sample gap", ("eval/cross_sample_gap",)),
    Panel("loss over that of a mean target", ("eval/relative_to_position", "eval/relative_to_mean")),
    Panel("loss of predictions", ("eval/loss", "eval/loss_position", "eval/loss_mean", "eval/loss_other")),
    Panel("ranks, in directions", ("eval/token_rank", "eval/rankme", "eval/effective_rank", "eval/lidar")),
    Panel("shares of the tokens, %", ("eval/varying", "eval/of_images", "eval/within_images"), 100.0),
    Panel("deviation of features", ("eval/std", "eval/unit_std")),
    Panel("cosine of features", ("eval/cosine",)),
    Panel("uniformity of features", ("eval/uniformity",)),
    Panel("alpha of features", ("eval/alpha",)),
    Panel("seconds of an evaluation", ("eval/seconds",), 1.0, True),
)
"""Of ``curves.png``, for what the hook returns; docs/evaluation.md says how to read each."""
NEIGHBOURS = 20
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MASKS = 2
"""Masks of each image: enough for LiDAR, and half the cost of those of tools/health.py."""


@dataclass(eq=False)
class OnlineEvaluation:
    """A hook of the training loop (jepa_kit/engine/hooks.py).

    Args:
        every: steps between two evaluations.
        images: uint8 [N, 3, h, w], in random order; health is measured on the first ``samples``.
        samples: at least 16.
        masker: the recipe's.
        mean, std: of the channels, as in training.
        precision: of the matrix products, as in training.
        seed: of the masks.
        probe: what tells ``labels`` apart, if anything.
        labels: [N] classes of the images.
    """

    every: int
    images: Tensor
    samples: int
    masker: Masker
    mean: Sequence[float]
    std: Sequence[float]
    precision: Precision = "float32"
    seed: int = 0
    probe: Literal["none", "knn", "linear"] = "none"
    labels: IntArray | None = None
    last: Verdict | None = field(default=None, init=False)
    """The latest verdict."""

    def __call__(self, run: Run, step: int) -> dict[str, float]:
        """Measures after the update of ``step``; see the module's text for what it gives."""
        start = time.perf_counter()
        health = measure_health(
            run.jepa,
            self.images[: self.samples],
            self.masker,
            masks=MASKS,
            seed=self.seed,
            mean=self.mean,
            std=self.std,
            device=run.device,
            precision=self.precision,
        )
        verdict, before = judge(health), self.last
        record = {f"eval/{name}": float(v) for name, v in health.to_dict().items() if isinstance(v, float)}
        if self.labels is not None and self.probe != "none":
            rest = self.features(run.jepa, self.images[self.samples :], run.device)
            features = np.concatenate([health.features, rest]) if len(rest) else health.features
            record[f"eval/{self.probe}"] = PROBES[self.probe](features, self.labels)
        record["eval/verdict"] = float(STATES.index(verdict.state))
        record["eval/seconds"] = time.perf_counter() - start
        self.last = verdict
        if run.world.is_main:
            tqdm.write(self.line(record, step, verdict, before))
        return record

    @torch.no_grad()
    def features(self, jepa: JEPA, images: Tensor, device: torch.device) -> FloatArray:
        """[N, D] mean over the target encoder's tokens, as the features of ``Health``."""
        parts = []
        with evaluating(jepa):
            for part in images.split(BATCH) if len(images) else ():  # torch splits nothing into one part of nothing
                x = normalize(part.to(device), self.mean, self.std)
                with autocast_of(self.precision, device)():
                    tokens = jepa.encoder_for("target")(x)  # [B * n, D]
                parts.append(tokens.unflatten(0, (len(x), -1)).double().mean(1).cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, 0))

    def line(self, record: dict[str, float], step: int, verdict: Verdict, before: Verdict | None) -> str:
        """What is printed of an evaluation."""
        accuracy = record.get(f"eval/{self.probe}")
        probe = "" if accuracy is None else f"{self.probe} {100 * accuracy:.1f} %  "
        names = ("cross_sample_gap", "varying", "token_rank")
        figures = "  ".join(f"{name} {record[f'eval/{name}']:.3g}" for name in names)
        told = f"{verdict.state}  {probe}{figures}  {record['eval/seconds']:.1f} s"
        if before is not None and before.state == verdict.state:
            return f"evaluation after {step + 1:,} updates: {told}"
        was = "" if before is None else f" (it was {before.state})"
        return f"evaluation after {step + 1:,} updates: {told}\n  {verdict.state}{was}: {verdict.reason}"


def online_evaluation(run: Run) -> OnlineEvaluation | None:
    """The hook that the config's section ``evaluate`` asks for, its images read; None where it asks for none.

    Raises:
        ValueError: shards that cannot be read, lack the label, or hold fewer than 16 images; on every rank.
    """
    config, wanted = run.config, run.config.evaluate
    if wanted.every is None:
        return None
    dataset = run.dataset if wanted.shards is None else open_together(config, wanted.shards)
    if len(dataset) < 16:
        raise ValueError(f"evaluate.shards (={dataset.path!r}) must hold at least 16 images, not {len(dataset)}")
    count = wanted.samples if wanted.probe == "none" else max(wanted.samples, wanted.probe_samples)
    chosen = permutation(generator(Stream.EVALUATION, seed=config.train.seed, lane=2), len(dataset))[:count]
    labels = None if wanted.label is None else dataset.labels(wanted.label)[chosen]
    workers = choose_workers(config.data.num_workers, run.device)
    batches = eval_batches(dataset, ImageOptions.from_config(config.data, num_workers=workers), samples=chosen)
    return OnlineEvaluation(
        every=wanted.every,
        images=run_on_all_ranks(lambda: torch.cat([batch.images for batch in batches])),
        samples=wanted.samples,
        masker=build_masker(config),
        mean=config.data.mean,
        std=config.data.std,
        precision=precision_of(config),
        seed=config.train.seed,
        probe=wanted.probe,
        labels=labels,
    )


def knn_accuracy(features: FloatArray, labels: IntArray) -> float:
    """Share of samples that their nearest others name right: each is asked about with itself left out.

    The 20 nearest by cosine vote, see ``Bank``; 20 neighbours are DINO's best (Caron et al. 2021, arXiv 2104.14294).

    Args:
        features: [N, D].
        labels: [N].
    """
    classes, answers = np.unique(labels, return_inverse=True)
    asked = np.arange(len(features))
    votes = Bank(features, answers, len(classes)).classify(features, [min(NEIGHBOURS, len(asked) - 1)], asked)
    return float(np.mean(votes[0] == answers))


def linear_accuracy(features: FloatArray, labels: IntArray) -> float:
    """Share of samples that a linear classifier of the others names right: each is asked about with itself left out.

    Ridge regression of the classes (one-hot, with an intercept) on standardised features. Its answers with one sample
    left out need no second fit: from answers y' = H y of all, they are (y'_i - h_ii y_i) / (1 - h_ii). The penalty, a
    share of N, is the one whose answers with one left out have the least squared error.

    Args:
        features: [N, D].
        labels: [N].
    """
    classes, answers = np.unique(labels, return_inverse=True)
    wanted = np.eye(len(classes))[answers]  # [N, K]
    centred, n = features - features.mean(0), len(features)
    scale = centred.std(0)
    x = centred / np.where(scale > 1e-7 * np.abs(features).max(initial=0.0), scale, np.inf)
    with threadpool_limits(1):
        u, s, _ = np.linalg.svd(x, full_matrices=False)  # [N, r], [r]
        turned = u.T @ wanted  # [r, K]
        tried = []
        for penalty in PENALTIES:
            shrink = np.square(s) / (np.square(s) + penalty * n)  # [r]
            own = np.square(u) @ shrink + 1.0 / n  # [N] h_ii, with the intercept's share
            answer = u @ (shrink[:, None] * turned) + wanted.mean(0)  # [N, K]
            left_out = (answer - own[:, None] * wanted) / np.maximum(1.0 - own, 1e-12)[:, None]
            error = float(np.square(left_out - wanted).mean())
            tried.append((error, float(np.mean(left_out.argmax(1) == answers))))
    return min(tried)[1]


PROBES: dict[str, Callable[[FloatArray, IntArray], float]] = {"knn": knn_accuracy, "linear": linear_accuracy}
