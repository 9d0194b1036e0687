"""What two and four processes of test_parallel.py run: a few steps in every form, against one process.

python parallel_cases.py FOLDER two [four]
"""

import multiprocessing
import sys
from contextlib import nullcontext
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import free_port
from torch.distributed.tensor.debug import CommDebugMode

from jepa_kit.distributed.collectives import World, mean_over_ranks, process_group
from jepa_kit.encoders import ViT
from jepa_kit.encoders.blocks import Block, checkpoint_activations
from jepa_kit.engine.checkpoint.dcp import load_sharded, save_sharded
from jepa_kit.engine.checkpoint.state_dict import full_state, is_sharded, load_full_state, state_of
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.parallel import parallelize
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.losses import SmoothL1
from jepa_kit.maskers import MultiBlock
from jepa_kit.predictors import ViTPredictor
from jepa_kit.recipe import JEPA
from jepa_kit.structures import View
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget

BATCH, STEPS, SAVED = 8, 4, 2
DEVICE = torch.device("cpu")
MASKER = MultiBlock(grid=(4, 4))
CLIP = 0.05
"""Below the norm of every step."""


def make(seed=0, **options):
    torch.manual_seed(seed)
    encoder = ViT(image_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2, **options)
    predictor = ViTPredictor(embed_dim=16, out_dim=16, grid=(4, 4), width=8, depth=2, num_heads=2, **options)
    losses = [("smooth_l1", SmoothL1(), 1.0)]
    target = RepresentationTarget(embed_dim=16)
    return JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=EMA())


def batch(step, world):
    """This rank's part of a step's images and (ragged) masks."""
    part = BATCH // world.size
    mine = slice(world.rank * part, (world.rank + 1) * part)
    images = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(step))
    return images[mine], MASKER(np.arange(BATCH)[mine] + BATCH * step, seed=0, epoch=0, step=step)


class Training:
    """A run; ``forward`` makes of the model what a step calls, or is None for one process on the whole batch."""

    def __init__(self, world=None, mode="auto", accumulate=1, *, jepa=None, clip_grad=None, bf16=False):
        self.world, self.clip_grad = world or World(), clip_grad
        self.jepa = make() if jepa is None else jepa
        self.forward = None if world is None else parallelize(self.jepa, DEVICE, mode, accumulate)
        self.optimizer = build_optimizer(self.jepa)
        self.autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if bf16 else nullcontext

    def step(self, step):
        """[loss, its term, norm of the gradients]."""
        images, masks = batch(step, self.world)
        out = train_step(
            self.jepa,
            self.optimizer,
            Hyper(lr=1e-3, weight_decay=0.04, momentum=0.9),
            [View(images, masks)],
            forward=self.forward,
            autocast=self.autocast,
            clip_grad=self.clip_grad,
        )
        numbers = torch.stack([out.loss, *out.terms.values(), out.grad_norm]).detach()
        return numbers if self.forward is None else mean_over_ranks(numbers)

    def steps(self, first=0, end=STEPS):
        return torch.stack([self.step(k) for k in range(first, end)])


def close(found, wanted, what, atol=1e-6):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def same_state(found, wanted, what, atol=1e-6):
    """Compares two (model, optimizer)."""
    for part, name in ((0, "model"), (1, "optimizer")):
        close(found[part], wanted[part], f"{what}, {name}", atol)


def check_equality(world):
    """Every form of a step gives the numbers of one process."""
    plain, clipped = Training(), Training(clip_grad=CLIP)
    wanted, wanted_clipped = plain.steps(), clipped.steps()
    assert (wanted_clipped[:, 2] > CLIP).all()
    for mode, accumulate, clip_grad, checkpointing in (
        ("auto", 1, None, False),
        ("ddp", 2, CLIP, True),
        ("fsdp", 1, CLIP, True),
        ("fsdp", 2, None, False),
        ("fsdp", 5, None, False),  # more parts than a rank's images
    ):
        what = f"{mode}, {accumulate} parts, clip_grad {clip_grad}, checkpointing {checkpointing}"
        jepa = make(seed=world.rank)  # rank 0's weights are taken
        if checkpointing:
            checkpoint_activations(jepa)
        run = Training(world, mode, accumulate, jepa=jepa, clip_grad=clip_grad)
        close(run.steps(), wanted_clipped if clip_grad else wanted, what)
        found = full_state(run.jepa, run.optimizer)
        if world.is_main:
            same_state(found, full_state_of(clipped if clip_grad else plain), what)
        else:
            assert found == ({}, {})
    return run


