import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kit.engine.logging import telemetry
from jepa_kit.engine.logging.telemetry import Journal, Meter, read_metrics
from jepa_kit.engine.schedules import Hyper
from jepa_kit.planning import peak_flops
from jepa_kit.planning.flops import Lengths, ModelFlops, SetFlops
from jepa_kit.structures import MaskBatch, PatchSets, View

MASKS = MaskBatch(
    context=PatchSets(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1]), (2, 3)),
    targets=PatchSets(torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([0, 1]), (3, 3)),
    grid=(4, 4),
    context_of=torch.tensor([0, 1]),
)
VIEWS = [View(torch.zeros(2, 3, 16, 16), MASKS)]
HYPER = Hyper(lr=1e-3, weight_decay=0.05, momentum=0.99)
# sum(n) = 5, 6, 32 and sum(n^2) = 13, 18, 512 for contexts, targets and whole images; sequences of 5 and 6


def predictor_flops(lengths: Lengths) -> float:
    return SetFlops(7.0, 1.0)(lengths.sequences) + 3.0 * int(lengths.context.sum()) + 2.0 * int(lengths.targets.sum())


FLOPS = ModelFlops(SetFlops(100.0, 10.0), predictor_flops, "images", False)
ENCODER, TARGET_ENCODER, PREDICTOR = 500 + 130, 3200 + 5120, 7 * 11 + 25 + 36 + 3 * 5 + 2 * 6


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def output(loss=0.75):
    loss = torch.tensor(loss)
    terms = {"l2": loss / 3, "variance": loss * 2 / 3}
    return SimpleNamespace(loss=loss, terms=terms, figures={"entropy": loss * 2}, grad_norm=torch.tensor(0.125))


def make_meter(clock, **options):
    return Meter(clock=clock, patch_size=4, **options)


def test_a_record_has_what_was_measured(monkeypatch):
    monkeypatch.setattr("jepa_kit.engine.logging.telemetry.peak_memory", lambda device: 3 * 2**29)
    clock = Clock()
    meter = make_meter(clock, flops=FLOPS.of_batch, peak=1e6)
    for _ in range(2):
        with meter.waiting():
            clock.now += 1.0
        clock.now += 3.0
        meter.count(VIEWS)
    with meter.pausing():
        clock.now += 50.0
    record = meter.record(HYPER, output(), VIEWS)
    assert record == pytest.approx(
        {
            "loss": 0.75,
            "loss/l2": 0.25,
            "loss/variance": 0.5,
            "figures/entropy": 1.5,
            "grad_norm": 0.125,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "momentum": 0.99,
            "images_per_second": 2 * 2 / 8.0,
            "tokens_per_second": 2 * 11 / 8.0,
            "gflop_per_image": (TARGET_ENCODER + 3 * (ENCODER + PREDICTOR)) / 2 / 1e9,
            "tflops": 2 * (TARGET_ENCODER + 3 * (ENCODER + PREDICTOR)) / 8.0 / 1e12,
            "mfu": 2 * (TARGET_ENCODER + 3 * (ENCODER + PREDICTOR)) / 8.0 / 1e6,
            "data_wait": 2.0 / 8.0,
            "peak_memory_gib": 1.5,
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
        meter.count(VIEWS)
        record = meter.record(HYPER, output(), VIEWS)
    assert record["images_per_second"] == 1.0


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, {"gflop_per_image", "tflops", "mfu"}),
        ({"peak": 1e9}, {"gflop_per_image", "tflops", "mfu"}),
        ({"flops": FLOPS.of_batch}, {"mfu"}),
        (
            {"flops": ModelFlops(None, None, "images", False).of_batch, "peak": 1e9},
            {"gflop_per_image", "tflops", "mfu"},
        ),
    ],
)
def test_what_has_no_formula_is_left_out(options, left_out):
    clock = Clock()
    meter = make_meter(clock, **options)
    for _ in range(2):  # the second line starts anew
        clock.now += 1.0
        meter.count(VIEWS)
        record = meter.record(HYPER, output(), VIEWS)
        assert {"gflop_per_image", "tflops", "mfu"} - record.keys() == left_out


def test_several_views():
    """The tokens of all views count, and the lengths of all masks; an image counts once."""
    clock = Clock()
    meter = make_meter(clock, flops=FLOPS.of_batch)
    longer = MaskBatch(PatchSets.full(2, 9), PatchSets.full(2, 9), (3, 3), torch.tensor([0, 1]))
    views = [*VIEWS, View(torch.zeros(2, 3, 12, 12), longer), View(torch.zeros(2, 3, 8, 12))]
    clock.now += 2.0
    meter.count(views)
    record = meter.record(HYPER, output(), views)
    assert record["images_per_second"] == 1.0
    assert record["tokens_per_second"] == (11 + 2 * 18 + 2 * 6) / 2
    assert record["context_length"] == (2 + 3 + 9 + 9) / 4
    assert record["target_length"] == (3 + 3 + 9 + 9) / 4
    meter.count(views[2:])
    clock.now += 1.0
    record = meter.record(HYPER, output(), views[2:])
    assert record["tokens_per_second"] == 12.0
    assert not {"context_length", "target_length", "gflop_per_image", "tflops"} & record.keys()


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
        journal.info("hello")
    assert capsys.readouterr().out == (
        "step  10/100  epoch 0  loss 0.5000  lr 9.00e-03  momentum 0.9960  16 images/s  data wait 25%  0:00:45 left\n"
        "hello\n"
    )


