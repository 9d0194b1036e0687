"""InfoNCE against numbers of released code: two and three views, keys of two processes; and against cross entropy."""

import pytest
import torch
import torch.nn.functional as F

from jepa_kit.losses.contrastive import info_nce
from jepa_kit.trials.recorded import Recorded


def nt_xent(views, temperature):
    """The loss of SimCLR; views [V, B, D], view by view."""
    z = views.flatten(0, 1)
    image = torch.arange(views.shape[1]).repeat(len(views))
    itself = torch.eye(len(z), dtype=torch.bool)
    return info_nce(z, z, image[:, None] == image, temperature=temperature, left_out=itself).mean()


def test_two_and_three_views_are_the_released_loss(fixtures):
    recorded = Recorded(fixtures / "methods" / "simclr")
    rows, temperature = recorded.meta["batch_size"], recorded.meta["temperature"]
    two = torch.stack([recorded["z0"], recorded["z1"]])
    three = recorded["three_views/z"].unflatten(0, (3, rows))
    gradients = torch.stack([recorded["grad_z0"], recorded["grad_z1"]]), recorded["three_views/grad_z"]
    for views, loss, gradient in (
        (two, recorded["loss"], gradients[0]),
        (three, recorded["three_views/loss"], gradients[1].view_as(three)),
    ):
        found = nt_xent(views.requires_grad_(), temperature)
        found.backward()
        assert found.item() == pytest.approx(loss.item(), abs=1e-14)
        torch.testing.assert_close(views.grad, gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1])
def test_keys_of_two_processes_are_the_released_loss(fixtures, rank):
    recorded = Recorded(fixtures / "methods" / "moco_v3")
    rows, temperature = recorded.meta["batch_size"], recorded.meta["temperature"]
    image = rank * rows + torch.arange(rows)
    positive = image[:, None] == torch.arange(2 * rows)
    for query, keys, name in (("q1", "k2", "loss_q1_k2"), ("q2", "k1", "loss_q2_k1")):
        own = recorded[query].split(rows)[rank].requires_grad_()
        loss = 2 * temperature * info_nce(own, recorded[keys], positive, temperature=temperature).mean()
        loss.backward()
        assert loss.item() == pytest.approx(recorded[name][rank].item(), abs=1e-14)
        torch.testing.assert_close(own.grad, recorded[f"grad_{query}"].split(rows)[rank], rtol=0, atol=1e-14)


def test_a_queue_is_cross_entropy():
    """As MoCo has it: the own key first, then the queue; other keys of the batch do not count."""
    torch.manual_seed(0)
    queries, keys, queue = (F.normalize(torch.randn(n, 5, dtype=torch.float64), dim=1) for n in (3, 3, 7))
    positive = torch.eye(3, 10, dtype=torch.bool)
    others = ~torch.eye(3, dtype=torch.bool)
    found = info_nce(
        queries, torch.cat([keys, queue]), positive, temperature=0.07, left_out=F.pad(others, (0, 7), value=False)
    )
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], dim=1) / 0.07
    wanted = F.cross_entropy(logits, torch.zeros(3, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_half_precision_is_not_used():
    queries, keys = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    wanted = info_nce(queries, keys, torch.eye(4).bool(), temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(queries, keys, torch.eye(4).bool(), temperature=0.1), wanted)
        half = info_nce(queries.bfloat16(), keys.bfloat16(), torch.eye(4).bool(), temperature=0.1)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3), (4, 3)), {"temperature": 0.0}, r"temperature \(=0.0\) must be above 0 and finite"),
        (((2, 3), (4, 3)), {"temperature": float("nan")}, r"temperature \(=nan\) must be above 0 and finite"),
        (((2, 3), (4, 2)), {}, r"queries \(2, 3\) and keys \(4, 2\) must be \[Q, D\] and \[K, D\] with one width D"),
        (((2, 3), (5, 3)), {}, r"positive \(2, 4\) must be \[Q, K\] \(2, 5\): one row a query, one column a key"),
        (((2, 3), (4, 3)), {"left_out": torch.ones(4, 2).bool()}, r"left_out \(4, 2\) must be \[Q, K\] \(2, 4\)"),
    ],
)
def test_what_does_not_fit(shapes, options, message):
    queries, keys = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        info_nce(queries, keys, torch.ones(2, 4).bool(), **{"temperature": 1.0, **options})