def full_state_of(run):
    """Of a run in one process, whatever ranks there are."""
    groups = run.optimizer.param_groups
    named = {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}
    return run.jepa.state_dict(), {name: dict(run.optimizer.state[p]) for name, p in named.items()}


def check_sharding(run, world):
    """What FSDP left to this process: its part of everything, moved without a word to the others."""
    assert all(is_sharded(p) for p in run.jepa.parameters())
    blocks = [m for m in run.jepa.modules() if isinstance(m, Block)]
    assert len(blocks) == 6
    assert all(hasattr(block, "unshard") for block in blocks)
    whole = sum(p.numel() for p in run.jepa.parameters())
    part = sum(p.to_local().numel() for p in run.jepa.parameters())
    assert part < 1.1 * whole / world.size, (part, whole)
    before = [p.full_tensor().clone() for p in run.jepa.target_encoder.parameters()]
    with CommDebugMode() as communication:
        run.jepa.update_target(0.75)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    for p, old, new in zip(run.jepa.target_encoder.parameters(), before, run.jepa.encoder.parameters(), strict=True):
        close(p.full_tensor(), 0.75 * old + 0.25 * new.full_tensor(), "average")
    images = batch(0, World())[0]  # networks can be called by themselves, as evaluation does
    with torch.no_grad():
        tokens = run.jepa.encoder_for("target")(images)
        target = run.jepa.encoder_for("target")
        layers = target.forward_layers(images, layers=(target.depth - 1, target.depth))
    assert torch.equal(tokens, layers[1])


def check_bf16(world):
    """Sharded, autocast rounds where it rounds in one process."""
    found = Training(world, "fsdp", bf16=True).steps()
    close(found, Training(bf16=True).steps(), "bf16", 1e-4)


def check_compiled(world):
    from jepa_kit.encoders import compiled

    compiled.COMPILER = "aot_eager"
    wanted = Training().steps(0, 3)
    for mode, checkpointing in (("ddp", False), ("fsdp", True)):
        jepa = make(compile=True)
        if checkpointing:
            checkpoint_activations(jepa)
        close(Training(world, mode, 2, jepa=jepa).steps(0, 3), wanted, f"compiled, {mode}")


def check_checkpoints(world, folder, other):
    """Saves a run after ``SAVED`` steps in both forms, and goes on from there; and from the folder of another world."""
    run = Training(world, "fsdp")
    run.steps(0, SAVED)
    save_sharded(folder / "shards", *state_of(run.jepa, run.optimizer))
    state = full_state(run.jepa, run.optimizer)
    if world.is_main:
        torch.save(state, folder / "whole.pt")
    mean_over_ranks(torch.zeros(1))  # the file is there
    wanted = Training().steps()[SAVED:]
    again = Training(world, "fsdp", jepa=make(seed=1))
    model, optimizer_state = torch.load(folder / "whole.pt", weights_only=True)
    load_full_state(again.jepa, model, again.optimizer, optimizer_state)
    close(again.steps(SAVED), wanted, "whole")
    for source, mode in ((folder, "ddp"), (other or folder, "fsdp")):
        again = Training(world, mode, jepa=make(seed=1))
        load_sharded(source / "shards", again.jepa, again.optimizer)
        close(again.steps(SAVED), wanted, f"shards of {source.name}, {mode}")


def one_rank(world, folder=None, other=None):
    with process_group(world, DEVICE):
        if folder is None:
            check_bf16(world)
            check_compiled(world)
            return
        folder.mkdir(exist_ok=True)
        check_sharding(check_equality(world), world)
        check_checkpoints(world, folder, other)


def launch(size, work, *arguments):
    """Runs ``work(world, *arguments)`` in so many processes; exits with 1 where one fails."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(World(k, k, size), *arguments), daemon=True) for k in range(size)]
    with free_port() as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", port)
        for rank in ranks:
            rank.start()
        running = list(ranks)
        while running:
            wait([rank.sentinel for rank in running])
            if any(rank.exitcode for rank in running):  # the others wait for it, and end with this process, as daemons
                sys.exit(1)
            running = [rank for rank in running if rank.exitcode is None]


if __name__ == "__main__":
    if sys.argv[1] == "rest":
        launch(2, one_rank)
    else:
        folder = Path(sys.argv[1])
        launch(2, one_rank, folder / "two")
        if "four" in sys.argv:
            launch(4, one_rank, folder / "four", folder / "two")
