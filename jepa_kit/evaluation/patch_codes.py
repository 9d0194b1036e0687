"""A baseline without a network: k-means on whitened patches, triangle coding, and pooling over the image.

Coates, Lee, Ng, "An analysis of single-layer networks in unsupervised feature learning", AISTATS 2011: every patch of
an image is brought to mean 0 and variance 1, whitened (ZCA), and described by its distances z to K centroids:
f_k = max(0, mean(z) - z_k), the "triangle" code. Averaged over the image or its quarters, and standardised over the
training set, these K or 4 K numbers are what a linear classifier gets. Departures: means, not sums, over an image and
its quarters; images above 64 pixels are averaged down to it; the protocol's probe instead of an SVM.

B  images of a batch    K  centroids    P  numbers of a patch, 3 * side * side    n  positions of patches in an image
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.encoders.pooling import quarters
from jepa_kit.rng import Stream, generator, permutation
from jepa_kit.structures import Pooling

Array = NDArray[np.float32]
MOST_PIXELS = 64
"""Side that larger images are averaged down to: cost and patches stay those of the measured setting."""
CONTRAST = 10.0
"""Added to the variance of a patch of levels from 0 to 255 before it is divided by (the authors' released code)."""
WHITENING = 0.1
"""Added to the eigenvalues of the covariance (the same)."""
BATCH = 1000
"""Patches of a step of mini-batch k-means, which moves centroids of few patches to others. k-means on all patches
leaves many centroids at single outliers: with 200 centroids on 4,000 scenes, ridge regression of count, distance and
shape reaches 23.2, 27.3 and 36.9 with these, and 28.1, 33.6 and 46.4 with mini-batches."""
NUMBERS = 2**23
"""Numbers in the largest array of a block: 32 MB."""


@dataclass(frozen=True)
class PatchOptions:
    """Settings of the baseline.

    Args:
        side: of a patch in pixels.
        stride: pixels between patches.
        size: (h, w) of the image that they are cut from.
        centroids: K at most; fewer if there are fewer patches to learn from.
        images: that patches are drawn from, at most.
        patches: that whitening and centroids are learned from, at most.
        iterations: passes of k-means over the patches, at most.
        seed: of the draw and the first centroids.
    """

    side: int
    stride: int
    size: tuple[int, int]
    centroids: int = 400
    images: int = 4000
    patches: int = 100_000
    iterations: int = 20
    seed: int = 0

    @classmethod
    def for_images(cls, image_size: tuple[int, int]) -> PatchOptions:
        """Return the settings for images: patches of 6 pixels at every position if the shorter side is below 48 pixels,
        else of 8 at every second."""
        shorter = min(image_size)
        size = image_size if shorter <= MOST_PIXELS else (MOST_PIXELS, MOST_PIXELS)
        return cls(min(6, shorter), 1, size) if shorter < 48 else cls(8, 2, size)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON."""
        return asdict(self) | {"size": list(self.size)}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = ((length - self.side) // self.stride + 1 for length in self.size)
        return rows, columns


class PatchCodes:
    """Triangle codes of the patches of images.

    Args:
        options: of the patches.
        arrays: ``mean`` [P] and ``whitening`` [P, P] of patches of mean 0 and variance 1, and ``centroids`` [K, P].
    """

    def __init__(self, options: PatchOptions, arrays: dict[str, Array]) -> None:
        self.options = options
        self.mean, self.whitening, self.centroids = (
            torch.from_numpy(np.asarray(arrays[name], dtype=np.float32)) for name in ("mean", "whitening", "centroids")
        )

    def __call__(self, images: Tensor) -> Iterator[Tensor]:
        """Yield codes of some images at a time: uint8 [B, 3, h, w] -> [b, n, K] float32."""
        rows, columns = self.options.grid
        for block in images.split(max(1, NUMBERS // (rows * columns * max(self.centroids.shape)))):
            yield self.code(cut(block, self.options))

    def code(self, patches: Tensor) -> Tensor:
        """Return codes of patches: [..., P] -> [..., K]."""
        return triangle_codes(patches, self.mean, self.whitening, self.centroids)

    def features(self, images: Tensor, poolings: Sequence[Pooling], grid: tuple[int, int]) -> list[Tensor]:
        """Return features of images in several poolings: [B, K]; [B, 4 K] for ``quarters``; [B, H * W, K] for ``none``.

        Args:
            images: uint8 [B, 3, h, w].
            poolings: any other is the mean.
            grid: (H, W) of the patches of an encoder, over which codes are averaged for ``none``.
        """
        found = [[self._pool(codes, pooling, grid) for pooling in poolings] for codes in self(images)]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _pool(self, codes: Tensor, pooling: Pooling, grid: tuple[int, int]) -> Tensor:
        if pooling == "quarters":
            return quarters(codes, self.options.grid)
        if pooling == "none":
            planes = codes.transpose(1, 2).unflatten(2, self.options.grid)  # [b, K, rows, columns]
            return F.adaptive_avg_pool2d(planes, grid).flatten(2).transpose(1, 2)
        return codes.mean(1)


def triangle_codes(patches: Tensor, mean: Tensor, whitening: Tensor, centroids: Tensor) -> Tensor:
    """Return codes of patches: [..., P] -> [..., K]; see ``PatchCodes``.

    The distance is sqrt(|w|^2 - 2 w c + |c|^2), with one matrix product for all patches and centroids.
    """
    white = (normalised(patches) - mean) @ whitening
    squares = white.square().sum(-1, keepdim=True)
    z = (white @ centroids.T).mul_(-2).add_(squares).add_(centroids.square().sum(1))  # [..., K]
    z = z.clamp_(min=0).sqrt_()
    return z.neg_().sub_(z.mean(-1, keepdim=True)).clamp_(min=0)


def cut(images: Tensor, options: PatchOptions) -> Tensor:
    """Return the patches of images, row by row, in levels from 0 to 255: uint8 [B, 3, h, w] -> [B, n, P] float32."""
    x = images.float()
    if x.shape[2:] != options.size:
        x = F.adaptive_avg_pool2d(x, options.size)
    return F.unfold(x, options.side, stride=options.stride).transpose(1, 2)


def normalised(patches: Tensor) -> Tensor:
    """Return patches of mean 0, over the square root of their variance plus ``CONTRAST``: [..., P] -> [..., P]."""
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + CONTRAST).sqrt()


def whitening_of(patches: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean [P] and ZCA matrix V diag((d + ``WHITENING``)^-1/2) V' [P, P] of patches [N, P], in float64."""
    x = patches.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False, bias=True))
    return x.mean(0), (vectors / np.sqrt(np.maximum(values, 0.0) + WHITENING)) @ vectors.T


