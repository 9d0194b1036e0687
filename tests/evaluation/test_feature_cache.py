"""The cache of features: which are extracted again, and by several processes."""

import json
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import free_port

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.distributed.collectives import World
from jepa_kit.evaluation.feature_cache import FeatureStore
from jepa_kit.evaluation.feature_sources import Feature, pixel_network, run_networks
from jepa_kit.evaluation.features import load_run

SIZE = (16, 16)
IMAGES = ImageOptions(image_size=SIZE)


def wanted(run, sha="abc", **options):
    (target,) = run_networks(run, baselines=[], checkpoint_sha256=sha, **options)
    return [(target, Feature(4, "mean")), (target, Feature(3, "none"))]


@pytest.fixture
def run(tiny_run):
    return load_run(tiny_run[0])


def test_cached_features_equal_fresh_ones(run, scenes, tmp_path):
    asked = [*wanted(run), (pixel_network(4), Feature(0, "mean"))]
    fresh = FeatureStore().extract(asked, scenes[0], IMAGES)
    kept = FeatureStore(tmp_path).extract(asked, scenes[0], IMAGES)
    again = FeatureStore(tmp_path).extract(asked, scenes[0], IMAGES)
    assert list(fresh) == list(kept)
    for key, array in fresh.items():
        assert array.dtype == (np.float32 if key[1].pooling == "mean" else np.float16)
        assert np.array_equal(array, kept[key])
        assert np.array_equal(array, again[key])
        assert isinstance(again[key], np.memmap)
    assert len(list(tmp_path.glob("*.npy"))) == len(list(tmp_path.glob("*.json"))) == 3
    assert not list(tmp_path.glob("*.part"))
    words = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {(w["block"], w["pooling"]) for w in words} == {(4, "mean"), (3, "none"), (0, "mean")}
    assert {w["data"]["samples"] for w in words} == {96}


@pytest.fixture
def reads(monkeypatch):
    found = []
    files = ShardDataset.image_files
    monkeypatch.setattr(ShardDataset, "image_files", lambda self, s: (found.extend(s.tolist()), files(self, s))[1])
    return found


def test_each_dependency_of_a_feature_changes_its_key(run, tiny_run, scenes, tmp_path, reads):
    train, val = scenes
    FeatureStore(tmp_path).extract(wanted(run), train, IMAGES)
    assert len(reads) == 96
    FeatureStore(tmp_path).extract(wanted(run), train, IMAGES)
    assert len(reads) == 96
    other_precision = load_run(tiny_run[0], ["train.precision=bf16"])
    changed = [
        (wanted(run, sha="other"), train, SIZE),
        (wanted(run, encoders=["context"]), train, SIZE),
        (wanted(other_precision), train, SIZE),
        (wanted(run), val, SIZE),
        (wanted(run), train, (8, 8)),
    ]
    pytest.importorskip("simplejpeg")
    before = len(reads)
    for _ in range(2):
        FeatureStore(tmp_path).extract(wanted(run), train, ImageOptions(image_size=SIZE, decoder="fast"))
    assert len(reads) - before == 96
    for k, (asked, dataset, size) in enumerate(changed):
        before = len(reads)
        FeatureStore(tmp_path).extract(asked, dataset, ImageOptions(image_size=size))
        assert len(reads) - before == len(dataset), k


def test_images_of_too_many_pixels(run, scenes):
    with pytest.raises(ValueError, match=r"cannot be used: 16 x 20 pixels are more than max_pixels \(=300\) allows"):
        FeatureStore().extract(wanted(run), scenes[0], ImageOptions(image_size=SIZE, max_pixels=300))


def test_only_missing_features_are_extracted(run, scenes, tmp_path):
    first, second = wanted(run)
    FeatureStore(tmp_path).extract([first], scenes[0], IMAGES)
    (file,) = tmp_path.glob("*.npy")
    before = file.stat().st_mtime_ns
    FeatureStore(tmp_path).extract([first, second], scenes[0], IMAGES)
    assert file.stat().st_mtime_ns == before
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_unfinished_features_are_extracted_again(run, scenes, tmp_path, reads):
    asked = wanted(run)[:1]
    FeatureStore(tmp_path).extract(asked, scenes[0], IMAGES)
    (words,) = tmp_path.glob("*.json")
    words.unlink()
    FeatureStore(tmp_path).extract(asked, scenes[0], IMAGES)
    assert len(reads) == 2 * 96


def test_damaged_features_are_named(run, scenes, tmp_path, reads):
    asked = wanted(run)[:1]
    FeatureStore(tmp_path).extract(asked, scenes[0], IMAGES)
    (file,) = tmp_path.glob("*.npy")
    for size in (1000, 0):
        os.truncate(file, size)
        with pytest.raises(ValueError) as error:
            FeatureStore(tmp_path).extract(asked, scenes[0], IMAGES)
        assert str(error.value).startswith(f"{file} is damaged (")
        assert str(error.value).endswith("): delete it, and its features are extracted again")
    file.unlink()
    FeatureStore(tmp_path).extract(asked, scenes[0], IMAGES)
    assert len(reads) == 2 * 96


def test_a_network_without_an_identity_is_not_cached(run, scenes, tmp_path):
    networks = run_networks(run, baselines=[])
    FeatureStore(tmp_path / "features").extract([(networks[0], Feature(4, "mean"))], scenes[0], IMAGES)
    assert not list((tmp_path / "features").iterdir())


def test_several_processes_need_a_folder():
    with pytest.raises(ValueError) as error:
        FeatureStore(None, World(0, 0, 2))
    assert str(error.value) == "2 processes need a folder that all of them see: give --features DIR"


def extract_in_part(rank, run_folder, shards, folder, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    asked = wanted(load_run(run_folder))
    found = FeatureStore(folder, World(rank, rank, 2)).extract(asked, ShardDataset(shards), IMAGES)
    assert all(len(array) == 96 for array in found.values())
    dist.destroy_process_group()


@pytest.mark.integration
@pytest.mark.usefixtures("rank_server")
def test_two_processes_extract_the_same_as_one(run, tiny_run, scenes, tmp_path):
    with free_port() as port:
        given = (str(tiny_run[0]), scenes[0].path, str(tmp_path), port)
        mp.start_processes(extract_in_part, given, nprocs=2, start_method="forkserver")
    alone = FeatureStore().extract(wanted(run), scenes[0], IMAGES)
    together = FeatureStore(tmp_path).extract(wanted(run), scenes[0], IMAGES)
    for key, array in alone.items():
        np.testing.assert_allclose(array, together[key], atol=2e-3 if key[1].pooling == "none" else 1e-6)