def test_a_bar_on_a_terminal(tmp_path, capsys):
    with Journal(tmp_path, first_step=4, steps=10, bar=True) as journal:
        journal.write(record(4))
        journal.advance()
        journal.info("hello")
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


@pytest.mark.parametrize("line", ["{}", "[]", '{"step": "1"}'])
def test_a_line_that_is_not_of_a_step(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        read_metrics(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'metrics.jsonl'}, line 2 ({line}) must be a mapping with a 'step'"


def test_loggers_get_each_line(tmp_path):
    class Logger:
        def __init__(self):
            self.got = []

        def write(self, record):
            assert read_metrics(tmp_path)[-1] == record  # it is on the disk before
            self.got.append(record["step"])

        def close(self):
            self.got.append("closed")

    logger = Logger()
    with Journal(tmp_path, first_step=0, steps=9, bar=False, loggers=[logger]) as journal:
        journal.write(record(0))
        journal.write(record(4))
    assert logger.got == [0, 4, "closed"]


def test_a_step_that_was_left_out_has_a_line_for_programs_alone(tmp_path, capsys):
    line = {"step": 3, "epoch": 0, "samples": 32, "online/knn": 5.0}
    for bar in (False, True):
        with Journal(tmp_path, first_step=0, steps=9, bar=bar) as journal:
            journal.write(line)
        assert read_metrics(tmp_path) == [line]
    assert "loss" not in "".join(capsys.readouterr())


def test_the_short_line_tells_of_speed_and_of_images_left_out(tmp_path, capsys):
    with Journal(tmp_path, first_step=0, steps=100, bar=False) as journal:
        journal.write(record(9) | {"mfu": 0.123, "data/skipped": 3.0})
        journal.write(record(19) | {"data/skipped": 0.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("data wait 25%  mfu 12%  3 images skipped  0:00:45 left")
    assert second.endswith("data wait 25%  0:00:40 left")


def test_lines_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "share_of_peak": 0.25}\n')
    assert read_metrics(tmp_path) == [{"step": 3, "mfu": 0.25}]


def test_the_bar_has_room_for_itself(tmp_path, monkeypatch):
    """At 120 columns, with every figure and large numbers."""
    screen = io.StringIO()
    plain = telemetry.tqdm
    monkeypatch.setattr(
        telemetry, "tqdm", lambda **options: plain(**options | {"file": screen, "ncols": 120, "dynamic_ncols": False})
    )
    with Journal(tmp_path, first_step=10_000, steps=375_000, bar=True) as journal:
        journal.write(record(10_000) | {"mfu": 0.56, "images_per_second": 12_345.0})
        journal.bar.refresh()
    last = screen.getvalue().rsplit("\r", 1)[-1].rstrip()
    assert len(last) <= 120
    assert "loss 0.5000  12345 images/s  wait 25%  mfu 56%" in last
    assert len(last.split("|")[1]) >= 25


def test_reserved_memory_is_that_of_the_largest_rank():
    of_rank = dict.fromkeys(("images_per_second", "tokens_per_second", "peak_memory_gib", "flop", "peak"), math.nan)
    table = torch.tensor([[*of_rank.values(), memory] for memory in (3.0, 2.0)])
    record = telemetry.speed_over_ranks([*of_rank, "reserved_memory_gib"], table)
    assert record == {"reserved_memory_gib": 3.0}


# --- what figures are held against ---


def test_the_peak_is_that_of_products(monkeypatch):
    """With a machine of 1 GFLOP/s: sides are doubled until a product takes long enough."""
    sides = []

    def seconds(a, b):
        sides.append(len(a))
        return 2 * len(a) ** 3 / 1e9

    monkeypatch.setattr(peak_flops, "_seconds", seconds)
    assert peak_flops.matrix_peak.__wrapped__(torch.device("cpu"), "float32") == pytest.approx(1e9)
    assert set(sides) == {256}
    monkeypatch.setattr(peak_flops, "LONG_ENOUGH", 0.5)
    peak_flops.matrix_peak.__wrapped__(torch.device("cpu"), "bf16")
    assert set(sides) == {256, 512, 1024}


def test_on_cuda_five_products_are_timed_by_the_device(monkeypatch):
    recorded = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(self)

        def synchronize(self):
            assert recorded[-1] is self

        def elapsed_time(self, end):
            assert recorded == [self, end]
            return 20.0  # milliseconds

    products = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append((a, b)))
    with FakeTensorMode():
        a = torch.empty(4, 4, device="cuda")
        assert peak_flops._seconds(a, a) == pytest.approx(4e-3)
    assert len(products) == peak_flops.PRODUCTS == 5


def test_the_peak_is_measured_once_and_draws_nothing():
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    peak = peak_flops.matrix_peak(torch.device("cpu"), "float32")
    assert torch.rand(1) == first
    assert 1e8 < peak < 1e15
    assert peak_flops.matrix_peak(torch.device("cpu"), "float32") == peak


def test_peak_memory_is_that_of_the_process():
    before = peak_flops.peak_memory(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB
    after = peak_flops.peak_memory(torch.device("cpu"))
    assert after >= before
    assert after > held.nbytes
    del held
    assert peak_flops.peak_memory(torch.device("cpu")) > 0.99 * after  # Linux counts in batches of pages
