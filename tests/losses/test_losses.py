"""Losses against their formulae in float64, uniform and ragged, with gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import Tensor

from jepa_kit.losses import L1, L2, Cosine, CrossEntropy, SmoothL1, is_distance
from jepa_kit.registry import LOSSES
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import MaskBatch, PatchSets, Prediction

WIDTH = 6
RAGGED, UNIFORM = (1, 5, 2), (3, 3, 3)


def make_prediction(lengths: tuple[int, ...], scale: float = 1.5, dtype: torch.dtype = torch.float64) -> Prediction:
    torch.manual_seed(0)
    total, sets = sum(lengths), len(lengths)
    one_each = PatchSets(torch.zeros(sets).long(), torch.arange(sets), SetLengths([1] * sets))
    targets = PatchSets(torch.arange(total) % 16, torch.arange(sets), SetLengths(lengths))
    masks = MaskBatch(one_each, targets, (4, 4), torch.arange(sets))
    a, b = (scale * torch.randn(total, WIDTH, dtype=torch.float64) for _ in range(2))
    return Prediction(a.to(dtype).requires_grad_(), b.to(dtype), torch.zeros(sets, WIDTH, dtype=dtype), masks)


def smooth_l1(a: list[float], b: list[float], beta: float = 1.0) -> float:
    errors = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(e * e / (2 * beta) if e < beta else e - beta / 2 for e in errors) / len(errors)


def l2(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


def l1(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


OF_A_TOKEN: dict[str, Callable[[list[float], list[float]], float]] = {
    "smooth_l1": smooth_l1,
    "l2": l2,
    "l1": l1,
    "cosine": cosine,
}
BUILT_IN = [name for name in LOSSES.names() if LOSSES.get(name).__module__.startswith("jepa_kit.")]
DISTANCES = [name for name in BUILT_IN if is_distance(LOSSES.get(name))]


def expected_loss(name: str, p: Prediction) -> float:
    """Mean over the tokens of a set, then mean over the sets."""
    pairs = zip(p.prediction.tolist(), p.target.tolist(), strict=True)
    tokens = iter([OF_A_TOKEN[name](a, b) for a, b in pairs])
    return math.fsum(sum(next(tokens) for _ in range(n)) / n for n in p.masks.targets.lengths) / len(p.masks.targets)


@pytest.mark.parametrize("lengths", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("name", DISTANCES)
def test_is_its_formula(name: str, lengths: tuple[int, ...]) -> None:
    p = make_prediction(lengths)
    loss = LOSSES.build(name, {})(p)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected_loss(name, p), abs=1e-14)


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        (SmoothL1(), F.smooth_l1_loss),
        (L2(), F.mse_loss),
        (L1(), F.l1_loss),
        (Cosine(), lambda a, b: F.cosine_embedding_loss(a, b, torch.ones(len(a)))),
    ],
    ids=["smooth_l1", "l2", "l1", "cosine"],
)
def test_with_sets_of_one_length_it_is_torchs_mean(
    loss: Callable[[Prediction], Tensor], theirs: Callable[[Tensor, Tensor], Tensor]
) -> None:
    p = make_prediction(UNIFORM)
    assert loss(p).item() == pytest.approx(theirs(p.prediction, p.target).item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_smooth_l1_with_another_beta(beta: float) -> None:
    p = make_prediction(UNIFORM)
    pairs = zip(p.prediction.tolist(), p.target.tolist(), strict=True)
    expected = math.fsum(smooth_l1(a, b, beta) for a, b in pairs) / 9
    assert SmoothL1(beta=beta)(p).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("lengths", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("name", DISTANCES)
def test_gradient_by_finite_differences(name: str, lengths: tuple[int, ...]) -> None:
    p, loss = make_prediction(lengths), LOSSES.build(name, {})
    assert torch.autograd.gradcheck(lambda x: loss(Prediction(x, p.target, p.context, p.masks)), [p.prediction])


@pytest.mark.parametrize("name", DISTANCES)
def test_a_perfect_prediction_costs_nothing(name: str) -> None:
    p = make_prediction(RAGGED)
    assert LOSSES.build(name, {})(Prediction(p.target, p.target, p.context, p.masks)).item() == pytest.approx(
        0, abs=1e-15
    )


def test_every_built_in_loss_has_its_formula_here() -> None:
    assert set(DISTANCES) == set(OF_A_TOKEN)
    assert set(BUILT_IN) == {*DISTANCES, "cross_entropy", "vicreg", "sigreg", "visreg"}  # test_regularisers.py


@pytest.mark.parametrize("name", DISTANCES)
def test_all_patches_may_have_one_weight(name: str) -> None:
    p = make_prediction(RAGGED)
    pairs = list(zip(p.prediction.tolist(), p.target.tolist(), strict=True))
    expected = math.fsum(OF_A_TOKEN[name](a, b) for a, b in pairs) / len(pairs)
    found = LOSSES.build(name, {"average": "patches"})(p)
    assert found.item() == pytest.approx(expected, abs=1e-14)
    assert found.item() != pytest.approx(expected_loss(name, p), abs=1e-3)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_has_one_width(name: str) -> None:
    p = make_prediction(RAGGED)
    narrow = Prediction(p.prediction, p.target[:, :1], p.context, p.masks)
    message = r"one width, not \(8, 6\) and \(8, 1\); codes as targets need a loss such as 'cross_entropy'"
    with pytest.raises(ValueError, match=message):
        LOSSES.build(name, {})(narrow)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("average", ["images", "patches"])
@pytest.mark.parametrize("lengths", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_cross_entropy_is_that_of_each_code(lengths: tuple[int, ...], average: str, column: bool) -> None:
    p = make_prediction(lengths)
    codes = torch.arange(len(p.target)) % WIDTH
    chances = p.prediction.exp() / p.prediction.exp().sum(1, keepdim=True)
    each = iter([-math.log(row[code]) for row, code in zip(chances.tolist(), codes.tolist(), strict=True)])
    sets = [[next(each) for _ in range(n)] for n in lengths]
    by_set = [sum(values) / len(values) for values in sets]
    wanted = sum(by_set) / len(sets) if average == "images" else sum(map(sum, sets)) / sum(lengths)
    loss = LOSSES.build("cross_entropy", {"average": average})
    given = Prediction(p.prediction, codes[:, None] if column else codes, p.context, p.masks)
    assert loss(given).item() == pytest.approx(wanted, abs=1e-14)
    assert torch.autograd.gradcheck(lambda x: loss(Prediction(x, codes, p.context, p.masks)), [p.prediction])


@pytest.mark.parametrize("temperature", [1.0, 0.12])
@pytest.mark.parametrize("lengths", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_cross_entropy_with_distributions(lengths: tuple[int, ...], temperature: float) -> None:
    p = make_prediction(lengths)
    targets = p.target.softmax(1)
    log_p = torch.from_numpy(log_softmax(p.prediction.detach().numpy() / temperature, axis=1))
    loss = LOSSES.build("cross_entropy", {"average": "patches", "temperature": temperature})
    given = Prediction(p.prediction, targets, p.context, p.masks)
    assert loss(given).item() == pytest.approx(-(targets * log_p).sum(1).mean().item(), abs=1e-13)
    by_image = LOSSES.build("cross_entropy", {"temperature": temperature})
    assert by_image(given).item() == pytest.approx(p.mean(-(targets * log_p).sum(1)).item(), abs=1e-13)
    assert torch.autograd.gradcheck(lambda x: loss(Prediction(x, targets, p.context, p.masks)), [p.prediction])


@pytest.mark.parametrize(
    "targets", [torch.zeros(9), torch.zeros(9, 2).long(), torch.zeros(9, 1), torch.zeros(9, WIDTH, dtype=torch.int64)]
)
def test_cross_entropy_needs_codes_or_distributions(targets: Tensor) -> None:
    p = make_prediction(UNIFORM)
    message = (
        r"needs predictions \[P, K\] and as targets the code of each patch, int64 \[P\] or \[P, 1\], or its "
        r"probabilities \[P, K\]; not \(9, 6\) and"
    )
    with pytest.raises(ValueError, match=message):
        CrossEntropy()(Prediction(p.prediction, targets, p.context, p.masks))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf])
def test_a_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature \(={temperature}\) must be above 0 and finite"):
        CrossEntropy(temperature=temperature)


@pytest.mark.parametrize("name", [*DISTANCES, "cross_entropy"])
def test_an_average_that_does_not_exist(name: str) -> None:
    with pytest.raises(ValueError, match=r"average \(='sets'\) must be one of 'images', 'patches'"):
        LOSSES.build(name, {"average": "sets"})


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_smooth_l1_refuses_a_beta_that_is_not_positive(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta \(={beta}\) must be above 0 and finite; use the loss 'l1' for beta 0"):
        SmoothL1(beta=beta)
