"""ONNX: write an encoder as a graph for onnxruntime, for any number of images of one size.

Input ``images`` [B, C, h, w] float, normalised. Outputs ``tokens`` [B, N, D] and ``features`` [B, D], their mean over
the patches. The graph is written node by node: this needs only the package onnx, takes milliseconds, and stores each
weight unchanged under our name, so that the file can be read back.

B = images    N = H * W patches    D = width    h = heads    d = D / h
"""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from jepa_kit.encoders.positions import interpolate_pos_embed, patch_grid
from jepa_kit.errors import CheckpointError
from jepa_kit.files import atomic_write, sha256_of
from jepa_kit.interop.digest import ABOUT, DIGEST, check_digest, raw
from jepa_kit.interop.weight_checks import checked_weights
from jepa_kit.interop.weights import AS_IT_IS, Architecture, EncoderWeights, Reading, read_about

OPSET = 20
"""The first opset with Gelu; onnxruntime 1.17 and later support it."""

IR_VERSION = 9
LARGE = 1 << 29
"""Bytes of weights from which they are a file of their own, written one by one: protobuf copies what it holds twice,
and cannot hold 2 GiB."""


def _onnx() -> Any:
    if find_spec("onnx") is None:
        raise CheckpointError("ONNX files need the package onnx: pip install 'jepa_kit[onnx]'")
    import onnx

    return onnx


class _Graph:
    """A graph under construction; nodes are named by their outputs."""

    def __init__(self, onnx: Any, weights: dict[str, Tensor], eps: float) -> None:
        self.onnx, self.weights, self.eps = onnx, weights, eps
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type = np.int64) -> None:
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(value, dtype), name))

    def linear(self, x: str, name: str) -> str:
        """Add x W^T + b, with W in torch's layout [out, in]."""
        turned = self.add("Transpose", [f"{name}.weight"], f"{name}.turned", perm=[1, 0])
        y = self.add("MatMul", [x, turned], f"{name}.product")
        return self.add("Add", [y, f"{name}.bias"], f"{name}.out") if f"{name}.bias" in self.weights else y

    def norm(self, x: str, name: str, output: str = "") -> str:
        inputs, output = [x, f"{name}.weight", f"{name}.bias"], output or f"{name}.out"
        return self.add("LayerNormalization", inputs, output, axis=-1, epsilon=self.eps)


def write(weights: EncoderWeights, path: Path, *, image_size: tuple[int, int] | None = None) -> None:
    """Write the graph; large weights go into ``<name>.data`` beside it.

    Args:
        weights: float32.
        path: the .onnx file.
        image_size: (h, w) of the graph's images; positions are interpolated if it differs from training.

    Raises:
        CheckpointError: the package onnx is missing, or weights are not float32.
        ValueError: the patch size does not divide the image size.
    """
    onnx = _onnx()
    kinds = {value.dtype for value in weights.state.values()}
    if kinds != {torch.float32}:
        raise CheckpointError(f"weights must be float32 for onnx, not {', '.join(sorted(map(str, kinds)))}")
    shape = weights.architecture
    size = image_size or shape.image_size
    grid, held = patch_grid(size, shape.patch_size), {**weights.state, "pos_embed": weights.table}
    if grid != shape.grid:
        held["pos_embed.interpolated"] = interpolate_pos_embed(weights.table, shape.grid, grid)
    graph = _Graph(onnx, held, shape.norm_eps)
    n, d, helper = grid[0] * grid[1], shape.embed_dim, onnx.helper
    _encoder(graph, shape, n)
    sizes = {"images": [shape.in_chans, *size], "tokens": [n, d], "features": [d]}
    images, *outputs = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *dims]) for name, dims in sizes.items()
    )
    proto = helper.make_graph(graph.nodes, "encoder", [images], outputs, initializer=graph.constants)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(proto, opset_imports=opset, producer_name="jepa_kit", ir_version=IR_VERSION)
    helper.set_model_props(model, {ABOUT: weights.about()})
    _store(onnx, model, held, path)


