"""Batch norm over the rows of all processes.

N = rows of this process    R = processes    D = width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_kit.distributed.collectives import joined, rank_and_size
from jepa_kit.distributed.gradients import GatherRows
from jepa_kit.structures import at_least_float32


class SyncedBatchNorm(nn.BatchNorm1d):
    """Batch norm of [N, D] with the mean and variance of all processes' rows, and gradients through both.

    In place of ``nn.BatchNorm1d``, with the same names in the state dict; on one process, and in eval mode, it is that.
    It equals one process with all rows, also if processes have unequally many. ``nn.SyncBatchNorm`` is for CUDA alone,
    and this runs on gloo and NCCL. One gather of 2 D + 1 numbers in forward, one all-reduce in backward; all ranks must
    call both. Statistics have float32 or better, and the result has the type of the input.

    Args:
        num_features: D.
        eps: added to the variance.
        momentum: fraction by which the running statistics move to those of a batch.
        affine: scale and shift of each channel, which are trained.

    Raises:
        ValueError: an input that is not [N, D]; or, in training, one row on one process.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)

    def forward(self, input: Tensor) -> Tensor:  # torch's name of the argument
        """[N, D] -> [N, D]."""
        if input.ndim != 2 or input.shape[1] != self.num_features:
            raise ValueError(f"batch norm needs rows [N, {self.num_features}], not {tuple(input.shape)}")
        if not (self.training and joined()):
            return super().forward(input)
        x = at_least_float32(input)
        with torch.autocast(x.device.type, enabled=False):
            mean, variance, count = self._statistics(x)
            self._track(mean, variance * (count / (count - 1).clamp(min=1)))
            x = (x - mean) * (variance + self.eps).rsqrt()
            if self.affine:
                x = x * self.weight + self.bias
        return x.to(input.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean [D], biased variance [D] and the number of rows [] of all processes.

        Each process's mean and sum of squared deviations are combined (Chan et al. 1979), which loses no digits as the
        difference of the mean square and the squared mean would.
        """
        mean = x.mean(0)
        own = torch.cat([mean, (x - mean).square().sum(0), x.new_full((1,), len(x))])  # [2 D + 1]
        every = GatherRows.apply(own[None], [1] * rank_and_size()[1])  # [R, 2 D + 1]
        means, squares, counts = every.split([self.num_features, self.num_features, 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        return mean, (squares + counts * (means - mean).square()).sum(0) / count, count

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics to those of a batch; ``variance`` is unbiased."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
