"""Learning rates, weight decays and a linear probe against numbers of MAE's released code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_kit.evaluation.protocols import heads
from jepa_kit.evaluation.protocols.base import Features, LayerSet
from jepa_kit.evaluation.protocols.finetune import Classifier, Finetune, layer_groups
from jepa_kit.evaluation.protocols.heads import HeadGrid, Recipe, Setting
from jepa_kit.trials.recorded import Recorded


@pytest.fixture
def recorded(fixtures):
    return Recorded(fixtures / "methods" / "optim")


class Encoder(nn.Module):
    """The parameters of the recording by our names."""

    def __init__(self, depth):
        super().__init__()
        self.depth = depth
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, 2)) for n in (1, 5))
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(2, 2)})
        parts = {"norm1": nn.LayerNorm, "attn": lambda n: nn.Linear(n, n), "mlp": lambda n: nn.Linear(n, n)}
        self.blocks = nn.ModuleList(nn.ModuleDict({k: make(2) for k, make in parts.items()}) for _ in range(depth))
        self.norm = nn.LayerNorm(2)


def test_learning_rates_by_layer(recorded):
    meta = recorded.meta
    model = Classifier(Encoder(meta["depth"]), 2, 3)
    groups = layer_groups(model, lr=meta["lr"], weight_decay=meta["weight_decay"], decay=meta["layer_decay"])
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    ours = {name.removeprefix("encoder."): found[id(p)] for name, p in model.named_parameters()}
    theirs = {
        row["parameter"].replace("fc_norm", "norm"): (row["lr_scale"], row["weight_decay"])
        for row in recorded.numbers["groups"]
    }
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-14), name


def test_half_a_cosine(recorded):
    meta = recorded.meta
    protocol = Finetune(
        epochs=meta["epochs"], warmup_epochs=meta["warmup_epochs"], lr=meta["lr"], min_lr=meta["min_lr"]
    )
    for done, (half, whole) in zip(recorded.numbers["schedule_epochs"], recorded.numbers["schedule_lr"], strict=True):
        assert protocol.lr_after(done) == pytest.approx(whole, rel=1e-12, abs=1e-15)
        assert protocol.lr_after(done) / 2 == pytest.approx(half, rel=1e-12, abs=1e-15)


def test_four_steps_of_a_linear_probe(recorded, monkeypatch):
    monkeypatch.setattr(heads, "NORM_EPS", 1e-6)  # as in MAE
    features, weight = LayerSet("last"), recorded["probe/weight"]
    inputs = {features: Features(recorded["probe/x"].numpy())}
    setting = Setting(features, norm=True, lr=recorded.meta["probe_lr"], weight_decay=0.0)
    (group,) = HeadGrid([setting], inputs, len(weight)).groups
    for name in ("lr", "decay", "mean", "variance", "minus_one"):
        setattr(group, name, getattr(group, name).double())
    group.weight, group.bias = weight.T[:, None].clone(), recorded["probe/bias"][None].clone()  # [D, 1, K], [1, K]
    group.lr[:] = setting.lr
    recipe = Recipe(optimizer="lars", epochs=1, batch_size=len(recorded["probe/x"]))
    for step, loss in enumerate(recorded.numbers["probe_losses"]):
        x = recorded["probe/x"] + 0.1 * step
        whitened = (x - x.mean(0)) * (x.var(0, unbiased=False) + 1e-6).rsqrt()
        logits = whitened @ group.weight[:, 0] + group.bias[0]
        assert F.cross_entropy(logits, recorded["probe/labels"]).item() == pytest.approx(loss, abs=1e-12)
        group.step(x, recorded["probe/labels"], recipe, 1.0)
        torch.testing.assert_close(group.weight[:, 0].T, recorded[f"probe/weight_after{step}"], rtol=0, atol=1e-12)
    torch.testing.assert_close(group.mean, recorded["probe/running_mean"], rtol=0, atol=1e-8)
    torch.testing.assert_close(group.variance, recorded["probe/running_var"], rtol=0, atol=1e-8)
    found = group.logits(recorded["probe/x"])[:, 0]
    torch.testing.assert_close(found, recorded["probe/eval_logits"], rtol=0, atol=1e-8)