def _encoder(graph: _Graph, shape: Architecture, n: int) -> None:
    """Add the nodes of the whole encoder, for ``n`` patches."""
    p, head = shape.patch_size, shape.embed_dim // shape.num_heads
    graph.constant("to_tokens", [0, shape.embed_dim, n])
    graph.constant("to_heads", [0, n, 3, shape.num_heads, head])
    graph.constant("to_width", [0, n, shape.embed_dim])
    graph.constant("scale", 1 / math.sqrt(head), np.float32)
    for i in range(3):
        graph.constant(f"index.{i}", i)
    patch = ["images", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    x = graph.add("Conv", patch, "patches", kernel_shape=[p, p], strides=[p, p])
    x = graph.add("Reshape", [x, "to_tokens"], "patches.flat")
    x = graph.add("Transpose", [x], "patches.tokens", perm=[0, 2, 1])  # [B, N, D]
    table = "pos_embed.interpolated" if "pos_embed.interpolated" in graph.weights else "pos_embed"
    x = graph.add("Add", [x, table], "placed")
    for i in range(shape.depth):
        x = _block(graph, x, f"blocks.{i}")
    x = graph.norm(x, "norm", output="tokens")
    graph.constant("over_patches", [1])
    graph.add("ReduceMean", [x, "over_patches"], "features", keepdims=0)


def _block(graph: _Graph, x: str, name: str) -> str:
    y = graph.linear(graph.norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
    y = graph.add("Reshape", [y, "to_heads"], f"{name}.heads")
    y = graph.add("Transpose", [y], f"{name}.qkv", perm=[2, 0, 3, 1, 4])  # [3, B, h, N, d]
    q, k, v = (graph.add("Gather", [y, f"index.{i}"], f"{name}.{c}", axis=0) for i, c in enumerate("qkv"))
    q = graph.add("Mul", [q, "scale"], f"{name}.q.scaled")
    k = graph.add("Transpose", [k], f"{name}.k.turned", perm=[0, 1, 3, 2])
    scores = graph.add("Softmax", [graph.add("MatMul", [q, k], f"{name}.scores")], f"{name}.weights", axis=-1)
    y = graph.add("MatMul", [scores, v], f"{name}.mixed")  # [B, h, N, d]
    y = graph.add("Transpose", [y], f"{name}.mixed.turned", perm=[0, 2, 1, 3])
    y = graph.linear(graph.add("Reshape", [y, "to_width"], f"{name}.mixed.flat"), f"{name}.attn.proj")
    x = graph.add("Add", [x, y], f"{name}.middle")
    y = graph.linear(graph.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
    y = graph.linear(graph.add("Gelu", [y], f"{name}.gelu"), f"{name}.mlp.fc2")
    return graph.add("Add", [x, y], f"{name}.end")


def _store(onnx: Any, model: Any, weights: dict[str, Tensor], path: Path) -> None:
    """Write to temporary names, then rename, the data first: a graph without data would look complete."""
    total = sum(value.numel() * 4 for value in weights.values())
    data = path.with_name(path.name + ".data") if total >= LARGE else None
    if data is not None and data.exists():
        raise FileExistsError(f"{data}, for the weights of {path.name}, already exists")
    with ExitStack() as stack:
        part = stack.enter_context(atomic_write(path))
        data_part = None if data is None else stack.enter_context(atomic_write(data))  # contexts exit in reverse order
        with nullcontext() if data_part is None else data_part.open("wb") as file:
            _add(onnx, model, weights, file, f"{path.name}.data")
        onnx.helper.set_model_props(model, {**_metadata(model), DIGEST: _digest(onnx, model, data_part)})
        part.write_bytes(model.SerializeToString())


def _add(onnx: Any, model: Any, weights: dict[str, Tensor], file: IO[bytes] | None, name: str) -> None:
    """Add the weights to the graph, their bytes to ``file`` (called ``name``) if there is one."""
    offset = 0
    for key, value in weights.items():
        entry = model.graph.initializer.add(name=key, data_type=onnx.TensorProto.FLOAT, dims=value.shape)
        if file is None:
            entry.raw_data = bytes(raw(value))
            continue
        entry.data_location = onnx.TensorProto.EXTERNAL
        length = file.write(raw(value))
        for attribute, held in (("location", name), ("offset", str(offset)), ("length", str(length))):
            entry.external_data.add(key=attribute, value=held)
        offset += length


def _metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _digest(onnx: Any, model: Any, data: Path | None) -> str:
    """Return the SHA-256 of the model without its digest, and of the file of its weights."""
    bare = type(model)()
    bare.CopyFrom(model)
    onnx.helper.set_model_props(bare, {key: value for key, value in _metadata(model).items() if key != DIGEST})
    content = bare.SerializeToString(deterministic=True)
    return hashlib.sha256(content if data is None else content + sha256_of(data).encode()).hexdigest()


def read(path: Path, reading: Reading = AS_IT_IS) -> EncoderWeights:
    """Read the weights of a file that ``write`` wrote.

    Raises:
        CheckpointError: the package onnx is missing, or the file is damaged or was not written by jepa_kit.
    """
    onnx = _onnx()
    from google.protobuf.message import DecodeError

    data = path.with_name(path.name + ".data")
    try:
        model = onnx.load(str(path), load_external_data=False)
        metadata = _metadata(model)
        external = any(entry.data_location == onnx.TensorProto.EXTERNAL for entry in model.graph.initializer)
        if external and not data.is_file():
            raise CheckpointError(f"{path} has its weights in {data.name}, which is not beside it")
        digest_of = partial(_digest, onnx, model, data if external else None)
        check_digest(metadata, digest_of, str(path), allow_unchecked=reading.allow_unchecked)
        if external:
            onnx.load_external_data_for_model(model, str(path.parent))
    except CheckpointError:
        raise
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise CheckpointError(f"{path} is damaged, or not an ONNX file: {error}") from error
    about = read_about(metadata.get(ABOUT))
    if about is None:
        raise CheckpointError(f"{path} is an ONNX file, but none of jepa_kit: its weights have no names that are known")
    state = {
        entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy())
        for entry in model.graph.initializer
        if entry.data_type == onnx.TensorProto.FLOAT and entry.name not in ("scale", "pos_embed.interpolated")
    }
    return checked_weights(state, *about, str(path), reading.positions)
