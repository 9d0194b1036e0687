"""What two processes of test_rows.py compute, each with its part of the rows, against one process with all of them."""

import torch
import torch.distributed as dist
from torch import nn

from jepa_kit.distributed.batch_norm import SyncedBatchNorm
from jepa_kit.distributed.collectives import (
    first_row,
    gather_with_grad,
    process_group,
    rank_and_size,
    read_environment,
    row_counts,
)

EXACT = {"rtol": 0, "atol": 1e-12}
COUNTS = {"equal": (4, 4), "unequal": (2, 6)}


def data(rows, width=5):
    """All rows, the weights of a loss, and a second set of rows."""
    noise = torch.Generator().manual_seed(rows)
    return [3 + 2 * torch.randn(rows, width, dtype=torch.float64, generator=noise) for _ in range(3)]


def mine(x, counts, rank):
    return x.split(counts)[rank].clone()


def ranks_mean(gradient):
    """What DDP makes of a gradient."""
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient / 2


def check_gather(rank, counts):
    """The loss of a rank compares its rows with all rows; what is minimised is the mean of the ranks' losses."""
    x, weights, _ = data(8)

    def loss(own, every, weights):
        return ((own @ every.T).tanh() * weights[:, :1]).sum() / len(own)

    whole = x.clone().requires_grad_()
    losses = [loss(*pair) for pair in zip(whole.split(counts), (whole, whole), weights.split(counts), strict=True)]
    (sum(losses) / 2).backward()

    own = mine(x, counts, rank).requires_grad_()
    every = gather_with_grad(own)
    torch.testing.assert_close(every.detach(), x, rtol=0, atol=0)
    assert row_counts(len(own)) == list(counts)
    assert first_row(len(own)) == sum(counts[:rank])
    found = loss(own, every, mine(weights, counts, rank))
    torch.testing.assert_close(found, losses[rank], **EXACT)
    found.backward()
    torch.testing.assert_close(own.grad / 2, mine(whole.grad, counts, rank), **EXACT)


def check_gather_of_other_types(rank):
    labels = gather_with_grad(torch.tensor([rank, rank]))
    assert labels.tolist() == [0, 0, 1, 1]
    shape = gather_with_grad(torch.full((1 + rank, 2, 3), float(rank))).sum(dim=(1, 2))
    assert shape.tolist() == [0, 6, 6]


def normalise(norm, x, weights):
    """A loss that is no function of one row alone, per rank: what one process has, in its part of the sum."""
    return (norm(x).tanh() * weights).sum()


def check_batch_norm(rank, counts, affine):
    x, weights, further = data(8)
    torch.manual_seed(0)
    theirs = nn.BatchNorm1d(5, affine=affine).double()
    if affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = SyncedBatchNorm(5, affine=affine).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for batch in (x, further):
        whole = batch.clone().requires_grad_()
        normalise(theirs, whole, weights).backward()
        own = mine(batch, counts, rank).requires_grad_()
        normalise(ours, own, mine(weights, counts, rank)).backward()
        torch.testing.assert_close(own.grad, mine(whole.grad, counts, rank), **EXACT)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(2 * ranks_mean(p.grad), theirs.get_parameter(name).grad, rtol=0, atol=1e-11)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x[:1]), theirs(x[:1]), **EXACT)  # other rows on each rank, and no exchange
    with torch.no_grad():
        ours.train()(torch.full((3, 5), float("nan") if rank else 1.0, dtype=torch.float64))
    assert ours.running_mean.isnan().all()  # on both ranks: the step that sees it restores it on both


def check_half_precision(rank):
    """A large mean would take all digits of the variance."""
    x = 1000 + torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    wanted = nn.BatchNorm1d(5)(x)
    ours = SyncedBatchNorm(5)
    torch.testing.assert_close(ours(mine(x, (4, 4), rank)), mine(wanted, (4, 4), rank), rtol=0, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(mine(x, (4, 4), rank).bfloat16())
    assert found.dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.float32


if __name__ == "__main__":
    world = read_environment()
    with process_group(world, torch.device("cpu")):
        assert rank_and_size() == (world.rank, 2)
        for counts in COUNTS.values():
            check_gather(world.rank, counts)
            for affine in (True, False):
                check_batch_norm(world.rank, counts, affine)
        check_gather_of_other_types(world.rank)
        check_half_precision(world.rank)
