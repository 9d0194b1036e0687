"""Default shards of the evaluation tools, and errors if there are none."""

import pytest

from jepa_kit.evaluation.shard_choice import evaluation_shards, held_out, shown_shards, training_shards


@pytest.fixture
def folder(tmp_path):
    """Make training and validation shards in one folder."""
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_held_out_shards_are_beside_the_training_shards(folder):
    train, val = str(folder / "train"), str(folder / "val")
    for shards in (train, f"{train}/", (train,), f"{train}/shard-000000.tar", f"{train}/shard-{{000000..000007}}.tar"):
        assert held_out(shards) == val
    assert held_out(val) is None  # training shards are not held out
    (folder / "test").mkdir()
    assert held_out(train) == str(folder / "test")
    assert held_out(val) == str(folder / "test")


@pytest.mark.parametrize("shards", ["https://host/train", "pipe:cat train.tar", ("a", "b")])
def test_remote_shards_and_lists_have_no_held_out_shards(shards, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert held_out(shards) is None
    assert shown_shards(None, shards) == shards


def test_given_shards_have_priority(folder):
    train = str(folder / "train")
    assert training_shards("given", train) == "given"
    assert training_shards(None, (train, "other")) == (train, "other")
    assert evaluation_shards("given", train) == "given"
    assert evaluation_shards(None, train) == str(folder / "val")
    assert shown_shards("given", train) == "given"
    assert shown_shards(None, train) == str(folder / "val")
    assert shown_shards(None, str(folder / "val")) == str(folder / "val")


def test_shards_that_nobody_named():
    with pytest.raises(ValueError) as error:
        training_shards(None, None)
    assert str(error.value).startswith("--train-shards must name a folder of shards: the run's config has none")
    with pytest.raises(ValueError) as error:
        evaluation_shards(None, ("a", "b"))
    assert str(error.value) == "--test-shards must name a folder of shards: there is no test or val beside a, b"
    with pytest.raises(ValueError) as error:
        shown_shards(None, None)
    assert str(error.value).startswith("--shards must name a folder of shards: the run's config has none")
