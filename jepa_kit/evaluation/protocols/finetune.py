"""Fine-tuning: the encoder itself, trained with labels.

B  images of a batch    n  patches of an image    D  width    K  classes
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.data.loader import eval_batches, whole_batches
from jepa_kit.data.transforms import normalize, train_pipeline
from jepa_kit.encoders.pooling import quarters
from jepa_kit.evaluation.features import grid_of, has_class_token
from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    ImagePooling,
    LayerSet,
    Probe,
    ProbeResult,
    Task,
    check_labels,
    check_values,
    classification_result,
    epoch_batches,
)
from jepa_kit.evaluation.protocols.subsets import Subset
from jepa_kit.precision import autocast_of
from jepa_kit.registry import check_choice
from jepa_kit.rng import IntArray, Stream, generator

TOKENS = ("cls_token", "mask_token", "pos_embed", "register_tokens")
"""Learned tokens and positions of an encoder, which fine-tuning does not decay."""


class Classifier(nn.Module):
    """An encoder, one feature of each image (see ``ImagePooling``), and a linear map: [B, 3, h, w] -> [B, K]."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, pooling: ImagePooling = "mean") -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.pooling = pooling
        self.head = nn.Linear(4 * width if pooling == "quarters" else width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        if self.pooling == "class":
            return self.head(self.encoder.forward_tokens(images)[0].prefix[:, 0].float())
        tokens = self.encoder(images).unflatten(0, (len(images), -1)).float()  # [B, n, D]
        whole = self.pooling == "mean"
        return self.head(tokens.mean(dim=1) if whole else quarters(tokens, grid_of(self.encoder, images)))


@PROTOCOLS.register("finetune")
@dataclass(kw_only=True)
class Finetune(Probe):
    """A copy of the encoder trained end to end with labels; the figure is that of the last epoch.

    Source: MAE's recipe (He et al. 2022, arXiv 2111.06377, A.1), which I-JEPA uses for 1 % of ImageNet (A.2): AdamW, a
    cosine after warm-up, learning rates that fall by ``layer_decay`` per layer, label smoothing, stochastic depth,
    mixup. I-JEPA has lr 3e-5 (absolute, batch 512), 50 epochs, layer decay 0.75, label smoothing 0.1, and neither mixup
    nor drop path. Departures: random crops and flips instead of RandAugment; no setting is chosen. Matrix products
    have the run's precision (``train.precision``).

    Example: ``{name: finetune, epochs: 20, lr: 3e-4, subset: 10%}``

    Args:
        epochs: of the training.
        batch_size: images of an update, at most.
        lr: of the head after warm-up; it is not scaled with ``batch_size``.
        min_lr: of the head at the end of the cosine (1e-6 in MAE's released code).
        weight_decay: of weights; none for biases, norms, learned tokens and learned positions.
        layer_decay: in (0, 1]; the head has lr, the last block lr * layer_decay, and so on to the patch embedding.
        warmup_epochs: of linear warm-up.
        label_smoothing: in [0, 1).
        mixup: alpha of its Beta distribution (Zhang et al. 2018, arXiv 1710.09412); 0 for no mixup.
        drop_path: rate of stochastic depth of the last block, in [0, 1); it rises linearly from 0 at the first.
        crop_scale: of random resized crops; (1, 1) for none, as in the paper for counts and distances (Clevr).
        flip: probability of a horizontal flip.
        subset: of the labels: all, a fraction as 1%, or images as 10/class; one draw.
        pooling: mean over patches; class: the class token; quarters: the means over the four quarters, side by side.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int = 50
    batch_size: int = 128
    lr: float = 1e-3
    min_lr: float = 0.0
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.1
    mixup: float = 0.2
    drop_path: float = 0.1
    crop_scale: tuple[float, float] = (0.7, 1.0)
    flip: float = 0.5
    subset: str = "all"
    pooling: ImagePooling = "mean"

    trains_encoder = True

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, ImagePooling)
        low, high = self.crop_scale
        rules = {
            "epochs": (self.epochs >= 1, "must be at least 1"),
            "batch_size": (self.batch_size >= 2, "must be at least 2"),
            "lr": (self.lr > 0, "must be above 0"),
            "min_lr": (0 <= self.min_lr <= self.lr, f"must be at least 0 and at most lr (={self.lr})"),
            "weight_decay": (self.weight_decay >= 0, "must be at least 0"),
            "layer_decay": (0 < self.layer_decay <= 1, "must be in (0, 1]"),
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, "must be at least 0 and below epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "must be in [0, 1)"),
            "mixup": (self.mixup >= 0, "must be at least 0"),
            "drop_path": (0 <= self.drop_path < 1, "must be in [0, 1)"),
            "crop_scale": (0 < low <= high <= 1, "must be ascending, above 0, at most 1"),
            "flip": (0 <= self.flip <= 1, "must be a probability, 0 to 1"),
        }
        check_values(*((name, getattr(self, name), *rule) for name, rule in rules.items()))
        Subset(self.subset)

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return ()

    def check(self, labels: IntArray, key: Callable[[int], str]) -> None:
        Subset(self.subset).draw(labels, seed=0, draw=0)

    def __call__(self, task: Task) -> list[ProbeResult]:
        """Train, then classify the test set once."""
        assert task.encoder is not None
        labels, test_labels = check_labels(task.train.dataset, task.test.dataset, *task.labels())
        classes, answers = np.unique(labels, return_inverse=True)
        chosen = Subset(self.subset).draw(labels, seed=task.seed, draw=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            model = self._model(task.encoder, len(classes)).to(task.device)
            losses = self._train(model, task, answers, chosen)
        settings = {"loss_by_epoch": losses, "samples": len(chosen), **asdict(self)}
        del settings["subset"]  # the row has it as its variant
        found = classes[predict(model, task)]
        result = classification_result("finetune", found, labels[chosen], test_labels, None, settings)
        return [result if self.subset == "all" else replace(result, variant=self.subset)]

    def _model(self, encoder: nn.Module, classes: int) -> Classifier:
        """Return a copy of the encoder with its own stochastic depth, and a head.

        Raises:
            ValueError: the encoder has no stochastic depth for ``drop_path``, or no class token to be pooled.
        """
        if self.pooling == "class" and not has_class_token(encoder):
            raise ValueError("pooling (='class') needs an encoder with a class token, and this one has none")
        copied: Any = copy.deepcopy(encoder).requires_grad_(True)
        blocks = list(getattr(copied, "blocks", ()))
        if self.drop_path and not (blocks and all(hasattr(block, "drop_path") for block in blocks)):
            raise ValueError(
                f"drop_path (={self.drop_path}) must be 0: the encoder (={type(encoder).__name__}) has no blocks with "
                "stochastic depth"
            )
        for i, block in enumerate(blocks if self.drop_path else ()):
            block.drop_path.rate = self.drop_path * i / max(1, len(blocks) - 1)
        return Classifier(copied, copied.embed_dim, classes, self.pooling)

    def _train(self, model: Classifier, task: Task, answers: IntArray, chosen: IntArray) -> list[float]:
        """Train the model; return the mean loss of each epoch."""
        assert task.images is not None
        images = task.images
        groups = layer_groups(model, lr=self.lr, weight_decay=self.weight_decay, decay=self.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        autocast = autocast_of(images.precision, task.device)
        pipeline = train_pipeline(
            image_size=images.image_size,
            scale=self.crop_scale,
            flip=self.flip,
            decoder=images.decoder,
            max_pixels=images.max_pixels,
        )
        model.train()
        losses: list[float] = []
        for epoch in range(self.epochs):
            total = 0.0
            parts = epoch_batches(chosen, self.batch_size, seed=task.seed, epoch=epoch, lane=7)
            batches = whole_batches(
                task.train.dataset, pipeline, parts, num_workers=images.num_workers, seed=task.seed, epoch=epoch
            )
            for step, batch in enumerate(batches):
                lr = self.lr_after(epoch + (step + 1) / len(parts))
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"]
                x = normalize(batch.images.to(task.device), images.mean, images.std)
                target = F.one_hot(torch.from_numpy(answers)[batch.samples], model.head.out_features).float()
                x, target = self._mixed(x, target.to(task.device), task.seed, epoch, step)
                with autocast():
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += float(loss.detach())
            losses.append(total / len(parts))
            if not math.isfinite(total):
                raise ValueError(f"lr (={self.lr}): training diverged in epoch {epoch + 1}; take a lower one")
        return losses

    def lr_after(self, done: float) -> float:
        """Return the learning rate of the head after ``done`` epochs."""
        if done <= self.warmup_epochs:
            return self.lr * done / self.warmup_epochs
        rest = (done - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))

    def _mixed(self, images: Tensor, target: Tensor, seed: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Mix each image and its target with those of another image of the batch, with one weight for the batch."""
        if self.mixup == 0:
            return images, target
        draws = generator(Stream.EVALUATION, seed=seed, epoch=epoch * 2**20 + step, lane=8)
        weight = float(draws.beta(self.mixup, self.mixup))
        other = torch.from_numpy(draws.permutation(len(images))).to(images.device)
        return images.lerp(images[other], 1 - weight), target.lerp(target[other], 1 - weight)


def layer_groups(model: Classifier, *, lr: float, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Return parameter groups whose rate falls from the head down: block l of L has lr * decay ** (L + 1 - l).

    The patch embedding, tokens and positions are layer 0; the final norm and the head are layer L + 1.
    """
    depth: int = model.encoder.depth
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        place = name.split(".")
        layer = int(place[2]) + 1 if place[:2] == ["encoder", "blocks"] else 0
        if place[0] == "head" or place[:2] == ["encoder", "norm"]:
            layer = depth + 1
        decayed, scale = parameter.ndim > 1 and place[-1] not in TOKENS, decay ** (depth + 1 - layer)
        group = {"params": [], "weight_decay": weight_decay if decayed else 0.0, "scale": scale, "lr": lr * scale}
        groups.setdefault((layer, decayed), group)["params"].append(parameter)
    return list(groups.values())


@torch.no_grad()
def predict(model: Classifier, task: Task) -> IntArray:
    """Return the predicted class of each test image: [M], 0 to K - 1."""
    assert task.images is not None
    images, answers = task.images, []
    model.eval()
    for batch in eval_batches(task.test.dataset, images):
        x = normalize(batch.images.to(task.device), images.mean, images.std)
        with autocast_of(images.precision, task.device)():
            answers.append(model(x).argmax(dim=1).cpu().numpy())
    return np.concatenate(answers)
