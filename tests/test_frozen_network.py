"""A frozen network: outside of everything that trains or saves, and compared on load."""

import copy
import re

import pytest
import torch
from torch import nn

from jepa_kit.engine.checkpoint.dcp import load_sharded, save_sharded
from jepa_kit.engine.checkpoint.state_dict import load_full_state
from jepa_kit.errors import CheckpointError
from jepa_kit.frozen import FrozenNetwork, digest_of


def make_network(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    network.embed_dim = 4
    return network


def make_model(seed=0):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "teacher": FrozenNetwork(make_network(seed), "teacher.pt")})
    return model.train()


def test_training_does_not_see_it():
    model = make_model()
    assert [name for name, _ in model.named_parameters()] == ["encoder.weight", "encoder.bias"]
    assert list(model.buffers()) == []
    assert [*model.state_dict()] == ["encoder.weight", "encoder.bias", "teacher._extra_state"]
    assert not any(p.requires_grad for p in model["teacher"].network.parameters())


def test_it_is_always_in_eval_mode():
    teacher = make_model()["teacher"]
    assert not teacher.training
    assert not teacher.train().training
    x = torch.randn(5, 3)
    assert torch.equal(teacher(x), make_network().eval()(x))
    assert not teacher(x).requires_grad


def test_it_has_what_the_network_has():
    teacher = make_model()["teacher"]
    assert teacher.embed_dim == 4
    with pytest.raises(AttributeError, match="no attribute 'depth'"):
        _ = teacher.depth
    assert not hasattr(teacher, "depth")
    assert copy.deepcopy(teacher).embed_dim == 4
    assert copy.deepcopy(teacher).network is not teacher.network


def test_it_moves_with_the_model():
    model = make_model().double()
    assert {p.dtype for p in model["teacher"].network.parameters()} == {torch.float64}
    assert {p.device.type for p in model.to("meta")["teacher"].network.parameters()} == {"meta"}


def test_another_network_is_an_error():
    model, same, other = make_model(), make_model(), make_model(seed=1)
    same.load_state_dict(model.state_dict())
    load_full_state(same.double(), model.state_dict())  # the digest is of the file, whatever the type is now
    message = re.escape("the frozen network teacher.pt is not that of the checkpoint: its weights have the SHA-256 ")
    for load in (other.load_state_dict, lambda state: load_full_state(other, state)):
        with pytest.raises(CheckpointError, match=message):
            load(model.state_dict())
    with pytest.raises(CheckpointError, match="the frozen network Linear is not that"):
        FrozenNetwork(nn.Linear(2, 2)).set_extra_state(model["teacher"].digest)


def test_shards_have_the_digest_too(tmp_path):
    model = make_model()
    save_sharded(tmp_path / "shards", model.state_dict(), {})
    load_sharded(tmp_path / "shards", make_model())
    with pytest.raises(CheckpointError, match=r"the frozen network teacher\.pt is not that of the checkpoint"):
        load_sharded(tmp_path / "shards", make_model(seed=1))


def test_a_digest_is_of_names_types_shapes_and_values():
    plain = nn.Linear(2, 3)
    changed = [copy.deepcopy(plain) for _ in range(3)]
    with torch.no_grad():
        changed[0].weight[0, 0] += 1
    changed[1].double()
    changed[2] = nn.Sequential(changed[2])
    assert torch.equal(digest_of(plain), digest_of(copy.deepcopy(plain)))
    assert len({tuple(digest_of(network).tolist()) for network in (plain, *changed)}) == 4
    assert not digest_of(plain.to("meta")).any()
