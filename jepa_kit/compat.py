"""Names of torch and iopath that are private to them, each with the reason why it is needed.

No other module uses one. If a new version of these packages renames something, this file is the one to repair.
Nothing is imported before it is used: modules without torch import this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from iopath.common.file_io import PathManager
    from torch import Tensor, nn
    from torch._utils import ExceptionWrapper


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own buffers by name, to replace one; the public functions only read them."""
    return module._buffers


def persistent_names(module: nn.Module) -> list[str]:
    """Return the names of the module's own buffers in the state dict; ``state_dict`` would copy all its children's."""
    return [
        name
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    ]


def set_parameters(module: nn.Module, **values: Tensor | None) -> None:
    """Replace the module's own parameters by tensors that are none, which ``setattr`` refuses."""
    cast(dict[str, Any], module._parameters).update(values)


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether calling the module runs a hook, so that its parts must not be called in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def foreach_copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy many tensors in one call, as torch's own optimisers do."""
    import torch

    torch._foreach_copy_(targets, sources)


def foreach_lerp_(targets: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move many tensors toward others in one call, as torch's own optimisers do."""
    import torch

    torch._foreach_lerp_(targets, ends, weight)


def allow_recompiles(count: int) -> None:
    """Let torch.compile make at least ``count`` programs of one function; the limit is an option of dynamo alone."""
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


def mark_dynamic(x: Tensor) -> Tensor:
    """Return x [R, ...] with R marked for torch.compile as a number that varies, though not as one that must."""
    import torch

    if x._is_view():  # the compiler would look at the view's base, whose shape and strides depend on the lengths
        x = torch.ops.aten._unsafe_view(x.contiguous(), x.shape)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def initialize_fsdp(root: nn.Module) -> None:
    """Make ``root`` the root of its FSDP2 modules.

    FSDP2 makes the first module that runs forward the root, and has no public way to choose. If the first batch after a
    resume or a roll-back is skipped, that would be a network that an evaluation calls by itself.
    """
    cast(Any, root)._get_fsdp_state()._lazy_init()


def worker_error(error: BaseException, where: str) -> ExceptionWrapper:
    """Return what a DataLoader raises in the main process if a worker's queue has it in place of a batch."""
    from torch._utils import ExceptionWrapper

    return ExceptionWrapper((type(error), error, error.__traceback__), where)


def prefixes_of(path_manager: PathManager) -> tuple[str, ...]:
    """Return the prefixes of URLs that iopath has a handler for; it takes any other path for a local one."""
    return tuple(path_manager._path_handlers)


def can_rename(path_manager: PathManager, url: str) -> bool:
    """Return whether the handler of a URL has a rename of its own; without one, iopath raises NotImplementedError."""
    from iopath.common.file_io import PathHandler

    handlers = path_manager._path_handlers.items()
    handler = next((type(handler) for prefix, handler in handlers if url.startswith(prefix)), PathHandler)
    return handler._mv is not PathHandler._mv


def with_local_part(value: Any, local: Tensor) -> Tensor:
    """Return a DTensor sharded as ``value``, with another local part.

    ``from_local`` would move it to the mesh's device. It is for torch.distributed.checkpoint; no operation runs on it.
    """
    from torch.distributed.tensor import DTensor

    return DTensor(local, value._spec, requires_grad=False)
