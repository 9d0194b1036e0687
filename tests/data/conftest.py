"""Small data sets for the tests of this room."""

import json

import pytest
from small_shards import make_samples, write_shards

from jepa_kit.data.shards.dataset import ShardDataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Put the cache of indexes into the folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@pytest.fixture
def samples():
    return make_samples(23)


@pytest.fixture
def folder(tmp_path, samples):
    """23 samples in shards of 10, 10 and 3."""
    return write_shards(tmp_path / "shards", samples, 10, {"class": ("a", "b", "c", "d")})


@pytest.fixture
def dataset(folder):
    return ShardDataset(folder)


@pytest.fixture
def edit_index(folder):
    """Change index.json by a function of its content."""

    def edit(change):
        path = folder / "index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit
