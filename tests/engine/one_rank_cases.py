"""What test_on_device.py runs under torchrun with one rank: DDP and FSDP2 on a device, against no wrapper at all.

torchrun --nproc-per-node 1 one_rank_cases.py cpu|cuda      (gloo on a CPU, NCCL on CUDA)
"""

import sys

import torch
import torch.distributed as dist
from parallel_cases import batch, make

from jepa_kit.distributed.batch_norm import SyncedBatchNorm
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.checkpoint.state_dict import full_state, is_sharded
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.parallel import parallelize
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.structures import View

HYPER = Hyper(lr=1e-3, weight_decay=0.04, momentum=0.9)
STEPS = 4


def losses(device, mode, accumulate=1, name="adamw"):
    """Loss and gradient norm of each step, and the final weights, on the CPU."""
    jepa = make().to(device)
    forward = None if mode is None else parallelize(jepa, device, mode, accumulate)
    optimizer = build_optimizer(jepa, name=name)
    found = []
    for step in range(STEPS):
        images, masks = batch(step, World())
        out = train_step(jepa, optimizer, HYPER, [View(images.to(device), masks.to(device))], forward=forward)
        found.append(torch.stack([out.loss, out.grad_norm]).detach().cpu())
    if mode == "fsdp":
        assert all(is_sharded(p) for p in jepa.parameters())
    state = jepa.state_dict() if mode is None else full_state(jepa, optimizer)[0]
    return torch.stack(found), {name: value.cpu() for name, value in state.items()}


def share_apart(state, other):
    """Return the fraction of weights that differ by more than 1e-5.

    AdamW moves a weight by about the learning rate whatever the size of its gradient: one that is zero but for rounding
    moves at random. The bias of k has such gradients, as it adds the same to all of a query's scores: it is left out.
    """
    assert state.keys() == other.keys()
    apart = total = 0
    for name, value in state.items():
        far = (value.double() - other[name].double()).abs() > 1e-5
        if name.endswith("qkv.bias"):
            q, _, v = far.chunk(3)
            far = torch.cat([q, v])
        apart, total = apart + int(far.sum()), total + far.numel()
    return apart / total


def check_batch_norm(device):
    """With a gather of one rank, forward and backward."""
    ours, theirs = SyncedBatchNorm(8).to(device), torch.nn.BatchNorm1d(8).to(device)
    x = torch.randn(16, 8, device=device)
    own, other = (x.clone().requires_grad_() for _ in range(2))
    for norm, value in ((ours, own), (theirs, other)):
        norm(value).tanh().square().sum().backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-6)


def main(device):
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.index is not None else None
    )
    assert dist.get_world_size() == 1
    wanted, weights = losses(device, None)
    for mode, accumulate in (("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)):
        found, state = losses(device, mode, accumulate)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert share_apart(state, weights) <= 1e-3
    found, state = losses(device, "fsdp", name="lars")
    wanted, weights = losses(device, None, name="lars")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, weights, rtol=0, atol=1e-6)
    check_batch_norm(device)
    print(f"{dist.get_backend()}: 4 forms agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(torch.device("cuda", 0) if sys.argv[1] == "cuda" else torch.device("cpu"))
