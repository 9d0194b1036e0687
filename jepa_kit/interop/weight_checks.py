"""Check weights under our names, and read the architecture from their shapes.

N = H * W patches of an image    D = width    C = channels    p = patch size in pixels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.encoders.sizes import SIZES
from jepa_kit.engine.checkpoint.format import check_finite, check_state
from jepa_kit.errors import CheckpointError
from jepa_kit.interop.names import hint
from jepa_kit.interop.weights import Architecture, EncoderWeights, Positions, Provenance
from jepa_kit.structures import Grid

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def shapes_to_architecture(
    state: Mapping[str, Tensor],
    what: str,
    *,
    table: Tensor | None,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Architecture:
    """Return the architecture of weights under our names, with the release's eps, which weights do not show.

    Args:
        state: the parameters.
        what: name of the file in messages.
        table: position table of the file, which determines the grid; may be None with ``image_size``.
        num_heads: not visible in shapes; None for that of the size with this width and depth (``SIZES``).
        image_size: size of training images, if the file states it.

    Raises:
        CheckpointError: the architecture is another, or heads or grid cannot be determined.
    """
    patch, fc1 = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if patch is None or fc1 is None or patch.ndim != 4 or patch.shape[2] != patch.shape[3] or fc1.ndim != 2:
        some = ", ".join(list(state)[:6]) or "nothing"
        raise CheckpointError(
            f"{what} is not a ViT as I-JEPA has it: patch_embed.proj.weight [D, C, p, p] and "
            f"blocks.0.mlp.fc1.weight [hidden, D] must exist; it contains {some}"
            + hint(state, "patch_embed.proj.weight")
        )
    embed_dim, in_chans, p, _ = patch.shape
    depth = depth_of(state)
    try:
        return Architecture(
            image_size=image_size or _image_size(table, p, what),
            patch_size=p,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads or _heads(embed_dim, depth, what),
            mlp_hidden=fc1.shape[0],
            in_chans=in_chans,
            qkv_bias="blocks.0.attn.qkv.bias" in state,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{what} has sizes that no encoder has: {error}") from error


def depth_of(state: Mapping[str, Any]) -> int:
    """Return the number of blocks in names such as ``blocks.7.norm1.bias``, counted from 0 without a gap."""
    numbers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    return next(n for n in range(len(numbers) + 1) if str(n) not in numbers)


def check_shapes(architecture: Architecture, state: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError for missing, unexpected or misshapen weights, and for values that are not finite."""
    if architecture.depth > len(state):  # before creating that many blocks
        raise CheckpointError(f"{what} has {len(state)} weights, too few for {architecture.depth} blocks")
    try:
        expected = _parameters(architecture)
    except ValueError as error:
        raise CheckpointError(f"{what} has sizes that no encoder has: {error}") from error
    check_state(expected, state, f"{what}: {architecture.words()}")
    wrong = [f"{name} ({value.dtype})" for name, value in state.items() if value.dtype not in FLOATS]
    if wrong:
        raise CheckpointError(f"{what} has weights that must be float64, float32, float16 or bfloat16: {wrong[0]}")
    check_finite(state, what)


@lru_cache(maxsize=8)
def _parameters(architecture: Architecture) -> dict[str, Tensor]:
    """Return names and shapes of an architecture, on the meta device."""
    with torch.device("meta"):
        return architecture.build().state_dict()


def usual_heads(embed_dim: int, depth: int) -> int | None:
    """Return the number of heads of the size with this width and depth; None if there is none."""
    return next((s.num_heads for s in SIZES.values() if (s.embed_dim, s.depth) == (embed_dim, depth)), None)


def _heads(embed_dim: int, depth: int, what: str) -> int:
    heads = usual_heads(embed_dim, depth)
    if heads is None:
        known = ", ".join(f"{name} {s.embed_dim}/{s.depth}" for name, s in SIZES.items())
        raise CheckpointError(
            f"{what}: the number of heads is not in the weights, and width {embed_dim}, depth {depth} is none of "
            f"the known sizes ({known}); give num_heads"
        )
    return heads


