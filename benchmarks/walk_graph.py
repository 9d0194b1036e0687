"""A backward pass in Python, because torch's engine needs a driver for CUDA tensors, even fake ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Edge = tuple[Any, int]
"""A node of the autograd graph and which of its outputs (for a leaf: the node that accumulates its gradient, 0)."""


def walk(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], ends: Collection[Any] = ()
) -> dict[Edge, Tensor]:
    """Gradients at all leaves and at the nodes ``ends``, without torch's engine.

    The engine asks for a driver as soon as a tensor is on CUDA.
    """
    arrived: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    found: dict[Edge, Tensor] = {}

    def deliver(node: Any, slot: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            gradient = fit(gradient, node._input_metadata[slot])
            before = arrived[node].get(slot)
            arrived[node][slot] = gradient if before is None else before + gradient

    with torch.no_grad():
        for output, gradient in zip(outputs, gradients, strict=True):
            deliver(*get_gradient_edge(output)[:2], gradient)
        for node in in_order(set(arrived), ends):
            given = arrived.pop(node, {})
            if hasattr(node, "variable") or node in ends:
                found.update({(node, slot): gradient for slot, gradient in given.items()})
                continue
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (below, slot), gradient in zip(edges, backward_of(node, given), strict=True):
                deliver(below, slot, gradient)
    return found


def in_order(roots: set[Any], ends: Collection[Any] = ()) -> Iterator[Any]:
    """Yield the nodes of the graph above ``ends`` in topological order."""

    def below(node: Any) -> list[Any]:
        return [] if node in ends else [n for n, _ in node.next_functions if n is not None]

    missing: Counter[Any] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        for node in below(stack.pop()):
            missing[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    ready = [node for node in roots if not missing[node]]
    while ready:
        done = ready.pop()
        yield done
        for node in below(done):
            missing[node] -= 1
            if not missing[node]:
                ready.append(node)


def set_gradients(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does."""
    for (node, _), gradient in walk([loss], [torch.ones_like(loss)]).items():
        parameter = node.variable
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def gradients_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], **_: Any
) -> tuple[Tensor | None, ...]:
    """Do what ``torch.autograd.grad`` does, with which the compiler traces backward passes."""
    edges = [get_gradient_edge(x)[:2] for x in inputs]
    found = walk(outputs, grad_outputs, {node for node, _ in edges})
    return tuple(found.get(edge) for edge in edges)


def backward_of(node: Any, given: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Return gradients for the nodes below a node from those of its outputs."""
    wanted = [below is not None for below, _ in node.next_functions]
    if not given:
        return (None,) * sum(wanted)
    gradients = [given.get(i) for i in range(len(node._input_metadata))]
    if hasattr(node, "apply"):  # a Python function: it also returns None for each argument that is no tensor
        wanted = node.needs_input_grad
        if not node.name().startswith("CompiledFunction"):  # which takes None; others get zeros from the engine
            pairs = zip(gradients, node._input_metadata, strict=True)
            gradients = [zeros_as(m) if g is None else g for g, m in pairs]
        result = node.apply(*gradients)
    else:
        result = node(*gradients)
    result = result if isinstance(result, tuple) else (result,)
    return [g for g, want in zip(result, wanted, strict=True) if want]


def fit(gradient: Tensor, metadata: Any) -> Tensor:
    """Return a gradient in the shape and dtype of the output that it belongs to, as torch's engine does."""
    shape = tuple(metadata.shape)
    gradient = gradient if tuple(gradient.shape) == shape else gradient.sum_to_size(shape)
    return gradient if gradient.dtype == metadata.dtype else gradient.to(metadata.dtype)


def zeros_as(metadata: Any) -> Tensor | None:
    if not metadata.dtype.is_floating_point:
        return None
    return torch.zeros(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)
