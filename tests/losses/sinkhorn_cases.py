"""What two processes of test_sinkhorn.py compute, each with its part of the rows."""

import torch

from jepa_kit.distributed.collectives import process_group, read_environment
from jepa_kit.losses.sinkhorn import sinkhorn

if __name__ == "__main__":
    world = read_environment()
    x = 300 * torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with process_group(world, torch.device("cpu")):
        parts = {counts: sinkhorn(x.split(counts)[world.rank], 3, eps=1e-3) for counts in ((4, 4), (2, 6))}
    for counts, part in parts.items():
        torch.testing.assert_close(part, sinkhorn(x, 3, eps=1e-3).split(counts)[world.rank], rtol=0, atol=1e-14)
