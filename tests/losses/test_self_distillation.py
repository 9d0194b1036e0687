"""Self-distillation against plain float64 maths in numpy and scipy, and over two processes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import centre_cases
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as entropy_of

from jepa_kit.losses.self_distillation import (
    CentredTargets,
    across_views,
    at_targets,
    check_temperature,
    cross_entropy,
    entropy,
    hidden_in,
    log_distributions,
    over_hidden,
)
from jepa_kit.structures import START, MaskBatch, PatchSets, Progress

OPTIONS = {"temperature": (0.04, 0.07), "warmup_epochs": 3, "momentum": 0.9}


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_centred_targets_are_softmax_of_centred_logits_and_the_centre_moves_afterwards():
    targets = CentredTargets(5, **OPTIONS).double()
    centre = np.zeros(5)
    for epoch, temperature in enumerate(np.linspace(0.04, 0.07, 3)):
        x = logits(2, 4, 5, seed=epoch)
        wanted = softmax((x.numpy() - centre) / temperature, axis=-1)
        np.testing.assert_allclose(targets(x, Progress(epoch=epoch, epochs=5)), wanted, rtol=0, atol=1e-13)
        centre = 0.9 * centre + 0.1 * x.numpy().mean((0, 1))
        np.testing.assert_allclose(targets.centre, centre, rtol=0, atol=1e-13)


def test_the_centre_is_in_the_state_and_does_not_move_in_eval_mode():
    targets = CentredTargets(5, **OPTIONS).double().eval()
    targets(logits(4, 5), START)
    assert targets.state_dict().keys() == {"centre"}
    assert not targets.centre.any()


@pytest.mark.parametrize(
    ("epochs", "wanted"), [(0, [0.07] * 4), (1, [0.04, 0.07, 0.07, 0.07]), (2, [0.04] + [0.07] * 3)]
)
def test_temperature_of_each_epoch(epochs, wanted):
    targets = CentredTargets(5, **{**OPTIONS, "warmup_epochs": epochs})
    assert [targets.temperature_at(k) for k in range(4)] == pytest.approx(wanted)


def test_half_precision_is_computed_in_float32():
    targets = CentredTargets(5, **OPTIONS)
    x = logits(4, 5).bfloat16()
    assert targets(x, START).dtype == log_distributions(x, 0.1).dtype == torch.float32
    torch.testing.assert_close(log_distributions(x, 0.1), log_distributions(x.float(), 0.1))


@pytest.mark.integration
def test_the_centre_of_two_processes_is_that_of_one(ranks):
    ranks(2, centre_cases.__file__)


@pytest.mark.parametrize(("teacher", "student"), [(2, 2), (2, 5), (3, 4)])
def test_cross_entropy_of_all_pairs_but_equal_ones(teacher, student):
    q, x = softmax(logits(teacher, 3, 6).numpy(), axis=-1), logits(student, 3, 6, seed=1)
    log_p = log_softmax(x.numpy() / 0.1, axis=-1)
    pairs = [(i, j) for i, j in itertools.product(range(teacher), range(student)) if i != j]
    wanted = np.mean([-(q[i] * log_p[j]).sum(-1).mean() for i, j in pairs])
    found = across_views(torch.from_numpy(q), log_distributions(x, 0.1))
    np.testing.assert_allclose(found, wanted, rtol=1e-13)
    rows = cross_entropy(torch.from_numpy(q[0]), torch.from_numpy(log_p[1]))
    np.testing.assert_allclose(rows, -(q[0] * log_p[1]).sum(-1), rtol=1e-13)


def masks_of(hidden: np.ndarray) -> MaskBatch:
    """In-place masks of booleans [B, N]; the target of an image without any is its last patch, which is shown."""
    count, patches = hidden.shape
    chosen = hidden.copy()
    chosen[~hidden.any(1), -1] = True
    context = replace(PatchSets.full(count, patches), hidden=torch.from_numpy(hidden).flatten())
    return MaskBatch(context, PatchSets.from_mask(chosen, np.arange(count)), (2, 3), torch.arange(count))


def test_patches_that_are_hidden_in_several_views() -> None:
    hidden = np.random.default_rng(0).random((2, 4, 6)) < 0.3
    hidden[1, 2] = False
    masks, errors = [masks_of(view) for view in hidden], logits(2, 4, 6)
    assert hidden_in(masks).tolist() == hidden.flatten().tolist()
    chosen = hidden.copy()
    chosen[~hidden.any(2), -1] = True
    packed = at_targets(errors.flatten(), masks)
    np.testing.assert_array_equal(packed, errors.numpy()[chosen])
    rows = at_targets(errors.flatten()[:, None], masks)
    np.testing.assert_array_equal(rows[:, 0], packed)
    wanted = [
        e[h].mean() if h.any() else 0.0 for e, h in zip(errors.numpy().reshape(8, 6), hidden.reshape(8, 6), strict=True)
    ]
    np.testing.assert_allclose(over_hidden(packed, masks), np.mean(wanted), rtol=1e-13)


def test_entropy_is_the_mean_over_rows_and_finite_for_zeros():
    q = softmax(logits(3, 4, 6).numpy(), axis=-1)
    np.testing.assert_allclose(entropy(torch.from_numpy(q)), entropy_of(q, axis=-1).mean(), rtol=1e-13)
    assert entropy(torch.eye(3)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": (0.04, 0.0)}, r"temperature \(=0.0\) must be above 0"),
        ({"temperature": (-1.0, 0.04)}, r"temperature \(=-1.0\) must be above 0"),
        ({"warmup_epochs": -1}, r"warmup_epochs \(=-1\) must be 0 or more"),
        ({"momentum": 1.5}, r"centre_momentum \(=1.5\) must be in \[0, 1\]"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CentredTargets(5, **{**OPTIONS, **options})


def test_temperature_that_is_no_number():
    with pytest.raises(ValueError, match=r"student_temperature \(=nan\) must be above 0"):
        check_temperature("student_temperature", float("nan"))
