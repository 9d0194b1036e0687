"""What two processes of test_self_distillation.py compute, each with its part of the rows."""

import torch

from jepa_kit.distributed.collectives import process_group, read_environment
from jepa_kit.losses.self_distillation import CentredTargets
from jepa_kit.structures import START

if __name__ == "__main__":
    world = read_environment()
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with process_group(world, torch.device("cpu")):
        targets = CentredTargets(5, temperature=(0.04, 0.07), warmup_epochs=0, momentum=0.9).double()
        targets(x.split(4)[world.rank], START)
    torch.testing.assert_close(targets.centre, 0.1 * x.mean(0), rtol=0, atol=1e-14)