def _image_size(table: Tensor | None, p: int, what: str) -> tuple[int, int]:
    """Return the image size from the position table: the grid whose formula it matches, or else a square one."""
    if table is None:
        raise CheckpointError(f"{what} has no position table, so it does not say its image size; give image_size")
    table = _as_table(table, f"the position table of {what}")
    n, width = table.shape
    grids = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    grids.sort(key=lambda grid: abs(grid[0] - grid[1]))
    known = (grid for grid in grids if width % 4 == 0 and _gap(table, grid) <= tolerance(table))
    found = next(known, None)
    h, w = found or grids[0]
    if found is None and h != w:
        raise CheckpointError(
            f"{what} has positions for {n} patches, which are no square, and the table is that of no grid; "
            "give image_size"
        )
    return h * p, w * p


def tolerance(table: Tensor) -> float:
    """Return the largest difference from the formula that is rounding in the table's precision."""
    return 1e-2 if table.dtype in (torch.bfloat16, torch.float16) else 1e-6


def _gap(table: Tensor, grid: Grid) -> float:
    return float((table.float() - sincos_2d(table.shape[1], grid)).abs().max())


def _as_table(table: Tensor, what: str) -> Tensor:
    """Return a position table [N, D], which some formats store as [1, N, D]."""
    if table.ndim == 3 and len(table) == 1:
        return table[0]
    if table.ndim != 2:
        raise CheckpointError(f"{what} must be [N, D] or [1, N, D], but is {tuple(table.shape)}")
    return table


def check_positions(table: Tensor, grid: Grid, what: str, positions: Positions = "formula") -> Tensor | None:
    """Check a position table against the formula, and return it as [N, D] if it differs in any bit, else None.

    Args:
        table: table of the file, [N, D] or [1, N, D].
        grid: grid of the table.
        what: name of the table in messages.
        positions: ``formula`` rejects a table that differs by more than rounding; ``file`` keeps it (fine-tuning).

    Raises:
        CheckpointError: the shape is wrong, values are not finite or, with ``formula``, the table differs.
    """
    table = _as_table(table, what)
    check_finite({"the table": table}, what)
    n, width = grid[0] * grid[1], table.shape[1]
    if len(table) != n:
        raise CheckpointError(f"{what} has {len(table)} positions, but a grid of {grid[0]} x {grid[1]} has {n}")
    if torch.equal(table, sincos_2d(width, grid).to(table.dtype)):
        return None
    gap = _gap(table, grid)
    if positions == "formula" and not gap <= tolerance(table):
        raise CheckpointError(
            f"{what} is not the sine-cosine table of a grid of {grid[0]} x {grid[1]}: it differs by up to {gap:.2g}. "
            "A fine-tuned or freshly made model has a table of its own: positions='file' keeps it"
        )
    return table


def checked_weights(
    state: Mapping[str, Tensor],
    architecture: Architecture,
    provenance: Provenance,
    what: str,
    positions: Positions,
    *,
    table: str = "pos_embed",
    needed: bool = True,
    left_out: Sequence[str] = (),
) -> EncoderWeights:
    """Return the weights of a file.

    Args:
        state: parameters under our names, and the position table.
        what: name of the file in messages.
        positions: see ``check_positions``.
        table: name of the position table.
        needed: whether the table must exist.
        left_out: names that were not read, for the notes.

    Raises:
        CheckpointError: see ``check_shapes`` and ``check_positions``.
    """
    fixed = architecture.positions == "sincos"
    parameters = {name: value for name, value in state.items() if name != table or not fixed}
    if needed and fixed and table not in state:
        raise CheckpointError(f"{table} of {what} is missing, but its format has it")
    check_shapes(architecture, parameters, what)
    own = None
    if fixed and table in state:
        own = check_positions(state[table], architecture.grid, f"{table} of {what}", positions)
    if left_out:
        provenance = replace(provenance, notes=(*provenance.notes, f"left out: {', '.join(left_out)}"))
    return EncoderWeights(state=parameters, architecture=architecture, provenance=provenance, positions=own)
