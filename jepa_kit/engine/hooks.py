"""What a run does between updates besides training: evaluation every n steps, and any registered hook.

A hook is called on every process after the update of a step, when ``(step + 1) % every == 0`` and after the last
step. What it gives goes into that step's line of ``metrics.jsonl``. Its time is kept out of ``images_per_second``.

A hook must leave the run as it found it: weights, gradients, ``train()``. Torch's random numbers are seeded anew for
each step, so a hook may draw from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jepa_kit.engine.build import Run


class Hook(Protocol):
    """Something to do every so many steps."""

    every: int

    def __call__(self, run: Run, step: int) -> dict[str, float]:
        """Does it after the update of ``step`` (counted from 0), on every process.

        Returns:
            numbers for the step's line, the same on all processes; their names must be the hook's own ("eval/...").
        """
        ...


def build_hooks(run: Run) -> list[Hook]:
    """The hooks that a run's config asks for."""
    from jepa_kit.evaluation.online import online_evaluation  # evaluation reads runs back, and so stands on the engine

    online = online_evaluation(run)
    return [] if online is None else [online]


def due_hooks(hooks: Sequence[Hook], step: int, last: int) -> list[Hook]:
    """The hooks that are called after ``step``, where ``last`` is the last step of the run."""
    return [hook for hook in hooks if (step + 1) % hook.every == 0 or step == last]


def run_hooks(hooks: Sequence[Hook], run: Run, step: int) -> dict[str, float]:
    """Calls hooks, in their order, and joins what they give.

    Raises:
        ValueError: two hooks give the same name.
    """
    given: dict[str, float] = {}
    for hook in hooks:
        found = hook(run, step)
        if twice := given.keys() & found.keys():
            raise ValueError(f"two hooks give {', '.join(sorted(twice))} for one step: names must be a hook's own")
        given.update(found)
    return given
