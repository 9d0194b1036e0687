import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from jepa_kit.engine.distributed import World
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.telemetry import Journal, Meter, plot_curves, read_metrics
from jepa_kit.structures import MaskBatch, PatchSets

MASKS = MaskBatch(
    context=PatchSets(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1]), (2, 3)),
    targets=PatchSets(torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([0, 1]), (3, 3)),
    grid=(4, 4),
    context_of=torch.tensor([0, 1]),
)
HYPER = Hyper(lr=1e-3, weight_decay=0.05, momentum=0.99)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def output(loss=0.75):
    loss = torch.tensor(loss)
    return SimpleNamespace(loss=loss, terms={"l2": loss / 3, "variance": loss * 2 / 3})


def make_meter(clock, size=1):
    return Meter(world=World(size=size), batch_size=8, steps_per_epoch=4, clock=clock)


def test_a_record_has_what_was_measured():
    clock = Clock()
    meter = make_meter(clock, size=2)
    for _ in range(2):
        with meter.waiting():
            clock.now += 1.0
        clock.now += 3.0
        meter.count(MASKS)
    with meter.pausing():
        clock.now += 50.0
    record = meter.record(5, HYPER, output(), MASKS)
    assert record == pytest.approx(
        {
            "step": 5,
            "epoch": 1,
            "samples": 48,
            "loss": 0.75,
            "loss/l2": 0.25,
            "loss/variance": 0.5,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "momentum": 0.99,
            "images_per_second": 2 * 8 / 8.0,
            "tokens_per_second": 2 * 2 * 11 / 8.0,
            "data_wait": 2.0 / 8.0,
            "context_length": 2.5,
            "target_length": 3.0,
        }
    )
    json.dumps(record)


def test_each_record_starts_anew():
    clock = Clock()
    meter = make_meter(clock)
    for _ in range(2):
        clock.now += 2.0
        meter.count(MASKS)
        record = meter.record(0, HYPER, output(), MASKS)
    assert record["images_per_second"] == 4.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(loss):
    message = rf"the loss is {loss} at step 7 \(lr 0.001, momentum 0.99\): the run has diverged; a smaller optim.lr"
    with pytest.raises(FloatingPointError, match=message):
        make_meter(Clock()).record(7, HYPER, output(loss), MASKS)


def record(step, loss=0.5):
    return {
        "step": step,
        "epoch": 0,
        "samples": 8 * (step + 1),
        "loss": loss,
        "loss/l2": loss / 2,
        "loss/l1": loss / 2,
        "lr": 1e-3 * step,
        "weight_decay": 0.04,
        "momentum": 0.996,
        "images_per_second": 16.0,
        "data_wait": 0.25,
    }


def test_lines_for_programs_and_for_people(tmp_path, capsys):
    with Journal(tmp_path, first_step=0, steps=100, bar=False) as journal:
        journal.write(record(9))
        journal.advance()
        assert read_metrics(tmp_path) == [record(9)]  # flushed at once
        journal.say("hello")
    assert capsys.readouterr().out == (
        "step  10/100  epoch 0  loss 0.5000  lr 9.00e-03  momentum 0.9960  16 images/s  data wait 25%  0:00:45 left\n"
        "hello\n"
    )


def test_a_bar_on_a_terminal(tmp_path, capsys):
    with Journal(tmp_path, first_step=4, steps=10, bar=True) as journal:
        journal.write(record(4))
        journal.advance()
        journal.say("hello")
    printed = capsys.readouterr()
    assert "5/10" in printed.err
    assert "loss 0.5000" in printed.err
    assert "hello" in printed.out
    assert read_metrics(tmp_path) == [record(4)]


def test_resumed_runs_have_no_line_twice(tmp_path):
    with Journal(tmp_path, first_step=0, steps=10, bar=False) as journal:
        for step in range(6):
            journal.write(record(step, loss=1.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    with Journal(tmp_path, first_step=4, steps=10, bar=False) as journal:
        for step in range(4, 8):
            journal.write(record(step, loss=2.0))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["loss"] for line in lines] == [1.0] * 4 + [2.0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_broken_line_inside(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON: "):
        read_metrics(tmp_path)


def test_curves(tmp_path):
    assert plot_curves(tmp_path) is None
    with Journal(tmp_path, first_step=0, steps=3, bar=False) as journal:
        for step in range(3):
            journal.write(record(step))
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as picture:
        assert picture.size == (1200, 576)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
