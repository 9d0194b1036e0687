"""Load results of runs from files: one ``Run`` for each recipe, step and seed.

A run is a folder (with ``evaluation/*.json`` or ``results.json``), or a file of results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jepa_kit.config import modernize
from jepa_kit.config.shipped import find_reference, is_reference
from jepa_kit.evaluation.tables.rows import Row, read_results

NOT_RECIPE = {
    "train": ("seed", "output_dir", "log_every", "tensorboard", "wandb", "deterministic", "device", "attention"),
    "data": ("num_workers", "prefetch", "shards", "cache", "cache_gb", "retries", "backoff", "timeout"),
}
"""Options in which configs of one recipe may differ, besides all of ``checkpoint`` and ``evaluate``."""


POOLED = ("finetune", "knn", "linear", "logistic")
"""Protocols with an option ``pooling``."""


@dataclass(frozen=True)
class Data:
    """Training and test samples of protocols: digests of their indexes, and how images were read.

    Args:
        train, test: digests.
        size: (h, w) of the images; None if the file does not state it.
        decoder: of the images; None if the file does not state it.
        train_place, test_place: folders, which are not compared.
    """

    train: str
    test: str
    size: tuple[int, ...] | None
    decoder: str | None
    train_place: Path = field(compare=False)
    test_place: Path = field(compare=False)


class Answer(NamedTuple):
    """A row with its data and the seed of its protocol."""

    data: Data
    seed: int
    row: Row

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the protocol (if the file has them) and its seed."""
        return self.row.options | {"seed": self.seed}


class Run(NamedTuple):
    """Results of one checkpoint: folder, files, recipe (as text), number of updates, seed, rows, and the checkpoint."""

    place: Path
    files: list[Path]
    recipe: str
    step: int | None
    seed: int
    rows: list[Answer]
    checkpoint: Path | None = None


def load(*paths: str | Path) -> list[Run]:
    """Load files of results; if two files of a run have the same figure, the newer counts.

    Args:
        paths: run folders, files of results, and ``reference:NAME``.

    Raises:
        ValueError: if there are no results, or incomplete or damaged ones.
        FileNotFoundError: if there is no such file or folder.
    """
    places = [find_reference(path) if is_reference(path) else Path(path) for path in paths]
    files = {file.resolve(): _place(path) for path in places for file in _files(path)}
    found: dict[tuple[Any, ...], Run] = {}
    newest: dict[tuple[Any, ...], dict[tuple[Any, ...], Answer]] = {}
    for file in sorted(files, key=lambda one: (one.stat().st_mtime_ns, one.name)):
        content = read_results(file)
        if not content["rows"]:
            raise ValueError(f"{file} has no rows: evaluate again")
        try:
            recipe, seed, answers = _recipe(content), content["seeds"]["run"], _answers(content)
            hash(tuple(answer.data for answer in answers))
        except (TypeError, AttributeError, LookupError) as error:  # a value of another type than in ``results``
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}): evaluate again") from error
        key = (files[file], recipe, seed)
        run = found.setdefault(key, Run(files[file], [], recipe, _step(content), seed, [], _checkpoint(content)))
        run.files.append(file)
        for answer in answers:
            row = answer.row
            options = json.dumps(answer.options, sort_keys=True)
            figure = (answer.data, options, row.title, row.network, row.layers, row.seed, row.column)
            newest.setdefault(key, {})[figure] = answer
    in_order = sorted(found, key=lambda key: list(files.values()).index(key[0]))
    return [found[key]._replace(rows=list(newest[key].values())) for key in in_order]


def _place(path: Path) -> Path:
    """Return the folder that names the run: without ``run`` and ``evaluation`` at its end."""
    place = path.resolve()
    place = place.parent if place.is_file() else place
    while place.name in ("run", "evaluation"):
        place = place.parent
    return place


def _files(path: Path) -> list[Path]:
    """Return the files of results of a run, the oldest first."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a run is a folder or a file of results")
    places = [*path.glob("evaluation/*.json"), *path.glob("results.json"), *path.glob("run/evaluation/*.json")]
    if not places:
        raise ValueError(f"{path} has no results (evaluation/*.json or results.json): jepa-eval makes them")
    return sorted(places, key=lambda file: (file.stat().st_mtime_ns, file.name))


def _step(content: dict[str, Any]) -> int | None:
    return (content["checkpoint"] or {}).get("step")


def _checkpoint(content: dict[str, Any]) -> Path | None:
    file = (content["checkpoint"] or {}).get("file")
    return Path(file) if isinstance(file, str) and not is_reference(file) else None


def _recipe(content: dict[str, Any]) -> str:
    """Return what runs that differ only in their seed have in common, as text: config, training data and step.

    Training data are those that the checkpoint records; if it records none, the config's ``data.shards``.
    """
    config = modernize(content["config"])
    for section in ("versions", "checkpoint", "evaluate"):
        config.pop(section, None)
    shards = config.get("data", {}).get("shards")
    for section, keys in NOT_RECIPE.items():
        for key in keys:
            config.get(section, {}).pop(key, None)
    recorded = (content["checkpoint"] or {}).get("data") or {}
    data = recorded if recorded.get("digest") else shards
    # a reference run has a line of its own, beside a run that repeats it
    shipped = {"reference": True} if is_reference((content["checkpoint"] or {}).get("file")) else {}
    return json.dumps({"config": config, "data": data, "step": _step(content), **shipped}, sort_keys=True)


def _answers(content: dict[str, Any]) -> list[Answer]:
    train, test = content["data"]["train"], content["data"]["test"]
    size = content["data"].get("image_size") or content["config"].get("data", {}).get("image_size")
    data = Data(
        train["index_sha256"],
        test["index_sha256"],
        tuple(size) if isinstance(size, list) else None,
        content["data"].get("decoder"),
        Path(train["shards"]),
        Path(test["shards"]),
    )
    answers = []
    for raw in content["rows"]:
        # older files have options beside the rows, by protocol
        given = [options for options in content.get("protocols", ()) if options["name"] == raw["protocol"]]
        older = {name: value for name, value in given[0].items() if name != "name"} if len(given) == 1 else {}
        options = raw.get("options") or older
        if options and raw["protocol"] in POOLED:  # older files lack this option
            options = {"pooling": "mean", **options}
        answers.append(Answer(data, content["seeds"]["protocols"], Row(**(raw | {"options": options}))))
    return answers
