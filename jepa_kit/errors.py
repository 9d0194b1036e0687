"""Every error class that more than one package raises or catches."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """Mistakes in a config, all that could be found, one line each.

    Args:
        problems: the lines.
        source: the file that they are in.
    """

    def __init__(self, problems: Sequence[str], source: str | None = None) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        self.source = source
        if source is None:
            text = "\n".join(self.problems)
        else:
            count = f"{len(self.problems)} mistake{'s' if len(self.problems) > 1 else ''}"
            text = f"{source}: {count}\n" + "\n".join(f"  {line}" for line in self.problems)
        super().__init__(text)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str | None]]:
        return type(self), (self.problems, self.source)


class ContractError(ValueError):
    """A part does not keep to the contract of its slot; the message names slot, part and the correct form."""


class SampleError(ValueError):
    """A sample's bytes are unavailable; the message is the reason."""


class ImageError(ValueError):
    """The bytes of a file are no usable image; the text is the reason."""


class CacheError(ValueError):
    """The cache folder takes no more: no fault of a shard."""


class StreamError(OSError):
    """What lies at an address did not come, or not whole; the text is the reason."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file, and why."""


class ShardError(ValueError):
    """A folder of shards that cannot be used; the message says which, and why."""


class SaveError(OSError):
    """A checkpoint that could not be written; the message says which, why, and what the last good one is."""


class RemoteError(OSError):
    """A place that did not take, give or do something; the message names the address and the cause."""


class UnableError(RemoteError, ValueError):
    """What a handler cannot do at all: a place that is no place for checkpoints."""


class RunError(RuntimeError):
    """A run failed after its first step had begun; the error that it met, if there was one, is its cause."""


class TooManySkippedError(RunError):
    """More samples of an epoch could not be used than ``data.max_skipped`` allows."""


class StartError(RuntimeError):
    """The processes of a run could not join one another."""


class PeerError(RuntimeError):
    """Another process failed, with an error that it tells itself or that could not be sent."""
