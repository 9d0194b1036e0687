"""VICReg, SIGReg and VISReg against scipy and plain float64 maths, over two processes, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import regulariser_cases as cases
import regulariser_maths as maths
import torch
from scipy.integrate import quad
from scipy.stats import norm, wasserstein_distance

from jepa_kit.config import config_from_dict
from jepa_kit.errors import ConfigError
from jepa_kit.losses import SIGReg, VICReg, VISReg, is_distance
from jepa_kit.losses.sliced import quantiles
from jepa_kit.registry import LOSSES
from jepa_kit.structures import MaskBatch, PatchSets, Prediction, Progress

IMAGES, SETS, WIDTH = 7, 2, 5
NAMES = ("vicreg", "sigreg", "visreg")
SIZES = {"embed_dim": WIDTH, "out_dim": WIDTH}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prediction(images: int = IMAGES, dtype: torch.dtype = torch.float64) -> Prediction:
    x, y, context = (0.8 * noise(2 * images, WIDTH, seed=k) + 0.3 for k in range(3))
    return Prediction(x.to(dtype), y.to(dtype), context.to(dtype), cases.masks(images))


def by_set(x: torch.Tensor, sets: int = SETS) -> np.ndarray:
    """[V, N, D] of rows that are set by set."""
    return x.detach().double().unflatten(0, (sets, -1)).numpy()


def of_context(p: Prediction) -> np.ndarray:
    """[1, N, D]: a context has two patches, one after another."""
    return p.context.unflatten(0, (-1, 2)).mean(1)[None].numpy()


def directions(slices: int, seed: int = 9) -> torch.Tensor:
    drawn = noise(WIDTH, slices, seed=seed)
    return drawn / drawn.norm(dim=0)


# --- values ---


def test_vicreg_of_pairs():
    p = prediction()
    terms = VICReg(**SIZES).terms(p)
    x, y = by_set(p.prediction), by_set(p.target)
    assert terms["invariance"].item() == pytest.approx(((x - y) ** 2).mean(), abs=1e-14)
    assert terms["variance"].item() == pytest.approx((maths.variance(x) + maths.variance(y)) / 2, abs=1e-14)
    assert terms["covariance"].item() == pytest.approx(maths.covariance(x) + maths.covariance(y), abs=1e-14)
    total = VICReg(**SIZES, invariance=3.0, variance=2.0, covariance=0.5)(p)
    assert total.item() == pytest.approx(sum(w * float(terms[k]) for k, w in zip(terms, (3.0, 2.0, 0.5), strict=True)))


@pytest.mark.parametrize("of", ["prediction", "context"])
def test_vicreg_of_one_branch(of):
    p = prediction()
    z = by_set(p.prediction) if of == "prediction" else of_context(p)
    found = VICReg(**SIZES, of=of, invariance=0.0, variance=2.0, covariance=3.0)(p)
    assert found.item() == pytest.approx(2 * maths.variance(z) + 3 * maths.covariance(z), abs=1e-14)


def test_two_views_as_the_paper_has_them():
    """Of views and their mean: l2 is a quarter of the invariance, and the covariance half of the sum."""
    x, y = 0.7 * noise(2, IMAGES, WIDTH)
    rows = torch.cat([x, y])
    p = cases.masks(IMAGES)
    views = Prediction(rows, rows.unflatten(0, (2, -1)).mean(0).repeat(2, 1), rows, p)
    ours = 100 * LOSSES.build("l2", {})(views) + VICReg(**SIZES, of="prediction", invariance=0.0, covariance=2.0)(views)
    pairs = Prediction(x, y, x, one_set(IMAGES))
    torch.testing.assert_close(ours, VICReg(**SIZES)(pairs), rtol=1e-12, atol=0)


def one_set(images: int) -> MaskBatch:
    sets = PatchSets.from_padded(torch.zeros(images, 1, dtype=torch.int64))
    return MaskBatch(sets, sets, (1, 1), torch.arange(images))


@pytest.mark.parametrize(("points", "t_max"), [(17, 3.0), (9, 2.0)])
def test_sigreg_is_the_trapezoid_rule_over_the_whole_interval(points, t_max):
    z = 1.3 * noise(SETS, IMAGES, WIDTH) + 0.2
    found = SIGReg(**SIZES, points=points, t_max=t_max).double().compare(z.transpose(0, 1), directions(4))
    wanted = maths.sigreg(z.numpy(), directions(4).numpy(), points, t_max)
    assert found.item() == pytest.approx(wanted, rel=1e-6)  # tables in float32


def test_sigreg_is_the_integral_of_epps_and_pulley():
    x = 0.6 * noise(40, 1) + 0.5

    def integrand(t: float) -> float:
        value = np.exp(1j * t * x.numpy()).mean() - math.exp(-t * t / 2)
        return abs(value) ** 2 * math.exp(-t * t / 2)

    wanted = 40 * quad(integrand, -6, 6, epsabs=1e-12, limit=200)[0]
    loss = SIGReg(embed_dim=1, out_dim=1, points=1001, t_max=6.0).double()
    found = loss.compare(x[:, None], torch.ones(1, 1, dtype=torch.float64))
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_visreg_is_an_optimal_transport_to_quantiles():
    z = 1.3 * noise(SETS, IMAGES, WIDTH) + 0.2
    found = VISReg(**SIZES).terms(z.transpose(0, 1), directions(4))
    wanted = maths.visreg(z.numpy(), directions(4).numpy())
    assert {k: v.item() for k, v in found.items()} == pytest.approx(wanted, rel=1e-6)  # quantiles in float32
    np.testing.assert_allclose(quantiles(9), norm.ppf(np.arange(1, 10) / 10), atol=1e-6)


def test_stretched_quantiles_cost_what_scipy_says():
    q = quantiles(9).double().numpy()
    order = np.random.default_rng(0).permutation(9)
    z = torch.from_numpy(q[order])[:, None, None].requires_grad_()
    loss = VISReg(embed_dim=1, out_dim=1).terms(z, torch.ones(1, 1, dtype=torch.float64))
    scaled = q / q.std()
    distance = wasserstein_distance(scaled, q)  # all move outwards in proportion
    assert loss["shape"].item() == pytest.approx(distance**2 * (q**2).mean() / np.abs(q).mean() ** 2, rel=1e-4)


@pytest.mark.parametrize("name", ["sigreg", "visreg"])
def test_normal_embeddings_cost_less_than_others(name):
    normal = noise(512, 1, WIDTH)
    others = [normal * 3, normal + 2, normal * 0.01, normal.sign(), normal * torch.tensor([1.0, 1, 1, 1, 0.01])]
    loss = LOSSES.build(name, {"slices": 64}, **SIZES).double()
    costs = [loss.compare(x, directions(64)).item() for x in (normal, *others)]
    assert min(costs[1:]) > 3 * costs[0], costs


# --- as losses of a recipe ---


@pytest.mark.parametrize("of", ["prediction", "context"])
@pytest.mark.parametrize("name", ["sigreg", "visreg"])
def test_tokens_are_pooled_and_directions_are_those_of_the_step(name, of):
    p = prediction()
    loss = LOSSES.build(name, {"of": of, "slices": 6}, **SIZES).double()
    z = by_set(p.prediction) if of == "prediction" else of_context(p)
    drawn = loss.directions(p.progress, p.prediction)
    np.testing.assert_allclose(drawn.norm(dim=0), np.ones(6), rtol=1e-6)
    d = drawn.numpy()
    wanted = maths.sigreg(z, d) if name == "sigreg" else sum(maths.visreg(z, d).values())
    assert loss(p).item() == pytest.approx(wanted, rel=1e-6)


def test_directions_depend_on_seed_and_step_alone():
    loss, like = SIGReg(**SIZES, slices=4), torch.zeros(1)
    torch.manual_seed(1)
    first = loss.directions(Progress(step=3, seed=5), like)
    torch.manual_seed(2)
    assert torch.equal(first, loss.directions(Progress(step=3, seed=5), like))
    for other in (Progress(step=4, seed=5), Progress(step=3, seed=6)):
        assert not torch.equal(first, loss.directions(other, like))


@pytest.mark.parametrize("name", NAMES)
def test_a_projector_is_between_tokens_and_the_loss(name):
    torch.manual_seed(0)
    p = prediction()
    options = {} if name == "vicreg" else {"slices": 6}
    head = {"name": "mlp", "layers": 3, "hidden": 6, "out_dim": 4, "norm": "batch"}
    loss = LOSSES.build(name, {**options, "projector": head}, **SIZES).double()
    x, y = (loss.projector(rows) for rows in (p.prediction, p.target))  # batch norm is over all rows, in any order
    plain = LOSSES.build(name, options, embed_dim=WIDTH, out_dim=4).double()
    torch.testing.assert_close(loss(p), plain(Prediction(x, y, p.context, p.masks)))
    loss(p).backward()
    assert all(q.grad is not None and q.grad.isfinite().all() for q in loss.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_finite_differences(name):
    p = prediction(images=4)
    loss = LOSSES.build(name, {} if name == "vicreg" else {"slices": 3}, **SIZES).double()
    if name == "visreg":  # its shape has none through the deviation
        drawn = directions(3)
        x = p.prediction.unflatten(0, (2, -1)).transpose(0, 1).clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: loss.terms(z, drawn)["scale"] + loss.terms(z, drawn)["centre"], [x])
        return
    x = p.prediction.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(Prediction(z, p.target, p.context, p.masks)), [x])


def test_no_gradient_passes_through_the_deviation_of_the_shape():
    z = noise(6, 1, 3).requires_grad_()
    d = torch.eye(3, dtype=torch.float64)
    (found,) = torch.autograd.grad(VISReg(embed_dim=3, out_dim=3).terms(z, d)["shape"], z)
    fixed = z.detach().std(0, correction=0, keepdim=True) + 1e-6
    x = z.detach().clone().requires_grad_()
    values = ((x - x.mean(0, keepdim=True)) / fixed)[:, 0].sort(0).values
    (wanted,) = torch.autograd.grad((values - quantiles(6).double()[:, None]).square().mean(), x)
    torch.testing.assert_close(found, wanted)


def test_equal_embeddings_have_finite_gradients():
    for name in NAMES:
        p = prediction(dtype=torch.float32)
        x = torch.ones_like(p.prediction, requires_grad=True)
        LOSSES.build(name, {}, **SIZES)(Prediction(x, x, x, p.masks)).backward()
        assert x.grad.isfinite().all(), name


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_does_not_round_the_statistics(name):
    p = prediction(dtype=torch.bfloat16)
    exact = Prediction(p.prediction.float(), p.target.float(), p.context.float(), p.masks)
    loss = LOSSES.build(name, {}, **SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(p)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(exact), rtol=0, atol=0)


@pytest.mark.integration
def test_two_processes_are_one_with_all_images(ranks):
    ranks(2, cases.__file__)


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vicreg", {"of": "views"}, r"of \(='views'\) must be one of 'pairs', 'prediction', 'context'"),
        ("vicreg", {"of": "context"}, r"invariance \(=25.0\) must be 0 if of is 'context': it compares pairs"),
        ("vicreg", {"variance": -1.0}, r"variance \(=-1.0\) must be 0 or more, and finite"),
        ("vicreg", {"covariance": math.inf}, r"covariance \(=inf\) must be 0 or more, and finite"),
        ("sigreg", {"of": "pairs"}, r"of \(='pairs'\) must be one of 'prediction', 'context'"),
        ("sigreg", {"slices": 0}, r"slices \(=0\) must be at least 1"),
        ("sigreg", {"points": 1}, r"points \(=1\) must be at least 2"),
        ("sigreg", {"t_max": 0.0}, r"t_max \(=0.0\) must be above 0 and finite"),
        ("visreg", {"slices": 0}, r"slices \(=0\) must be at least 1"),
        ("visreg", {"projector": {"name": "mlp", "out_dim": 0}}, r"^projector: out_dim \(=0\) must be at least 1"),
    ],
)
def test_refused_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES.build(name, options, **SIZES)


@pytest.mark.parametrize("name", NAMES)
def test_images_with_unequally_many_sets(name):
    image = torch.tensor([0, 1, 1])
    sets = PatchSets.from_padded(torch.zeros(3, 1, dtype=torch.int64), image)
    masks = MaskBatch(one_set(2).context, sets, (1, 1), image)
    x = noise(3, WIDTH)
    with pytest.raises(ValueError, match="all must have equally many sets, not 1 to 2"):
        LOSSES.build(name, {}, **SIZES).double()(Prediction(x, x, noise(2, WIDTH), masks))


@pytest.mark.parametrize("name", ["vicreg", "visreg"])
def test_one_image(name):
    with pytest.raises(ValueError, match="needs at least 2 images in the batch of all processes, not 1"):
        LOSSES.build(name, {}, **SIZES).double()(prediction(images=1))


def test_options_of_a_projector_are_checked_with_the_config():
    raw = {
        "masker": {"name": "random"},
        "encoder": {"name": "vit", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
        "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
        "target": {"name": "representation"},
        "target_update": {"name": "ema"},
        "data": {"image_size": 16},
    }
    head = {"name": "mlp", "out_dim": 3, "hidden": 4}
    config = config_from_dict({**raw, "loss": {"name": "vicreg", "projector": head}})
    projector = config.losses[0][0].options["projector"]
    assert (projector["layers"], projector["norm"]) == (2, "none")
    assert config_from_dict(config.to_dict()) == config
    none = config_from_dict({**raw, "loss": {"name": "vicreg"}})
    assert none.losses[0][0].options["projector"] is None
    assert config_from_dict(none.to_dict()) == none
    with pytest.raises(ConfigError, match=r"loss.projector.widht is not an option of 'mlp'"):
        config_from_dict({**raw, "loss": {"name": "sigreg", "projector": {"name": "mlp", "widht": 3}}})


def test_none_is_a_distance():
    assert not any(is_distance(LOSSES.get(name)) for name in NAMES)
