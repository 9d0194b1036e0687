"""A grid of heads against torch's own modules and optimisers, one head at a time."""

import numpy as np
import pytest
import torch
from protocol_problems import PROBLEM, TRAIN, TRAIN_LABELS, task
from torch import nn

from jepa_kit.engine.sgd import TRUST
from jepa_kit.evaluation.protocols import build_protocols
from jepa_kit.evaluation.protocols.base import Features, LayerSet
from jepa_kit.evaluation.protocols.heads import INIT, HeadGrid, Recipe, Setting, grid_probe
from jepa_kit.evaluation.protocols.linear import grid, paper_linear
from jepa_kit.rng import Stream, generator

LAST, LAST4 = LayerSet("last"), LayerSet("last4")
INPUTS = {LAST: Features(TRAIN[:, -4:]), LAST4: Features(TRAIN[:, :5], TRAIN[:, 5:])}
TARGETS = torch.from_numpy(TRAIN_LABELS)


def settings(lr=0.02):
    return [
        Setting(features, norm, rate, decay)
        for features in (LAST4, LAST)
        for norm in (False, True)
        for rate, decay in ((lr, 0.0), (lr / 5, 0.1), (lr, 0.02))
    ]


def logits(grid, k):
    return grid.logits(INPUTS, np.arange(50))[:, k]


RECIPES = {
    "sgd": Recipe(optimizer="sgd", epochs=3, batch_size=64, steps=(1, 2), nesterov=True),
    "adamw": Recipe(optimizer="adamw", epochs=3, batch_size=64),
    "lars": Recipe(optimizer="lars", epochs=3, batch_size=64),
}


@pytest.mark.parametrize("name", RECIPES)
def test_each_head_is_trained_as_if_alone(name):
    together = HeadGrid(settings(), INPUTS, 4).fit(INPUTS, TARGETS, RECIPES[name], seed=5)
    for k, setting in enumerate(settings()):
        alone = HeadGrid([setting], INPUTS, 4).fit(INPUTS, TARGETS, RECIPES[name], seed=5)
        torch.testing.assert_close(logits(together, k), logits(alone, 0), rtol=1e-4, atol=1e-4)


