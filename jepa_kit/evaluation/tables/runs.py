"""Results of runs, read back from their files: one ``Run`` for each recipe, step and seed.

A run is a folder (its ``evaluation`` folder, and ``results.json`` in it or beside it) or a file of results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jepa_kit.config import modernize
from jepa_kit.evaluation.tables.results import Row, read_results

NEVER_TELLS = (
    ("train", "seed"),
    ("train", "output_dir"),
    ("train", "log_every"),
    ("train", "tensorboard"),
    ("train", "wandb"),
    ("train", "deterministic"),
    ("train", "device"),
    ("train", "attention"),
    ("data", "num_workers"),
    ("data", "prefetch"),
    ("data", "shards"),
    ("data", "cache"),
    ("data", "cache_gb"),
    ("data", "retries"),
    ("data", "backoff"),
    ("data", "timeout"),
)
"""What a config may differ in and still be the same recipe; and in all of ``checkpoint`` and ``evaluate``."""


@dataclass(frozen=True)
class Data:
    """Training and test samples of protocols: the digests of their indexes, and how their images were read.

    Args:
        train, test: digests.
        size: (h, w) of the images; None if the file does not state it.
        decoder: of the images, likewise.
        train_place, test_place: where they lie, which does not make them other data.
    """

    train: str
    test: str
    size: tuple[int, ...] | None
    decoder: str | None
    train_place: Path = field(compare=False)
    test_place: Path = field(compare=False)


class Answer(NamedTuple):
    """A row, the data it was asked on, and the seed of its protocol."""

    data: Data
    seed: int
    row: Row

    @property
    def asked(self) -> dict[str, Any]:
        """What the protocol was asked with: all its options (where the file tells them), and its seed."""
        return self.row.options | {"seed": self.seed}


class Run(NamedTuple):
    """The rows of one checkpoint: its folder, its files, what its recipe is, its updates and its seed."""

    place: Path
    files: list[Path]
    recipe: str
    step: int | None
    seed: int
    rows: list[Answer]


def load(*paths: str | Path) -> list[Run]:
    """What files of results say; where two files of a run answer one question, the newer.

    Args:
        paths: run folders, and files.

    Raises:
        ValueError: no results there, or incomplete ones.
        FileNotFoundError: there is no such file or folder.
    """
    files = {file.resolve(): _place(path) for path in map(Path, paths) for file in _files(path)}
    found: dict[tuple[Any, ...], Run] = {}
    newest: dict[tuple[Any, ...], dict[tuple[Any, ...], Answer]] = {}
    for file in sorted(files, key=lambda one: (one.stat().st_mtime_ns, one.name)):
        content = read_results(file)
        if not content["rows"]:
            raise ValueError(f"{file} holds no rows: evaluate again")
        try:
            recipe, seed, answers = _recipe(content), content["seeds"]["run"], _answers(content)
            hash(tuple(answer.data for answer in answers))
        except (TypeError, AttributeError, LookupError) as error:  # a value of another type than ``results`` gives
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}): evaluate again") from error
        key = (files[file], recipe, seed)
        run = found.setdefault(key, Run(files[file], [], recipe, _step(content), seed, []))
        run.files.append(file)
        for answer in answers:
            row = answer.row
            asked = json.dumps(answer.asked, sort_keys=True)
            question = (answer.data, asked, row.title, row.network, row.layers, row.seed, row.column)
            newest.setdefault(key, {})[question] = answer
    in_order = sorted(found, key=lambda key: list(files.values()).index(key[0]))
    return [found[key]._replace(rows=list(newest[key].values())) for key in in_order]


def _place(path: Path) -> Path:
    """The run's folder, as a reader calls it."""
    place = path.resolve()
    place = place.parent if place.is_file() else place
    while place.name in ("run", "evaluation"):
        place = place.parent
    return place


def _files(path: Path) -> list[Path]:
    """Files of results, the oldest first."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a run is a folder or a file of results")
    places = [*path.glob("evaluation/*.json"), *path.glob("results.json"), *path.glob("run/evaluation/*.json")]
    if not places:
        raise ValueError(f"{path} holds no results (evaluation/*.json or results.json): tools/eval_net.py makes them")
    return sorted(places, key=lambda file: (file.stat().st_mtime_ns, file.name))


def _step(content: dict[str, Any]) -> int | None:
    return (content["checkpoint"] or {}).get("step")


def _recipe(content: dict[str, Any]) -> str:
    """What runs that differ by their seed alone have in common: a config, the data of the training, and the step.

    The data are what the checkpoint says of them; where it says nothing, what the config calls them.
    """
    config = modernize(content["config"])
    config.pop("versions", None)
    config.pop("checkpoint", None)
    config.pop("evaluate", None)
    shards = config.get("data", {}).get("shards")
    for section, key in NEVER_TELLS:
        config.get(section, {}).pop(key, None)
    told = (content["checkpoint"] or {}).get("data") or {}
    data = told if told.get("digest") else shards
    return json.dumps({"config": config, "data": data, "step": _step(content)}, sort_keys=True)


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
        # older files tell options beside the rows, by protocol
        told = [given for given in content.get("protocols", ()) if given["name"] == raw["protocol"]]
        older = {name: value for name, value in told[0].items() if name != "name"} if len(told) == 1 else {}
        options = raw.get("options") or older
        answers.append(Answer(data, content["seeds"]["protocols"], Row(**(raw | {"options": options}))))
    return answers
