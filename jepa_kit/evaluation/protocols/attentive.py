"""A probe that attends to patch tokens with one learned query.

B  samples of a batch    n  patches    D  width    h  heads    d = D / h    K  classes
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    Features,
    LayerSet,
    Probe,
    ProbeResult,
    Task,
    check_labels,
    check_values,
    choose_holdout,
    classification_result,
    epoch_batches,
    split,
)
from jepa_kit.evaluation.protocols.heads import Recipe
from jepa_kit.rng import IntArray

HOLDOUT = 0.2
FOR_STATISTICS = 2048
"""About so many images give each feature's mean and deviation."""


class AttentivePool(nn.Module):
    """Cross-attention of one learned query over an image's tokens, an MLP and a linear classifier.

    Equals ``nn.MultiheadAttention(query, tokens, tokens)`` with the products in another order. The query does not
    depend on the image, so it is multiplied by each head's key matrix once, and each head's value matrix is applied
    after tokens are averaged. A token then costs 2 h D products instead of 2 D^2. (A bias of the keys cancels in the
    softmax.)

    Args:
        width: D.
        classes: K.
        num_heads: h, a divisor of D.
    """

    def __init__(self, *, width: int, classes: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads (={num_heads}) must divide the width (={width})")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def attend(self, tokens: Tensor) -> Tensor:
        """Return the output of the cross-attention: [B, n, D] -> [B, D]."""
        h = self.num_heads
        keys = self.key.weight.unflatten(0, (h, -1))  # [h, d, D]
        queries = torch.einsum("hd,hdw->hw", self.query.unflatten(0, (h, -1)), keys)  # [h, D]
        scores = tokens @ queries.T * queries.new_tensor(tokens.shape[-1] / h).rsqrt()  # [B, n, h]
        mixed = scores.softmax(dim=1).mT @ tokens  # [B, h, D]
        values = torch.einsum("bhw,hdw->bhd", mixed, self.value.weight.unflatten(0, (h, -1)))
        return self.proj(values.flatten(1) + self.value.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits: [B, n, D] -> [B, K]."""
        x = self.query + self.attend(tokens)
        x = x + self.mlp(self.norm_mlp(x))
        return self.head(self.norm(x))


@PROTOCOLS.register("attentive")
@dataclass(kw_only=True)
class Attentive(Probe):
    """Cross-attention probe on frozen patch tokens.

    Source: CAE (Chen et al. 2022, arXiv 2202.03026) and V-JEPA (Bardes et al. 2024, arXiv 2404.08471), which add the
    attention's output to the query, and an MLP after it; then layer norm and a linear classifier. Departures: tokens of
    one centre crop, extracted once, are standardised first; a second residual goes around the MLP; of several learning
    rates, the best on held-out training samples is used.

    Example: ``{name: attentive, lrs: [3e-4, 1e-3], epochs: 20}``

    Args:
        layers: the layer set of the tokens: last, last4 (the last 4 concatenated), or blocks as 2+4.
        num_heads: of the attention; None for one per 64 features, at least 1.
        lrs: learning rates at a batch of ``batch_size``; of several, the best on held-out samples is used.
        weight_decay: of AdamW.
        epochs: a tenth of them warm-up, then a cosine to 0.
        batch_size: samples of an update, at most.
        holdout: fraction of the training set that chooses between learning rates, in (0, 0.5]; None for 0.2.

    Raises:
        ValueError: a value outside its range, or an option without effect.
    """

    layers: str = "last"
    num_heads: int | None = None
    lrs: tuple[float, ...] = (1e-3,)
    weight_decay: float = 0.01
    epochs: int = 10
    batch_size: int = 128
    holdout: float | None = None

    def __post_init__(self) -> None:
        lrs = self.lrs
        check_values(
            ("lrs", lrs, bool(lrs) and min(lrs) > 0, "must be at least one, above 0"),
            ("lrs", lrs, len(set(lrs)) == len(lrs), "must contain each value once"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "must be at least 0"),
        )
        self.recipe = Recipe(optimizer="adamw", epochs=self.epochs, batch_size=self.batch_size)
        self.holdout = choose_holdout(self.holdout, HOLDOUT, len(lrs), f"lrs (={lrs}) leaves")

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return (LayerSet(self.layers, "none"),)

    def __call__(self, task: Task) -> list[ProbeResult]:
        """Train with each learning rate on a part of the training set, then with the best on all of it."""
        train, test = task.both(LayerSet(self.layers, "none"))
        train_labels, test_labels = check_labels(train, test, *task.labels())
        classes, answers = np.unique(train_labels, return_inverse=True)
        tried: dict[float, float] = {}
        if self.holdout is not None:  # else there is one learning rate, and nothing to choose
            ((fit_on, choose_on),) = split(train_labels, self.holdout, task.seed)
            for lr in self.lrs:
                probe = self._fit(train, answers, fit_on, len(classes), lr, task)
                right = probe and np.mean(predict(probe, train, choose_on, task.device) == answers[choose_on])
                tried[lr] = float(right or 0.0)
        best = max(self.lrs, key=lambda lr: tried.get(lr, 0.0))
        probe = self._fit(train, answers, np.arange(len(train)), len(classes), best, task)
        if probe is None:
            raise ValueError(f"lrs (={self.lrs}): training with {best} diverged; take lower ones")
        found = classes[predict(probe, test, np.arange(len(test)), task.device)]
        settings = {
            "lr": best,
            "tried": [{"lr": lr, "validation": right} for lr, right in tried.items()],
            "holdout": self.holdout,
            "num_heads": self.num_heads or default_heads(train.width),
            "weight_decay": self.weight_decay,
            "recipe": asdict(self.recipe),
        }
        return [classification_result("attentive", found, train_labels, test_labels, tried.get(best), settings)]

    def _fit(
        self, features: Features, answers: IntArray, index: IntArray, classes: int, lr: float, task: Task
    ) -> nn.Sequential | None:
        """Return a probe trained on these samples; None if its loss becomes infinite or NaN."""
        width = features.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            pool = AttentivePool(width=width, classes=classes, num_heads=self.num_heads or default_heads(width))
        probe = nn.Sequential(Standardise(features, index), pool).to(task.device)
        optimizer = torch.optim.AdamW(pool.parameters(), lr=lr, weight_decay=self.weight_decay)
        warmup = 0.1 * self.epochs
        for epoch in range(self.epochs):
            batches = epoch_batches(index, self.batch_size, seed=task.seed, epoch=epoch, lane=5)
            for step, chosen in enumerate(batches):
                done = epoch + (step + 1) / len(batches)
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1.0, done / warmup) * self.recipe.factor(done)
                target = torch.from_numpy(answers[chosen]).to(task.device)
                loss = F.cross_entropy(probe(features.rows(chosen, task.device)), target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if not torch.isfinite(loss):
                return None
        return probe


def default_heads(width: int) -> int:
    """Return one head per 64 features if that divides the width, else 1."""
    heads = max(1, width // 64)
    return heads if width % heads == 0 else 1


class Standardise(nn.Module):
    """Scale each feature of a token to mean 0 and deviation 1 over the training set, or a part of a large one."""

    def __init__(self, features: Features, index: IntArray) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        x = features.rows(index[:: max(1, len(index) // FOR_STATISTICS)]).flatten(0, -2).double()  # [b * n, D]
        variance, mean = torch.var_mean(x, dim=0)
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", (variance + 1e-12).rsqrt().clamp_max(1e6).float())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


@torch.no_grad()
def predict(probe: nn.Module, features: Features, index: IntArray, device: torch.device) -> IntArray:
    """Return the predicted class of each of these samples: [b], 0 to K - 1."""
    parts = np.array_split(index, math.ceil(len(index) / 512))
    return np.concatenate([probe(features.rows(part, device)).argmax(dim=1).cpu().numpy() for part in parts])
