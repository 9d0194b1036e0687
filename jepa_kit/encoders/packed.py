"""Rows of packed tokens: how many there are, which of them a block reads and returns, and what its attention adds.

P = packed tokens of all sets    D = width    h = heads    d = D / h    R = P or more rows (``fill_rows``)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jepa_kit.encoders.products import by_onednn
from jepa_kit.set_lengths import SetLengths

COUNTS = 32
"""Number of different row counts that ``fill_rows`` produces between two powers of two."""


def fill_rows(x: Tensor) -> Tensor:
    """Append zero rows if that makes the matrix products faster: [P, D] -> [R, D].

    oneDNN compiles a kernel for each size of a product (about 2 ms) and caches the last 1,024 of them, 0.6 MB each.
    Ragged sets have a different number of tokens at every step, so rows are rounded up, by at most 1 / COUNTS. The
    extra rows belong to no set: attention ignores them, and the caller removes them at the end (``take_rows``).
    """
    if not by_onednn(x):
        return x
    step = max(1, (1 << (len(x) - 1).bit_length()) // (2 * COUNTS))
    return add_rows(x, -(-len(x) // step) * step)


def add_rows(x: Tensor, rows: int) -> Tensor:
    """Pad with zero rows: [P, D] -> [rows, D]."""
    return x if len(x) == rows else nn.functional.pad(x, (0, 0, 0, rows - len(x)))


def take_rows(x: Tensor, rows: int) -> Tensor:
    """Return the first rows: [R, ...] -> [rows, ...].

    If these are all rows, return ``x`` itself: the backward of a view fills a tensor with zeros, and FSDP2 warns of it.
    """
    return x if len(x) == rows else x[:rows]


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows of a block's input form its sets, and which tokens the block returns.

    Args:
        source: [P], the input row of each token of the sets; a row may be in several sets. None if row i is token i.
        kept: [P_k], the tokens that the block returns, in this order; None for all.
        lengths: lengths of the sets of kept tokens; as many sets as before.
    """

    source: Tensor | None
    kept: Tensor | None
    lengths: SetLengths

    def rows(self, x: Tensor) -> Tensor:
        """Return the input rows of the kept tokens, plus ``fill_rows``: [R, D] -> [R_k, D]."""
        index = self.source if self.kept is None else self.kept
        if self.source is not None and self.kept is not None:
            index = self.source.index_select(0, self.kept)
        return x if index is None else fill_rows(x.index_select(0, index))


class Terms(NamedTuple):
    """What attention adds to queries, keys and scores: positions of tokens relative to each other.

    Attributes:
        bias: of the scores, see ``attend``.
        rotation: cosine and sine of the angle by which each channel is rotated, two [P, 1, d] (``rotate``).
        causal: whether a token attends only to those up to itself in its set.
    """

    bias: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    causal: bool = False


NO_TERMS = Terms()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs of channels (2i, 2i + 1) of x [P, h, d] (Su et al. 2021)."""
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
