"""Rate and time left of this run; a bar on a terminal, else lines."""

import sys

import pytest

from jepa_kit import progress as module
from jepa_kit.progress import Progress, clock, duration, number_of


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets."""
    time = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_a_line_for_each_tenth(now, capsys):
    progress = Progress(1000, "samples")
    for done in range(0, 1001, 50):
        now[0] = done / 40
        progress.show(done)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == "100 of 1000 samples, 40/s, 0:22 left"
    assert lines[-1] == "1000 of 1000 samples, 40/s, 0:25 in all"


def test_slow_work_prints_a_line_a_minute(now, capsys):
    progress = Progress(10**6, "samples")
    for minute in range(4):
        now[0] = minute * 61.0
        progress.show(minute)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 1000000 samples, 0/s, 16944:25:39 left",
        "2 of 1000000 samples, 0/s, 16944:24:38 left",
        "3 of 1000000 samples, 0/s, 16944:23:37 left",
    ]


def test_the_rate_excludes_an_earlier_run(now, capsys):
    progress = Progress(1000, "samples")
    progress.show(790)
    now[0] = 10.0
    progress.show(900)
    assert capsys.readouterr().out == "900 of 1000 samples, 11/s, 0:09 left\n"


def test_a_total_that_is_known_later_and_a_scale(now, capsys):
    progress = Progress(1, "MB", scale=10**6)
    now[0] = 2.0
    progress.show(0, 8 * 10**6)
    progress.show(4 * 10**6, 8 * 10**6)
    assert capsys.readouterr().out == "4 of 8 MB, 2/s, 0:02 left\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(10, "samples")
    progress.show(4)
    progress.show(10)
    progress.close()
    text = capsys.readouterr()
    assert "shards: 100%" in text.err
    assert text.out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (750, "12:30"), (11100, "3:05:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (36, "36 s"), (91, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (4e6, "1,111.1 h")],
)
def test_a_duration_has_its_unit(seconds, text):
    assert duration(seconds) == text


def test_a_number_of_things():
    assert [number_of("run", count) for count in (0, 1, 1200)] == ["0 runs", "1 run", "1,200 runs"]
