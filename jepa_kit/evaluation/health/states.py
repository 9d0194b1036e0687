"""The states of a network, which a verdict names."""

from __future__ import annotations

from typing import Literal, get_args

State = Literal["healthy", "not learned", "dimensional collapse", "positional collapse", "constant"]
STATES: tuple[State, ...] = get_args(State)
"""``eval/verdict`` in ``metrics.jsonl`` is an index: 0 is healthy, 1 not learned, the others are collapses."""
