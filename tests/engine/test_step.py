"""The order of an update, on a model small enough to be worked out by hand."""

import pytest
import torch
from torch import nn

from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.structures import Output, View


class Scalar(nn.Module):
    """loss = encoder * predictor * images; the target encoder averages the encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.predictor = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.target_encoder = nn.Linear(1, 1, bias=False).requires_grad_(False)
        for part, value in ((self.encoder, 2.0), (self.predictor, 3.0), (self.target_encoder, 2.0)):
            nn.init.constant_(part.weight, value)

    def forward(self, view, *, progress):
        images = view.images
        self.dtype = self.encoder(images).dtype
        loss = self.predictor(self.encoder(images)).float().mean()
        return Output(loss, {"l": loss})

    def adjust_gradients(self, progress):
        pass

    def update_target(self, momentum):
        with torch.no_grad():
            self.target_encoder.weight.lerp_(self.encoder.weight, 1.0 - momentum)


HYPER = Hyper(lr=0.5, weight_decay=0.2, momentum=0.75)


def test_one_update():
    model = Scalar()
    out = train_step(model, build_optimizer(model), HYPER, [View(torch.ones(1, 1))])
    assert out.loss.item() == 6.0
    # AdamW: theta * (1 - lr * weight_decay), then a first step of lr against the sign of the gradient
    assert model.encoder.weight.item() == pytest.approx(2.0 * 0.9 - 0.5)
    assert model.predictor.weight.item() == pytest.approx(3.0 * 0.9 - 0.5)
    # the target encoder follows the encoder as it is after the optimiser
    assert model.target_encoder.weight.item() == pytest.approx(0.75 * 2.0 + 0.25 * 1.3)
    assert all(p.grad is None for p in model.parameters())


def test_clips_the_norm_of_all_gradients_together():
    class Recorder(torch.optim.AdamW):
        def step(self):
            self.gradients = [p.grad.item() for group in self.param_groups for p in group["params"]]

    model = Scalar()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = Recorder([{"params": trained, "decayed": True}], fused=True)
    clipped = train_step(model, optimizer, HYPER, [View(torch.ones(1, 1))], clip_grad=1.0)
    assert optimizer.gradients == pytest.approx([3 / 13**0.5, 2 / 13**0.5], rel=1e-5)
    free = train_step(model, optimizer, HYPER, [View(torch.ones(1, 1))])
    assert optimizer.gradients == [3.0, 2.0]
    # both say the norm before clipping, and neither as a number that the device would be waited for
    assert isinstance(clipped.grad_norm, torch.Tensor)
    assert clipped.grad_norm.item() == free.grad_norm.item() == pytest.approx(13**0.5)


def test_autocast_is_around_the_forward_pass():
    model = Scalar()
    out = train_step(
        model,
        build_optimizer(model),
        HYPER,
        [View(torch.ones(1, 1))],
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )
    assert (model.dtype, out.loss.dtype, model.encoder.weight.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_a_wrapper_is_called_in_place_of_the_model():
    model, calls = Scalar(), []

    class Wrapper(nn.Module):
        def forward(self, view, *, progress):
            calls.append(view)
            return model(view, progress=progress)

    train_step(model, build_optimizer(model), HYPER, [View(torch.ones(1, 1))], forward=Wrapper())
    assert len(calls) == 1
