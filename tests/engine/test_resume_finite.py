"""No run saves weights or moments that are not finite, nor resumes from them, in either form of a checkpoint."""

import math

import pytest
import torch

from jepa_kit.engine.checkpoint.async_save import Saver
from jepa_kit.engine.checkpoint.format import Checkpoint, load_checkpoint
from jepa_kit.engine.checkpoint.manager import Store
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.errors import CheckpointError
from jepa_kit.from_config import build_recipe
from jepa_kit.training import train

FORMS = ["file", "sharded"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "value"), [("encoder.norm.weight", math.nan), ("exp_avg_sq", math.inf)])
def test_what_is_not_finite_is_not_resumed(tiny, monkeypatch, form, name, value):
    config = tiny(f"checkpoint.format={form}", "train.epochs=1", "optim.warmup_epochs=0")
    plain = Saver._copy_to_host

    def spoiled(self, model, optimizer):
        model, optimizer = plain(self, model, optimizer)
        state = model if name in model else optimizer["encoder.norm.weight"]
        state[name].view(-1)[3] = value
        return model, optimizer

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_copy_to_host", spoiled)
        run = train(config)
    held = load_checkpoint(run)
    assert not (held.model | held.optimizer["encoder.norm.weight"])[name].isfinite().all()
    with pytest.raises(CheckpointError, match=rf"checkpoint_00000003\S* has weights that are NaN or infinite: {name}$"):
        train(config, resume=True)


@pytest.mark.parametrize("form", FORMS)
def test_moments_that_are_not_finite_are_not_saved(tiny, tmp_path, form):
    jepa = build_recipe(tiny())
    optimizer = build_optimizer(jepa)
    for parameter in jepa.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e30)  # finite, and its square is not
    optimizer.step()
    saver = Saver(Store(tmp_path / "run"), keep=1, sharded=form == "sharded")
    with pytest.raises(
        FloatingPointError, match=r"weights and moments are not finite after 1 steps, first exp_avg_sq of"
    ):
        saver.save(jepa, optimizer, Checkpoint(1, {}, {}, {}, {}, {}))
    assert not list(tmp_path.glob("run/checkpoint*"))