def learn_patches(options: PatchOptions, dataset: ShardDataset, images: ImageOptions) -> dict[str, Array]:
    """Return the arrays of ``PatchCodes``, learned from random patches of random images of a data set.

    Raises:
        ValueError: an image that cannot be read.
    """
    from sklearn.cluster import MiniBatchKMeans  # here, so that a target that computes codes does not wait for it

    random = generator(Stream.EVALUATION, seed=options.seed, lane=4)
    samples = np.sort(permutation(random, len(dataset))[: options.images])
    positions = options.grid[0] * options.grid[1]
    each = min(positions, -(-options.patches // len(samples)))
    drawn = []
    for batch in eval_batches(dataset, images, samples=samples):
        for one in batch.images:
            chosen = torch.from_numpy(permutation(random, positions)[:each])
            drawn.append(cut(one[None], options)[0, chosen])
    x = normalised(torch.cat(drawn)).numpy()  # [N, P]
    mean, matrix = whitening_of(x)
    white = ((x - mean) @ matrix).astype(np.float32)
    count = min(options.centroids, len(np.unique(white, axis=0)))
    clusters = MiniBatchKMeans(
        count, n_init=1, init="random", batch_size=BATCH, max_iter=options.iterations, random_state=options.seed
    ).fit(white)
    arrays = {"mean": mean, "whitening": matrix, "centroids": clusters.cluster_centers_}
    return {name: array.astype(np.float32) for name, array in arrays.items()}
