"""What a run does between updates besides training: evaluation every n steps, and any hook that is handed to ``train``.

A hook is called on every process after the update of a step, if ``(step + 1) % every == 0`` and after the last step.
The numbers it returns go into that step's line of ``metrics.jsonl``. Its time does not count in ``images_per_second``.

A hook must leave the run as it found it: weights, gradients, ``train()``. Torch's random numbers are seeded anew for
each step, so a hook may draw from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from jepa_kit.config import Config
from jepa_kit.engine.run import Run


class Hook(Protocol):
    """Something to do every ``every`` steps."""

    every: int

    def __call__(self, run: Run, step: int) -> dict[str, float]:
        """Run after the update of ``step`` (counted from 0), on every process.

        Returns:
            numbers for the step's line, the same on all processes; their names must be the hook's own ("eval/...").
        """
        ...


HookFactory = Callable[[Run], Hook | None]
"""Makes a hook for a run before its first step, on every process; None if the run's config does not ask for it."""


def check_hooks(config: Config, factories: Sequence[HookFactory]) -> None:
    """Raise ValueError if the config asks for an evaluation inside the run and there is no hook to do it."""
    if config.evaluate.every is not None and not factories:
        raise ValueError(
            f"evaluate.every (={config.evaluate.every}) needs a hook that evaluates: jepa_kit.training.train passes it"
        )


def due_hooks(hooks: Sequence[Hook], step: int, last: int) -> list[Hook]:
    """Return the hooks to call after ``step``; ``last`` is the last step of the run."""
    return [hook for hook in hooks if (step + 1) % hook.every == 0 or step == last]


def run_hooks(hooks: Sequence[Hook], run: Run, step: int) -> dict[str, float]:
    """Call hooks in their order and return all their numbers.

    Raises:
        ValueError: two hooks return the same name.
    """
    numbers: dict[str, float] = {}
    for hook in hooks:
        found = hook(run, step)
        if twice := numbers.keys() & found.keys():
            raise ValueError(f"two hooks give {', '.join(sorted(twice))} for one step: names must be a hook's own")
        numbers.update(found)
    return numbers
