"""Training sets with few labels: a fraction of all samples, a number per class, or a list of names.

N  training samples
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from jepa_kit.evaluation.protocols.base import check_values
from jepa_kit.rng import IntArray, Stream, generator

_FORMS = re.compile(r"(?=[0.]*[1-9])0*(?P<percent>\d{1,2}(?:\.\d+)?)%|(?P<each>0*[1-9]\d*)/class|all")
"""A percentage in (0, 100) (the lookahead requires a digit other than 0), a number above 0, or ``all``."""


@dataclass(frozen=True)
class Subset:
    """A rule that draws a part of the training samples.

    Args:
        text: ``all``; a fraction as ``1%`` or ``12.5%``; or a number per class as ``10/class``.

    Raises:
        ValueError: another form, a percentage that is not in (0, 100), or no image.
    """

    text: str

    def __post_init__(self) -> None:
        right = "must be 'all', a fraction as '1%', or images as '10/class'"
        check_values(("subsets", repr(self.text), _FORMS.fullmatch(self.text) is not None, right))

    @property
    def is_all(self) -> bool:
        return self.text == "all"

    def draw(self, labels: IntArray, *, seed: int, draw: int) -> IntArray:
        """Return the sample numbers of one draw, ascending.

        A fraction is taken of each class, rounded, and at least one image. For one seed and draw, subsets are nested:
        ``10%`` contains ``1%``.

        Args:
            labels: [N] classes.
            seed: of the evaluation.
            draw: number of the draw; each is another subset.

        Raises:
            ValueError: a class with too few images.
        """
        match = _FORMS.fullmatch(self.text)
        assert match is not None
        if self.is_all:
            return np.arange(len(labels))
        order = generator(Stream.EVALUATION, seed=seed, epoch=draw, lane=2).permutation(len(labels))
        chosen = []
        for name in np.unique(labels):
            members = order[labels[order] == name]
            count = int(match["each"]) if match["each"] else max(1, round(float(match["percent"]) / 100 * len(members)))
            if count > len(members):
                raise ValueError(f"subsets (={self.text!r}) needs {count} images, but class {name} has {len(members)}")
            chosen.append(members[:count])
        return np.sort(np.concatenate(chosen))


def listed_samples(file: str, key: Callable[[int], str], samples: int) -> IntArray:
    """Return the sample numbers, ascending, that a text file names, one per line; empty lines are skipped.

    A name is the sample's key, with or without an extension; or the last part of the key, if that is unique. Common
    lists of 1 % of ImageNet have names as ``n01440764_10043.JPEG``.

    Args:
        key: sample number -> name.
        samples: N.

    Raises:
        ValueError: no name, or names of no sample or of several.
        FileNotFoundError: there is no such file.
    """
    known: dict[str, list[int]] = defaultdict(list)
    for i in range(samples):
        full = key(i)
        for name in {full, PurePosixPath(full).name}:
            known[name].append(i)
    names = [name for name in map(str.strip, Path(file).read_text(encoding="utf-8").splitlines()) if name]
    if not names:
        raise ValueError(f"names (={file!r}) must be a file with a name of a sample on each line; it is empty")
    found = [known.get(name) or known[str(PurePosixPath(name).with_suffix(""))] for name in names]
    for what, fits in (("no sample's", bool), ("several samples'", lambda at: len(at) < 2)):
        bad = [name for name, at in zip(names, found, strict=True) if not fits(at)]
        if bad:
            raise ValueError(f"names (={file!r}): {len(bad)} of {len(names)} are {what}, first {bad[0]!r}")
    return np.unique(np.concatenate(found))
