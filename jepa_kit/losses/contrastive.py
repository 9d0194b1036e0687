"""InfoNCE: which of many keys belongs to a query.

Q = queries    K = keys    D = width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.structures import at_least_float32


def info_nce(
    queries: Tensor, keys: Tensor, positive: Tensor, *, temperature: float, left_out: Tensor | None = None
) -> Tensor:
    """Return the loss of each query, -log(sum of exp over its positive keys / sum of exp over its keys): -> [Q].

    exp is of the cosine of query and key over the temperature (van den Oord et al. 2018, arXiv 1807.03748). With one
    positive key it is the cross entropy of choosing it. What a method does with it:

        SimCLR (NT-Xent)  queries are the views, keys the views of all processes; left_out is the query itself
        MoCo v3           keys are those of all processes

    Keys of all processes, with their gradient, are ``jepa_kit.distributed.collectives.gather_with_grad(keys)``; the
    gradient then needs no factor, as the mean of the processes' losses is minimised.

    Args:
        queries: [Q, D] of any length.
        keys: [K, D] of any length.
        positive: [Q, K] bool; each query must have a positive key that is not left out, or its loss is infinite.
        temperature: above 0.
        left_out: [Q, K] bool, keys that do not count for a query, positive or not; None for none.

    Raises:
        ValueError: the temperature is not above 0 and finite, or a shape does not fit.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature (={temperature}) must be above 0 and finite")
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be [Q, D] and [K, D] with one width D"
        )
    for name, mask in (("positive", positive), ("left_out", left_out)):
        if mask is not None and mask.shape != (len(queries), len(keys)):
            shape, wanted = tuple(mask.shape), (len(queries), len(keys))
            raise ValueError(f"{name} {shape} must be [Q, K] {wanted}: one row a query, one column a key")
    with torch.autocast(queries.device.type, enabled=False):  # half precision would round differences of logits away
        q, k = (F.normalize(at_least_float32(x), dim=1) for x in (queries, keys))
        logits = q @ k.T / temperature  # [Q, K]
    if left_out is not None:
        logits = logits.masked_fill(left_out, -math.inf)
    return logits.logsumexp(1) - logits.masked_fill(~positive, -math.inf).logsumexp(1)
