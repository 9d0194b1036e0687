"""Two and four gloo processes, DDP and FSDP2, whole batches and parts: the numbers of one process."""

import io

import numpy as np
import parallel_cases
import pytest
import torch
from parallel_cases import SAVED, Training, batch, close, make, same_state
from PIL import Image

from jepa_kit.data.shards.writing import Sample, write_index, write_shard
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.build import build_run
from jepa_kit.engine.checkpoint.dcp import layout, load_sharded, read_full
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.parallel import Accumulated, parallelize
from jepa_kit.maskers import RELEASED, MultiBlock
from jepa_kit.structures import View
from jepa_kit.training import train

CPU = torch.device("cpu")


@pytest.mark.integration
@pytest.mark.parametrize("sizes", [["two"], pytest.param(["two", "four"], marks=pytest.mark.slow)])
def test_several_processes_train_as_one(ranks, tmp_path, sizes):
    ranks(1, parallel_cases.__file__, tmp_path, *sizes)
    for folder in [tmp_path / size for size in sizes]:  # read by one process, which knows nothing of the others
        whole = torch.load(folder / "whole.pt", weights_only=True)
        same_state(read_full(folder / "shards"), whole, folder.name, atol=0)
        assert {name: value.shape for name, value in layout(folder / "shards")[0].items()} == {
            name: value.shape for name, value in whole[0].items()
        }
        again = Training(jepa=make(seed=1))
        load_sharded(folder / "shards", again.jepa, again.optimizer)
        close(again.steps(SAVED), Training().steps()[SAVED:], f"one process, shards of {folder.name}")


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_compiled_and_in_bf16(ranks):
    ranks(1, parallel_cases.__file__, "rest")


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_add_up_to_the_batch(parts):
    """Ragged masks, and parts that are not equal."""
    wanted, found = Training(), Training(World(), accumulate=parts)
    close(found.steps(), wanted.steps(), f"{parts} parts")
    same_state((found.jepa.state_dict(), {}), (wanted.jepa.state_dict(), {}), f"{parts} parts")


def test_parts_have_the_masks_of_the_batch():
    """The released truncation cuts to the shortest of the batch, which a part would not know."""
    options = {**RELEASED, "min_keep": 4, "min_keep_target": 1}
    masks = MultiBlock(grid=(8, 8), **options)(np.arange(6), seed=0, epoch=0, step=0)
    parts = masks.split([0, 1, 4, 6])
    assert [len(part.context) for part in parts] == [1, 3, 2]
    assert {length for part in parts for length in part.context.lengths} == set(masks.context.lengths)


def test_the_loss_of_parts_has_the_value_of_the_whole_without_gradients_too():
    jepa = make()
    images, masks = batch(0, World())
    with torch.no_grad():
        out = Accumulated(jepa, 2)(View(images, masks))
        wanted = jepa(View(images, masks))
    close(out.loss, wanted.loss, "loss")
    close(out.terms, wanted.terms, "terms")
    assert all(p.grad is None for p in jepa.parameters())


def test_one_process_is_itself():
    jepa = make()
    assert parallelize(jepa, CPU) is parallelize(jepa, CPU, "none") is jepa


@pytest.mark.parametrize(
    ("mode", "accumulate", "message"),
    [
        (
            "ddp",
            1,
            r"train.parallel \(='ddp'\) needs several processes \(torchrun .*\), and this is one: 'auto' fits both",
        ),
        ("fsdp", 1, r"train.parallel \(='fsdp'\) needs several processes"),
        ("auto", 0, r"accumulate \(=0\) must be at least 1"),
    ],
)
def test_what_one_process_cannot_do(mode, accumulate, message):
    with pytest.raises(ValueError, match=message):
        parallelize(make(), CPU, mode, accumulate)


def test_several_processes_cannot_train_apart(monkeypatch):
    monkeypatch.setattr("jepa_kit.engine.parallel.joined", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"train.parallel \(='none'\) would train 3 independent copies; choose"):
        parallelize(make(), CPU, "none")


@pytest.mark.parametrize("parts", [9, 20])
def test_more_parts_than_images(parts):
    """What is left where images could not be used: the same step, in as many parts as on other ranks."""
    wanted, found = Training(), Training(World(), accumulate=parts)
    assert len(list(found.forward.split([View(*batch(0, World()))]))) == parts
    close(found.steps(), wanted.steps(), f"{parts} parts")
    same_state((found.jepa.state_dict(), {}), (wanted.jepa.state_dict(), {}), f"{parts} parts")


def test_parts_without_an_image_of_their_own_leave_no_trace():
    """Not even a rounding: gradients of 11 parts of 8 images are those of 8 parts, bit by bit."""
    images, masks = batch(0, World())
    gradients = []
    for parts in (8, 11):
        jepa = make()
        Accumulated(jepa, parts)(View(images, masks)).loss.backward()
        gradients.append([p.grad for p in jepa.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_run_goes_on_past_an_image_that_is_none(tiny, tmp_path):
    """Of 4 images and 4 parts, in one batch 3 are left."""
    samples = [Sample(f"{k}", "png", png(k) if k != 5 else b"no image") for k in range(20)]
    (tmp_path / "broken").mkdir()
    shard, rows = write_shard(str(tmp_path / "broken/shard-000000.tar"), samples)
    write_index(str(tmp_path / "broken"), [shard], [rows], classes={}, refused=[], made_by={})
    still = ("encoder.drop_path=0.0", "train.epochs=1", "train.steps_per_epoch=5", "optim.warmup_epochs=0")
    plain, parts = (
        read_metrics(
            train(
                tiny(
                    *still,
                    f"data.shards={tmp_path / 'broken'}",
                    f"train.accumulate={k}",
                    f"train.output_dir={tmp_path / str(k)}",
                )
            )
        )
        for k in (1, 4)
    )
    assert parts[-1]["data/skipped"] == plain[-1]["data/skipped"] == 1
    for line, wanted in zip(parts, plain, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=0, abs=1e-6)


def png(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("name", ["train.accumulate=2", "train.activation_checkpointing=true"])
def test_options_of_a_run_change_no_number(tiny, tmp_path, name):
    still = ("encoder.drop_path=0.0", "train.epochs=1", "optim.warmup_epochs=0", "checkpoint.every=3")
    plain, other = (
        read_metrics(train(tiny(*still, f"train.output_dir={tmp_path / str(k)}", *options)))
        for k, options in enumerate(((), (name,)))
    )
    for line, wanted in zip(other, plain, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=0, abs=1e-6)


def test_a_batch_that_parts_cannot_share(tiny):
    message = (
        r"train.batch_size \(=4\) must be divisible by the number of processes \(=1\) times train.accumulate \(=3\)"
    )
    with pytest.raises(ValueError, match=message):
        build_run(tiny("train.accumulate=3"), World(), CPU)
