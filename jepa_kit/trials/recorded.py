"""Compare parts with recorded numbers of another implementation: what the ``check.py`` of each project uses.

A recording is two files. NAME.safetensors contains tensors: inputs, weights, and what the other code computed.
NAME.json contains ``meta`` (sizes and settings) and, if there are any, ``numbers`` (losses, schedules).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jepa_kit.arguments import run_tool

TOLERANCE = 1e-8
"""Default of the largest difference: far above the rounding errors of float64, far below those of float32."""

Values = Tensor | float | Sequence[float] | Mapping[str, Tensor]
"""A quantity: numbers, or tensors by name."""


def few(names: Iterable[object], most: int = 8) -> str:
    """Return the first names as ``a, b, ...``; 'nothing' if there are none."""
    found = [str(name) for name in names]
    return ", ".join(found[:most] + ["..."] * (len(found) > most)) or "nothing"


class _Named(dict[str, Any]):
    """Values of a file by name; a missing name is an error that gives the file and the names that it has.

    Args:
        path: of the file.
        kind: of a value, with the beginning of its name in the file if that was removed.
        values: by name.
    """

    def __init__(self, path: Path, kind: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path, self.kind = path, kind

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.path} has no {self.kind} {name!r} beside {few(self)}")


class Recorded:
    """A recording, read as a whole.

    Args:
        path: NAME, NAME.json or NAME.safetensors.

    Attributes:
        meta: sizes and settings; ``meta["key"]`` raises ValueError if there is no such key, ``meta.get`` does not.
        numbers: likewise; empty if the file has none.

    Raises:
        ValueError: a file is missing or damaged, or the JSON has no ``meta``.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
        self.json, self.safetensors = (stem.with_name(stem.name + end) for end in (".json", ".safetensors"))
        for file in (self.json, self.safetensors):
            if not file.is_file():
                raise ValueError(
                    f"there is no file {file}; a recording is {stem.name}.json and {stem.name}.safetensors"
                )
        try:
            content = json.loads(self.json.read_text(), object_hook=partial(_Named, self.json, "number"))
        except ValueError as error:
            raise ValueError(f"{self.json} is not a JSON file: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("meta"), dict):
            raise ValueError(f"{self.json} must have an object 'meta' with sizes and settings")
        self.meta: Mapping[str, Any] = content["meta"]
        self.numbers: Mapping[str, Any] = content.get("numbers") or _Named(self.json, "number", {})
        try:
            self._tensors = dict(sorted(load_file(self.safetensors).items()))
        except SafetensorError as error:
            raise ValueError(f"{self.safetensors} is damaged, or not a safetensors file: {error}") from error
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, in float64 if it is of floating-point numbers; raise ValueError if there is none."""
        if name not in self:
            near = [other for other in self._tensors if other.split("/")[0] == name.split("/")[0]]
            raise ValueError(f"{self.safetensors} has no tensor {name!r}; it has {few(near or self._tensors)}")
        self._read.add(name)
        value = self._tensors[name]
        return value.double() if value.is_floating_point() else value

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with ``prefix`` by the rest of their names.

        Raises:
            ValueError: there is none, or a name that is looked up in the result is missing.
        """
        found = {name.removeprefix(prefix): self[name] for name in self._tensors if name.startswith(prefix)}
        if not found:
            tops = dict.fromkeys(name.split("/")[0] for name in self._tensors)
            raise ValueError(f"{self.safetensors} has no tensor under {prefix!r}; it has {few(tops)}")
        return _Named(self.safetensors, f"tensor {prefix}...", found)

    @property
    def unread(self) -> list[str]:
        """Names of the tensors that were never read."""
        return [name for name in self._tensors if name not in self._read]


def sums(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return (sum, sum of squares) [2] of each tensor: recordings have these of weights after the last step."""
    return {name: torch.stack([x.detach().sum(), x.detach().square().sum()]) for name, x in tensors.items()}


class Report:
    """Largest differences of quantities, one line each.

    Args:
        tolerance: largest difference allowed; NaN and infinity exceed any.
    """

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        self.tolerance = tolerance
        self.rows: list[tuple[str, float, float, str]] = []
        """(quantity, largest difference, its tolerance, a remark)."""

    def compare(
        self, name: str, ours: Values, theirs: Values, *, relative: bool = False, tolerance: float | None = None
    ) -> None:
        """Add a line with the largest difference of a quantity.

        Args:
            name: of the quantity.
            ours: computed here. If both are tensors by name, the tensor that differs most is named.
            theirs: recorded.
            relative: divide the differences of each tensor by its largest recorded absolute value, unless that is 0.
            tolerance: of this quantity, in place of the report's.

        Raises:
            ValueError: shapes or names differ, or there is nothing to compare.
        """
        worst, remark = -1.0, ""
        for key, (x, y) in _pairs(name, ours, theirs).items():
            if x.shape != y.shape and not x.numel() == y.numel() == 1:
                label = f"{name}, {key}" if key else name
                raise ValueError(f"{label}: ours has shape {list(x.shape)}, the recorded one {list(y.shape)}")
            scale = y.abs().max().item() if relative else 1.0
            largest = (x.reshape(y.shape) - y).abs().max().item() / (scale or 1.0)
            largest = largest if math.isfinite(largest) else math.inf
            if largest > worst:
                worst, remark = largest, key
        remark = ", ".join(filter(None, ("relative" if relative else "", remark)))
        self.rows.append((name, worst, self.tolerance if tolerance is None else tolerance, remark))

    @property
    def failed(self) -> list[str]:
        """Quantities whose difference exceeds their tolerance."""
        return [name for name, largest, tolerance, _ in self.rows if not largest <= tolerance]

    @property
    def exit_code(self) -> int:
        """0 if all quantities are within their tolerances, else 1."""
        return 1 if self.failed else 0

    def __str__(self) -> str:
        lines = [("quantity", "largest difference", "tolerance", "")]
        for name, largest, tolerance, remark in self.rows:
            remark = remark if largest <= tolerance else f"ABOVE  {remark}"
            lines.append((name, f"{largest:.1e}", f"{tolerance:g}", remark))
        w = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(f"{a:{w[0]}}  {b:>{w[1]}}  {c:>{w[2]}}  {d}".rstrip() for a, b, c, d in lines)


def _float64(x: Tensor | float | Sequence[float]) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).detach().cpu()


def _pairs(name: str, ours: Values, theirs: Values) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> (our tensor, theirs) in float64 of a quantity; the name is '' if it is a single tensor."""
    if isinstance(ours, Mapping) != isinstance(theirs, Mapping):
        raise ValueError(f"{name}: one side is tensors by name, and the other is not")
    a, b = (values if isinstance(values, Mapping) else {"": values} for values in (ours, theirs))
    if a.keys() != b.keys():
        raise ValueError(
            f"{name}: ours has {few(sorted(a.keys() - b.keys()))} and the recording does not; "
            f"the recording has {few(sorted(b.keys() - a.keys()))} and ours does not"
        )
    pairs = {key: (_float64(a[key]), _float64(b[key])) for key in a}
    if not pairs or any(y.numel() == 0 for _, y in pairs.values()):
        raise ValueError(f"{name}: there is nothing to compare")
    return pairs


def tolerance_of(text: str) -> float:
    """Return the number of a --tolerance, of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"(={text}) must be a number of 0 or more")
    return value


def run_check(
    description: str | None, check: Callable[[Recorded, Report], None], argv: Sequence[str] | None = None
) -> int:
    """Run a check from the command line ``FIXTURE [--tolerance 1e-8]`` and print its table.

    Args:
        description: of the help, as the ``__doc__`` of a project's ``check.py``.
        check: builds parts from the recording's meta, and compares them with it by ``Report.compare``.
        argv: the command line without the program; None for ``sys.argv``.

    Returns:
        0 if all quantities are within their tolerances, 1 if not, 2 if the recording cannot be used.
    """
    program = sys.argv[0]
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  python {program} tests/fixtures/methods/{Path(program).resolve().parent.name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("fixture", metavar="FIXTURE", help="NAME.json, NAME.safetensors, or NAME")
    parser.add_argument(
        "--tolerance", type=tolerance_of, default=TOLERANCE, help="largest difference (default: %(default)g)"
    )
    args = parser.parse_args(argv)

    def run() -> int:
        recorded, report = Recorded(args.fixture), Report(args.tolerance)
        check(recorded, report)
        if not report.rows:
            raise ValueError(f"{args.fixture}: the check compared nothing")
        print(report)
        if recorded.unread:
            print(f"\nin the recording, but not read: {few(recorded.unread)}")
        failed = report.failed
        verdict = f"{len(failed)} of {len(report.rows)} quantities differ by more than their tolerance: {few(failed)}"
        print(f"\n{verdict}" if failed else f"\nall {len(report.rows)} quantities are within their tolerances")
        return report.exit_code

    return run_tool(Path(program).name, run)
