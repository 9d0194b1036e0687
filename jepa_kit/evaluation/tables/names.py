"""Names of groups of runs, of data and of protocols in tables: as short as they can be without being equal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from jepa_kit.evaluation.tables.runs import Answer, Data, Run
from jepa_kit.evaluation.tables.table import differing_options


def group_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return different names for groups of runs."""
    return _first_unique(_ways_of_groups(groups))


def _first_unique(ways: Iterable[list[str]]) -> list[str]:
    """Return the first of several lists of names that has no duplicates."""
    return next(names for names in ways if len(set(names)) == len(names))


def _ways_of_groups(groups: Sequence[Sequence[Run]]) -> Iterator[list[str]]:
    """Yield lists of names for groups of runs: ever longer ends of paths, with step and size, or the first file."""
    longest = max(len(run.place.parts) for members in groups for run in members)
    steps = ["" if g[0].step is None else f", step {g[0].step:,}" for g in groups]
    sizes = [f", at {' x '.join(map(str, size))}" if (size := g[0].rows[0].data.size) else "" for g in groups]
    for join in (_common, ", ".join):
        for added in ([""] * len(groups), steps, sizes, [a + b for a, b in zip(steps, sizes, strict=True)]):
            for parts in range(1, longest + 1):
                yield [join([_end(r.place, parts) for r in g]) + add for g, add in zip(groups, added, strict=True)]
    yield [str(members[0].files[0]) for members in groups]


def data_names(answers: Sequence[Answer]) -> dict[Data, str]:
    """Return names of data: ends of the test folder, with the training folder, or digests.

    The names get the size of images and the decoder if they do not differ otherwise.
    """
    several = list(dict.fromkeys(answer.data for answer in answers))
    tests = [d.test_place.parent if d.test_place.name in ("test", "val") else d.test_place for d in several]
    trains = [d.train_place for d in several]
    longest = max(len(place.parts) for place in (*tests, *trains))
    read = [f" at {' x '.join(map(str, d.size or ['any']))}" for d in several]
    decoded = [f"{at}, {d.decoder}" for at, d in zip(read, several, strict=True)]

    def ways() -> Iterator[list[str]]:
        for added in ([""] * len(several), read, decoded):
            for names in places():
                yield [name + end for name, end in zip(names, added, strict=True)]

    def places() -> Iterator[list[str]]:
        for parts in range(1, longest + 1):
            yield [_end(test, parts) for test in tests]
        for parts in range(1, longest + 1):
            ends = ((_end(test, parts), _end(train, parts)) for test, train in zip(tests, trains, strict=True))
            yield [f"{test} (learned from {train})" for test, train in ends]
        digests = zip(tests, several, strict=True)
        yield [f"{_end(test, 1)} {data.test[:8]} (learned from {data.train[:8]})" for test, data in digests]

    return dict(zip(several, _first_unique(ways()), strict=True))


def _end(path: Path, parts: int) -> str:
    return "/".join(path.parts[-parts:])


def protocol_of(answer: Answer) -> tuple[str, str]:
    """Return the title of the protocol, and its options as text."""
    return answer.row.title, json.dumps(answer.options, sort_keys=True)


def protocol_titles(answers: Sequence[Answer]) -> dict[tuple[str, str], str]:
    """Return names of protocols: the title, and the options in which protocols of one title differ."""
    by_title: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        title, text = protocol_of(answer)
        by_title.setdefault(title, {})[text] = answer
    found = {}
    for title, ways in by_title.items():
        known = [answer.options for answer in ways.values() if answer.row.options]
        for text, answer in ways.items():
            others = known if answer.row.options else [a.options for a in ways.values()]
            added = differing_options(answer.options, others)
            unknown = "" if answer.row.options or not known else "options unknown"
            found[title, text] = " ".join(filter(None, (title, added, unknown)))
    return found


def _common(names: Sequence[str]) -> str:
    """Return one name for several: their common beginning and ``*``, as ``scenes_seed*``."""
    if len(set(names)) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("0123456789") + "*"
