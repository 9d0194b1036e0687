"""The generator against its authors' known answers, and against plain integers; its numbers against chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jepa_kit.rng import Stream, generator, philox4x32, uniforms

LEVEL = 1e-4
"""Of every statistical test here; the seeds are fixed."""


def hex_words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key (first word first), answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    low, high = hex_words(key)
    got = philox4x32(np.array(hex_words(counter), dtype=np.uint64), low | high << 32)
    assert got.tolist() == hex_words(answer)


def plain_philox(c: list[int], key: int) -> list[int]:
    """One counter, in Python's integers."""
    k = [key % 2**32, key >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q % 2**32, p >> 32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@settings(max_examples=50, deadline=None)
@given(
    stream=st.sampled_from(Stream),
    sample=st.integers(0, 2**40 - 1),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**32 - 1),
    attempt=st.integers(0, 2**16 - 1),
)
def test_a_draw_is_what_its_counter_says(
    stream: Stream, sample: int, count: int, seed: int, epoch: int, attempt: int
) -> None:
    """Pins the layout of the counter: a change of it would change every mask and crop of a run."""
    words: list[int] = []
    for block in range(3):
        counter = [block | attempt << 16, sample % 2**32, epoch, sample >> 32 | stream << 8]
        words += plain_philox(counter, seed)
    got = uniforms(stream, np.array([sample]), count, seed=seed, epoch=epoch, attempt=attempt)
    assert got.tolist() == [[word / 2**32 for word in words[:count]]]


def test_stream_numbers_do_not_change() -> None:
    assert {s.name: s.value for s in Stream} == {
        "MASK": 1, "MASK_SIZE": 2, "CROP": 3, "ORDER": 4, "FLIP": 5, "SCENE": 6, "EVALUATION": 7, "STEP": 8,
        "MASK_DROP": 9, "TRANSFORM": 10, "COMMON": 11, "VIEW": 12, "MASK_SHOW": 13, "MASK_SUBSET": 14,
    }  # fmt: skip


def test_rows_depend_on_their_sample_alone() -> None:
    samples = np.array([7, 2**40 - 1, 0, 123_456, 7])
    together = uniforms(Stream.CROP, samples, 6, seed=3, epoch=5)
    alone = [uniforms(Stream.CROP, samples[i : i + 1], 6, seed=3, epoch=5)[0] for i in range(5)]
    assert np.array_equal(together, alone)
    assert np.array_equal(together[0], together[4])


def test_the_first_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    samples = np.arange(4)
    many = uniforms(Stream.MASK, samples, 30, seed=0, epoch=0)
    for count in (1, 3, 4, 5, 17):
        assert np.array_equal(uniforms(Stream.MASK, samples, count, seed=0, epoch=0), many[:, :count])


def test_no_sample() -> None:
    assert uniforms(Stream.MASK, np.array([], dtype=np.int64), 5, seed=0, epoch=0).shape == (0, 5)


def test_no_two_draws_share_their_numbers() -> None:
    seen = [
        tuple(uniforms(stream, np.array([sample]), 4, seed=seed, epoch=epoch, attempt=attempt)[0])
        for stream, sample, seed, epoch, attempt in itertools.product(
            Stream, (0, 1, 2**32, 2**40 - 1), (0, 1, 2**32), (0, 1, 2**32 - 1), (0, 1)
        )
    ]
    assert len(set(seen)) == len(seen)


def test_uniform_on_the_unit_interval() -> None:
    u = uniforms(Stream.MASK, np.arange(2000), 50, seed=11, epoch=4)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > LEVEL
    for column in u.T[:8]:
        assert stats.kstest(column, "uniform").pvalue > LEVEL


@pytest.mark.parametrize("varied", ["sample", "column", "epoch", "stream", "attempt", "seed"])
def test_independent_of_the_neighbour(varied: str) -> None:
    """The pair of a number and its neighbour's is uniform on the square: chi-square over 16 x 16 cells."""
    here = {"stream": Stream.MASK, "seed": 5, "epoch": 6, "attempt": 0}
    there = dict(here)
    samples = np.arange(0, 8000, 2)
    neighbours = samples + 1 if varied == "sample" else samples
    if varied == "stream":
        there["stream"] = Stream.MASK_SIZE
    elif varied in here:
        there[varied] += 1
    a = uniforms(here.pop("stream"), samples, 10, **here)
    b = uniforms(there.pop("stream"), neighbours, 10, **there)
    if varied == "column":
        b = a[:, ::-1][:, :5]
        a = a[:, :5]
    pairs, _, _ = np.histogram2d(a.ravel(), b.ravel(), bins=16, range=[[0, 1], [0, 1]])
    assert stats.chisquare(pairs.ravel()).pvalue > LEVEL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"count (=0) must be 1 to 262144"),
        ({"count": 2**18 + 1}, r"count (=262145) must be 1 to 262144"),
        ({"seed": -1}, r"seed (=-1) must be 0 to 9223372036854775807"),
        ({"seed": 2**63}, r"seed (=9223372036854775808) must be 0 to 9223372036854775807"),
        ({"epoch": -1}, r"epoch (=-1) must be 0 to 4294967295"),
        ({"epoch": 2**32}, r"epoch (=4294967296) must be 0 to 4294967295"),
        ({"attempt": -1}, r"attempt (=-1) must be 0 to 65535"),
        ({"attempt": 2**16}, r"attempt (=65536) must be 0 to 65535"),
        ({"samples": np.array([0, -3])}, r"samples (=-3) must be 0 to 1099511627775"),
        ({"samples": np.array([2**40, 1])}, r"samples (=1099511627776) must be 0 to 1099511627775"),
    ],
)
def test_numbers_out_of_range(change: dict, message: str) -> None:
    arguments = {"samples": np.arange(2), "count": 3, "seed": 0, "epoch": 0, "attempt": 0, **change}
    with pytest.raises(ValueError) as error:
        uniforms(Stream.MASK, arguments.pop("samples"), arguments.pop("count"), **arguments)
    assert str(error.value) == message


def test_the_largest_numbers_in_range() -> None:
    u = uniforms(Stream.MASK, np.array([2**40 - 1]), 1, seed=2**63 - 1, epoch=2**32 - 1, attempt=2**16 - 1)
    assert 0 <= u[0, 0] < 1


def test_generator_is_a_function_of_its_arguments() -> None:
    def draw(**changes: int) -> list[float]:
        arguments = {"stream": Stream.ORDER, "seed": 1, "epoch": 2, "lane": 3, **changes}
        return generator(Stream(arguments.pop("stream")), **arguments).random(1000).tolist()

    first = draw()
    assert draw() == first
    assert stats.kstest(first, "uniform").pvalue > LEVEL
    for change in ({"stream": Stream.SCENE}, {"seed": 2}, {"epoch": 3}, {"lane": 4}):
        assert not set(draw(**change)) & set(first)
