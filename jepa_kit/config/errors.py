"""What a user is told about a config, and where in the config it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jepa_kit.errors import ConfigError


@contextmanager
def located(path: str) -> Iterator[None]:
    """Name the entry of the config that made a constructor refuse: ``masker: num_targets (=0) must be ...``.

    Raises:
        ConfigError: for a ValueError, which is kept as the cause; one that has been located already comes through.
        TypeError: for a TypeError, which is kept as the cause.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error


def reason_of(error: BaseException) -> str:
    """What an error of torch.load says of a file, without its advice on how to load it nevertheless."""
    if found := re.search(r"(?:GLOBAL|[Uu]nsupported (?:class|operand|type)) +(\S+)", str(error)):
        return f"it names {found[1]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Weights only load failed")]
    return (telling or [type(error).__name__])[0].partition(" Please ")[0][:200]
