"""Batch norm's statistics, a centre of targets and a queue of keys, under batches with bad numbers."""

import copy
import math

import pytest
import torch
from parallel_cases import Training, batch, launch, make

from jepa_kit.distributed.batch_norm import SyncedBatchNorm
from jepa_kit.distributed.buffers import Buffers, persistent_buffers
from jepa_kit.distributed.collectives import World, all_gather_object, gather_with_grad, process_group
from jepa_kit.engine.checkpoint.state_dict import full_state
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.structures import View
from jepa_kit.targets import RepresentationTarget

CPU = torch.device("cpu")


class Centred(RepresentationTarget):
    """Targets less their running mean, as DINO's teacher has it, changed in place or replaced; and MoCo's queue."""

    def __init__(self, replaced=False):
        super().__init__(embed_dim=16)
        self.replaced = replaced
        self.register_buffer("centre", torch.zeros(16))
        self.register_buffer("queue", torch.zeros(4, 16))
        self.register_buffer("pointer", torch.tensor(0))
        self.norm_in = SyncedBatchNorm(16, affine=False)

    def forward(self, images, patches, encoder):
        s_y = super().forward(images, patches, encoder)
        mean = s_y.detach().mean(0)
        if self.replaced:
            self.centre = torch.lerp(self.centre, mean, 0.1)
        else:
            self.centre.lerp_(mean, 0.1)
        keys = gather_with_grad(mean[None])
        self.queue.index_copy_(0, (self.pointer + torch.arange(len(keys))) % 4, keys)
        self.pointer.add_(len(keys)).remainder_(4)
        return self.norm_in(s_y) - self.centre


def make_centred(**options):
    jepa = make()
    jepa.target = Centred(**options)
    return jepa.train()


def whole_state(run):
    """Every tensor of the run but the target encoder, which moves at a bad step too; and all buffers."""
    kept = {k: v.clone() for k, v in run.jepa.state_dict().items() if not k.startswith("target_encoder")}
    moments = {k: dict(v) for k, v in full_state(run.jepa, run.optimizer)[1].items()}
    return kept, copy.deepcopy(moments)


def same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_changes_nothing(monkeypatch, replaced, accumulate, bad):
    run = Training(World(), accumulate=accumulate, jepa=make_centred(replaced=replaced))
    twin = Training(World(), accumulate=accumulate, jepa=make_centred(replaced=replaced))
    run.step(0)
    before = whole_state(run)
    good = batch

    def spoilt(step, world):
        images, masks = good(step, world)
        images[0, 0, 0, 0] = bad  # of the first part alone
        return images, masks

    monkeypatch.setattr("parallel_cases.batch", spoilt)
    assert not run.step(1).isfinite().any()
    same(whole_state(run), before)
    monkeypatch.setattr("parallel_cases.batch", good)
    twin.step(0)
    twin.jepa.update_target(0.9)  # what a step without its batch does
    assert run.step(2).isfinite().all()
    twin.step(2)
    same(whole_state(run), whole_state(twin))


def test_a_good_batch_is_that_of_the_plain_step():
    """Guarding buffers moves no number: they are what the forward pass alone makes of them."""
    run = Training(jepa=make_centred())
    plain = make_centred()
    run.step(0)
    plain(View(*batch(0, World())))
    for _, _, name in persistent_buffers(plain):
        same(run.jepa.get_buffer(name), plain.get_buffer(name))


def test_parts_of_jepa_kit_have_no_buffer_to_guard():
    jepa = make()
    assert Buffers(jepa).before == []
    assert {name for name, _ in jepa.named_buffers()} > set()  # constant tables
    assert [name for *_, name in persistent_buffers(make_centred())] == [
        "target.centre",
        "target.queue",
        "target.pointer",
        "target.norm_in.running_mean",
        "target.norm_in.running_var",
        "target.norm_in.num_batches_tracked",
    ]


def test_a_buffer_that_changes_its_shape():
    class Growing(RepresentationTarget):
        def __init__(self):
            super().__init__(embed_dim=16)
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, images, patches, encoder):
            self.seen = torch.cat([self.seen, images.new_zeros(1)])
            return super().forward(images, patches, encoder)

    jepa = make()
    jepa.target = Growing()
    with pytest.raises(ValueError, match=r"buffer target.seen has the shape \(1,\) after the forward pass, and \(0,\)"):
        Training(jepa=jepa).step(0)


def test_no_transfer_to_the_host(monkeypatch):
    """On a device, reading a value would wait for it."""

    def reads(*_):
        raise AssertionError("a tensor was read on the host")

    guard = Buffers(make_centred())
    assert guard.before
    finite = torch.tensor(False)
    for name in ("__bool__", "item", "tolist", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, reads)
    guard.restore_unless(finite)


def one_rank(world, out):
    """Rank 1's batch of step 1 is bad; then all ranks have one state."""
    with process_group(world, CPU):
        for mode, accumulate, replaced in (("ddp", 1, True), ("ddp", 2, False), ("fsdp", 1, True)):
            run = Training(world, mode, accumulate, jepa=make_centred(replaced=replaced))
            run.step(0)
            before = {name: run.jepa.get_buffer(name).clone() for *_, name in persistent_buffers(run.jepa)}
            weights = full_state(run.jepa, run.optimizer)
            images, masks = batch(1, world)
            if world.rank:
                images[0] = math.nan
            hyper = Hyper(lr=1e-3, weight_decay=0.04, momentum=1.0)
            train_step(run.jepa, run.optimizer, hyper, [View(images, masks)], forward=run.forward)
            same({name: run.jepa.get_buffer(name) for name in before}, before)
            same(full_state(run.jepa, run.optimizer), weights)
            seen = []
            run.jepa.target.register_forward_pre_hook(lambda target, _, seen=seen: seen.append(target.centre.tolist()))
            for step in (2, 3):
                assert run.step(step).isfinite().all(), (mode, accumulate)
            assert seen[0] != seen[accumulate]
            assert all_gather_object(seen[::accumulate]) == [all_gather_object(seen[::accumulate])[0]] * world.size
        (out / f"rank_{world.rank}").touch()


@pytest.mark.integration
def test_a_bad_batch_of_one_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(2, one_rank, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_0", "rank_1"]
