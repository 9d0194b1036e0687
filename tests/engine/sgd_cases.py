"""What two processes of test_sgd.py compute: SGD and LARS, sharded and not, against one process."""

import torch
from parallel_cases import DEVICE, batch, close, full_state_of, launch, make, same_state

from jepa_kit.distributed.collectives import World, mean_over_ranks, process_group
from jepa_kit.engine.checkpoint.state_dict import full_state
from jepa_kit.engine.optimizer import build_optimizer, is_decayed
from jepa_kit.engine.parallel import parallelize
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.structures import View


class Run:
    """Three steps with one of our optimisers; gradients are clipped one by one."""

    def __init__(self, name, world, mode):
        self.jepa = make()
        self.jepa.predictor.mask_token.no_decay = True
        forward = None if mode is None else parallelize(self.jepa, DEVICE, mode)
        assert not is_decayed("predictor.mask_token", self.jepa.predictor.mask_token)
        self.optimizer = build_optimizer(self.jepa, name=name)
        norms = []
        for step in range(3):
            out = train_step(
                self.jepa,
                self.optimizer,
                Hyper(lr=0.1, weight_decay=0.04, momentum=0.9),
                [View(*batch(step, world))],
                forward=forward,
                clip_grad=0.01,
                clip_each=True,
            )
            norms.append(out.grad_norm)
        self.norms = torch.stack(norms)


def one_rank(world):
    with process_group(world, DEVICE):
        for name in ("sgd", "lars"):
            alone = Run(name, World(), None)
            for mode in ("ddp", "fsdp"):
                together = Run(name, world, mode)
                close(mean_over_ranks(together.norms), alone.norms, f"{name}, {mode}")
                found = full_state(together.jepa, together.optimizer)
                if world.is_main:
                    same_state(found, full_state_of(alone), f"{name}, {mode}")


if __name__ == "__main__":
    launch(2, one_rank)