class PlainLARS(torch.optim.Optimizer):
    """Compute LARS by algorithm 1 of arXiv 1708.03888 for weights, and SGD with momentum for biases."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                local, update = 1.0, p.grad
                if p.ndim == 2:
                    update = update + group["weight_decay"] * p
                    local = TRUST * p.norm() / update.norm()
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(0.9).add_(local * update)
                p -= group["lr"] * velocity


def torchs_own(setting, recipe, x, targets, seed):
    """Train with nn.Linear, nn.BatchNorm1d, autograd and an optimiser."""
    linear = nn.Linear(x.shape[1], 4).double()
    start = generator(Stream.EVALUATION, seed=0, lane=3).normal(scale=INIT, size=(x.shape[1], 1, 4))
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(start[:, 0].T))
        linear.bias.zero_()
    head = nn.Sequential(*([nn.BatchNorm1d(x.shape[1], affine=False).double()] if setting.norm else []), linear)
    options = {"lr": setting.lr, "weight_decay": setting.weight_decay}
    optimizer = {
        "sgd": lambda: torch.optim.SGD(head.parameters(), momentum=0.9, nesterov=recipe.nesterov, **options),
        "adamw": lambda: torch.optim.AdamW(head.parameters(), **options),
        "lars": lambda: PlainLARS(head.parameters(), **options),
    }[recipe.optimizer]()
    per_epoch = len(x) // recipe.batch_size
    for epoch in range(recipe.epochs):
        order = generator(Stream.EVALUATION, seed=seed, epoch=epoch, lane=4).permutation(len(x))
        for step in range(per_epoch):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            optimizer.param_groups[0]["lr"] = setting.lr * recipe.factor(epoch + step / per_epoch)
            loss = nn.functional.cross_entropy(head(x[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("soft", [False, True])
def test_heads_are_torchs_own(name, soft):
    targets = TARGETS
    if soft:
        targets = torch.rand(400, 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    found = HeadGrid(settings(), INPUTS, 4).fit(INPUTS, targets, RECIPES[name], seed=5)
    for k, setting in enumerate(settings()):
        x = torch.from_numpy(INPUTS[setting.features].array).double()
        theirs = torchs_own(setting, RECIPES[name], x, targets.double() if soft else targets, seed=5)
        torch.testing.assert_close(logits(found, k).double(), theirs(x[:50]).detach(), rtol=2e-3, atol=2e-3)


def test_scores_are_accuracy_and_cross_entropy():
    found = HeadGrid(settings(), INPUTS, 4).fit(INPUTS, TARGETS, RECIPES["sgd"])
    index = np.arange(100, 300)
    for k, (accuracy, entropy) in enumerate(found.scores(INPUTS, TARGETS, index)):
        out = found.logits(INPUTS, index)[:, k]
        assert accuracy == pytest.approx(float((out.argmax(1) == TARGETS[index]).double().mean()))
        assert entropy == pytest.approx(float(nn.functional.cross_entropy(out, TARGETS[index])), rel=1e-5)


def test_a_head_that_diverges_is_not_chosen():
    options = [Setting(LAST4, False, lr, 0.0) for lr in (1e38, 1e-3)]
    recipe = Recipe(optimizer="sgd", epochs=3, batch_size=64)
    found = grid_probe("linear", task(*PROBLEM), options, recipe, 0.2)
    assert found.settings["chosen"]["lr"] == 1e-3
    assert found.settings["tried"][0]["cross_entropy"] is None
    with pytest.raises(ValueError) as error:
        grid_probe("linear", task(*PROBLEM), options[:1], recipe, 0.2)
    assert str(error.value) == "lr (=[1e+38]): every head diverged; take lower ones"


def test_the_best_on_held_out_samples_is_trained_again_on_all():
    recipe = Recipe(optimizer="adamw", epochs=4, batch_size=64)
    found = grid_probe("linear", task(*PROBLEM, seed=2), settings(), recipe, 0.2)
    tried = found.settings["tried"]
    best = max(range(len(tried)), key=lambda k: (tried[k]["validation"], -tried[k]["cross_entropy"]))
    assert found.settings["chosen"] == settings()[best].plain()
    assert found.validation == tried[best]["validation"]
    one = task(*PROBLEM, seed=2)
    train, test = (dict(part.features) for part in (one.train, one.test))
    alone = HeadGrid([settings()[best]], train, 4).fit(train, TARGETS, recipe, seed=2)
    assert np.array_equal(found.predictions, alone.logits(test, np.arange(200))[:, 0].argmax(1))


ONE_HEAD = {"layers": ("last4",), "heads": ("plain",)}
ALONE = {
    "linear": {**ONE_HEAD, "lrs": (1e-2,), "weight_decays": (0.0,), "epochs": 3},
    "paper_linear": {**ONE_HEAD, "lrs": (0.1,), "weight_decays": (0.0,), "epochs": 3, "batch_size": 64},
    "paper_transfer": {**ONE_HEAD, "dataset": "places205"},
    "count": ONE_HEAD,
    "distance": ONE_HEAD,
}


@pytest.mark.parametrize("name", ALONE)
def test_with_one_head_nothing_is_held_out(name, monkeypatch):
    """A single head is trained once, on all samples, even if a class has one; a holdout is rejected."""
    trained = []
    fit = HeadGrid.fit
    monkeypatch.setattr(HeadGrid, "fit", lambda self, *a, **k: trained.append(k.get("index")) or fit(self, *a, **k))
    rare = np.where(np.arange(400) == 7, 9, PROBLEM[1])
    one = task(PROBLEM[0], rare, *PROBLEM[2:])
    ((_, _, probe),) = build_protocols([{"name": name} | ALONE[name]])
    probe.check(rare, str)
    (found,) = probe(one)
    assert trained == [None]
    assert (found.validation, found.settings["holdout"], found.settings["tried"]) == (None, None, [])
    with pytest.raises(ValueError) as error:
        build_protocols([{"name": name, "holdout": 0.3} | ALONE[name]])
    assert str(error.value) == (
        f"protocol {name!r}: holdout (=0.3) would do nothing: one combination of layers, heads, lrs and weight_decays "
        "leaves nothing to choose"
    )


def test_one_head_that_diverges():
    ((_, _, probe),) = build_protocols([{"name": "linear"} | ALONE["linear"] | {"optimizer": "sgd", "lrs": (1e38,)}])
    with pytest.raises(ValueError) as error:
        probe(task(*PROBLEM))
    assert str(error.value) == "lr (=[1e+38]): every head diverged; take lower ones"


def test_schedules():
    steps = Recipe(optimizer="sgd", epochs=28, batch_size=1, steps=(8, 16, 24))
    assert [steps.factor(done) for done in (0, 7.9, 8, 16, 27)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    cosine = Recipe(optimizer="sgd", epochs=10, batch_size=1)
    assert [cosine.factor(done) for done in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


def test_paper_linear_scales_its_rates_by_the_batch():
    (found,) = paper_linear(epochs=1, holdout=0.2)(task(*PROBLEM))
    assert {s["lr"] for s in found.settings["tried"]} == {lr * 320 / 256 for lr in (0.01, 0.05, 0.001)}
    assert found.settings["recipe"]["steps"] == (15, 30, 45)
    assert len(found.settings["tried"]) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": ()}, "lrs (=()) must contain at least one value, and each once"),
        ({"layers": ("last", "last")}, "layers (=('last', 'last')) must contain at least one value, and each once"),
        ({"heads": ("mlp",)}, "heads (=('mlp',)) must be of plain, norm"),
        ({"lrs": (0.0,)}, "lrs (=(0.0,)) must be above 0"),
        ({"weight_decays": (-1.0,)}, "weight_decays (=(-1.0,)) must be at least 0"),
    ],
)
def test_invalid_grids(options, message):
    right = {"layers": ("last",), "heads": ("plain",), "lrs": (0.1,), "weight_decays": (0.0,)}
    with pytest.raises(ValueError) as error:
        grid(**(right | options))
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_invalid_recipes(name):
    with pytest.raises(ValueError) as error:
        Recipe(**({"optimizer": "sgd", "epochs": 1, "batch_size": 1} | {name: 0}))
    assert str(error.value) == f"{name} (=0) must be at least 1"
