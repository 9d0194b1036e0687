"""Balanced assignments: every class takes the same share of a batch.

N = rows of this process    K = classes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jepa_kit.distributed.collectives import logsumexp_over_ranks
from jepa_kit.structures import at_least_float32


@torch.no_grad()
def sinkhorn(log_weights: Tensor, iterations: int, *, eps: float = 0.0) -> Tensor:
    """Return distributions over classes, [..., N, K] -> [..., N, K], that use all classes equally.

    Source: Sinkhorn-Knopp as in SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.1). An iteration divides each
    class by its sum over the rows of all processes, then each row by its sum. Positive weights are given by their
    logarithms, so that none underflows. A factor that all weights of a class share has no effect, so a constant may be
    subtracted from them.

    Args:
        log_weights: scores over a temperature, or log-probabilities; classes are balanced within each leading index.
        iterations: 0 for none: a softmax.
        eps: added to each sum but the first, the scale of whose terms is arbitrary: a row whose weights are all small
            then gets less than 1 (CAPI's code has 1e-8).

    Raises:
        ValueError: ``iterations`` or ``eps`` is negative.
    """
    if iterations < 0:
        raise ValueError(f"iterations (={iterations}) must be 0 or more")
    if not eps >= 0:
        raise ValueError(f"eps (={eps}) must be 0 or more")
    x = at_least_float32(log_weights)
    if not iterations:
        return x.softmax(-1)

    def plus_eps(log_sum: Tensor) -> Tensor:
        return log_sum.logaddexp(torch.full_like(log_sum, math.log(eps))) if eps else log_sum

    for i in range(iterations):
        of_class = logsumexp_over_ranks(x.logsumexp(-2, keepdim=True))  # [..., 1, K]
        x = x - (plus_eps(of_class) if i else of_class)
        x = x - plus_eps(x.logsumexp(-1, keepdim=True))
    return x.exp()
