"""A recording as check_parity reads it: I-JEPA of other sizes, two contexts and a stretched schedule, in plain code.

B images    C contexts    M target blocks    N patches    L patches of a set    D width    S sequences
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

META: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "predictor_embed_dim": 16,
    "predictor_depth": 1,
    "predictor_num_heads": 2,
    "batch_size": 3,
    "iterations_per_epoch": 3,
    "epochs": 3,
    "warmup_epochs": 1,
    "ipe_scale": 1.25,
    "ema": [0.9, 1.0],
    "start_lr": 1e-4,
    "ref_lr": 2e-3,
    "final_lr": 1e-5,
    "wd": 0.1,
    "final_wd": 0.2,
    "dtype": "torch.float64",
}
GRID, B, C, M = (4, 6), 3, 2, 3


def positions(dim: int) -> Tensor:
    """[1, N, D] the column's sine and cosine, then the row's."""
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    parts = []
    for at in (columns, rows):
        for f in (math.sin, math.cos):
            angle = [[f(float(x) / 10000 ** (i / (dim // 4))) for i in range(dim // 4)] for x in at.flatten()]
            parts.append(torch.tensor(angle, dtype=torch.float64))
    return torch.cat(parts, 1).float().double()[None]


def block(x: Tensor, w: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """A pre-norm transformer block over [S, L, D]."""
    s, length, dim = x.shape
    y = F.layer_norm(x, (dim,), w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"], 1e-6)
    qkv = F.linear(y, w[f"{name}.attn.qkv.weight"], w[f"{name}.attn.qkv.bias"])
    q, k, v = qkv.view(s, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    y = ((q @ k.mT / math.sqrt(dim // heads)).softmax(-1) @ v).transpose(1, 2).reshape(s, length, dim)
    x = x + F.linear(y, w[f"{name}.attn.proj.weight"], w[f"{name}.attn.proj.bias"])
    y = F.layer_norm(x, (dim,), w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"], 1e-6)
    y = F.gelu(F.linear(y, w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc1.bias"]))
    return x + F.linear(y, w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"])


def encode(w: dict[str, Tensor], images: Tensor, patches: Tensor | None) -> Tensor:
    """[B, 3, h, w] -> [B, L, D]."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = x + w["pos_embed"]
    if patches is not None:
        x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[-1]))
    for i in range(META["depth"]):
        x = block(x, w, f"blocks.{i}", META["num_heads"])
    return F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"], 1e-6)


def predict(w: dict[str, Tensor], seen: Tensor, context: Tensor, target: Tensor) -> Tensor:
    """One context [B, L, D] and one target block [B, T] -> [B, T, D]."""
    x = F.linear(seen, w["predictor_embed.weight"], w["predictor_embed.bias"]) + w["predictor_pos_embed"][0][context]
    x = torch.cat([x, w["mask_token"] + w["predictor_pos_embed"][0][target]], 1)
    x = block(x, w, "predictor_blocks.0", META["predictor_num_heads"])
    x = F.layer_norm(x, x.shape[-1:], w["predictor_norm.weight"], w["predictor_norm.bias"], 1e-6)
    return F.linear(x[:, -target.shape[1] :], w["predictor_proj.weight"], w["predictor_proj.bias"])


def weights(part: str, dim: int, depth: int, shape: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights under the released names."""
    hidden = int(dim * META["mlp_ratio"])
    for i in range(depth):
        name = f"{part}blocks.{i}."
        shape |= {f"{name}norm{k}.{v}": (dim,) for k in (1, 2) for v in ("weight", "bias")}
        shape |= {f"{name}attn.qkv.weight": (3 * dim, dim), f"{name}attn.qkv.bias": (3 * dim,)}
        shape |= {f"{name}attn.proj.weight": (dim, dim), f"{name}attn.proj.bias": (dim,)}
        shape |= {f"{name}mlp.fc1.weight": (hidden, dim), f"{name}mlp.fc1.bias": (hidden,)}
        shape |= {f"{name}mlp.fc2.weight": (dim, hidden), f"{name}mlp.fc2.bias": (dim,)}
    return {name: 0.3 * torch.randn(size, dtype=torch.float64) for name, size in shape.items()}


def record(folder: Path, steps: int, **changes: Any) -> str:
    """Runs the equations of I-JEPA in plain code and writes them down as a fixture; changes: other schedules."""
    torch.manual_seed(0)
    meta = META | changes
    d, e = META["embed_dim"], META["predictor_embed_dim"]
    encoder = weights("", d, META["depth"], {"patch_embed.proj.weight": (d, 3, 8, 8), "patch_embed.proj.bias": (d,)})
    encoder |= {"norm.weight": torch.rand(d).double(), "norm.bias": torch.rand(d).double()}
    predictor = weights("predictor_", e, 1, {"mask_token": (1, 1, e), "predictor_embed.weight": (e, d)})
    predictor |= {n: torch.rand(e).double() for n in ("predictor_embed.bias", "predictor_norm.weight")}
    predictor |= {"predictor_norm.bias": torch.rand(e).double(), "predictor_proj.bias": torch.rand(d).double()}
    predictor |= {"predictor_proj.weight": torch.randn(d, e).double()}
    trained = {"encoder": encoder, "predictor": predictor}
    fixed = {"encoder": {"pos_embed": positions(d)}, "predictor": {"predictor_pos_embed": positions(e)}}
    target = {name: value + 0.01 for name, value in encoder.items()}
    tensors = {"images": torch.randn(2, B, 3, *META["img_size"]).double()}
    for part, w in (*trained.items(), ("target_encoder", target)):
        tensors |= {f"init/{part}/{name}": value.clone() for name, value in w.items()}
        tensors |= {f"init/{part}/{name}": value.clone() for name, value in fixed[part.removeprefix("target_")].items()}
    for w in trained.values():
        for value in w.values():
            value.requires_grad_()
    every = [p for w in trained.values() for p in w.values()]
    decayed = [p for w in trained.values() for n, p in w.items() if p.ndim > 1]
    plain = [p for p in every if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain}], weight_decay=0.0)
    trajectory, planned = [], int(1.25 * 9)
    warmup = int(meta["warmup_epochs"] * 3)
    for step in range(steps):
        images = tensors["images"][step % 2]
        sets = {"context": [torch.stack([torch.randperm(24)[:7].sort().values for _ in range(B)]) for _ in range(C)]}
        sets["target"] = [torch.stack([torch.randperm(24)[:5].sort().values for _ in range(B)]) for _ in range(M)]
        tensors |= {f"masks/{step}/{k}/{i}": table for k, tables in sets.items() for i, table in enumerate(tables)}
        where, lr = (step + 1) / planned, meta["ref_lr"]
        if step + 1 < warmup:
            lr = meta["start_lr"] + (step + 1) / warmup * (meta["ref_lr"] - meta["start_lr"])
        else:
            fall = 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (planned - warmup)))
            lr = meta["final_lr"] + (meta["ref_lr"] - meta["final_lr"]) * fall
        decay = META["final_wd"] + (META["wd"] - META["final_wd"]) * 0.5 * (1 + math.cos(math.pi * where))
        momentum = 0.9 + step * 0.1 / (1.25 * 9)
        for group, value in zip(optimizer.param_groups, (decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = lr, value
        with torch.no_grad():
            full = encode(target | fixed["encoder"], images, None)
            normed = F.layer_norm(full, (d,))
            s_y = [normed.gather(1, t[..., None].expand(-1, -1, d)) for t in sets["target"] for _ in range(C)]
        s_x = [encode(encoder | fixed["encoder"], images, c) for c in sets["context"]]
        w = predictor | fixed["predictor"]
        s_hat = [predict(w, s_x[i], sets["context"][i], t) for t in sets["target"] for i in range(C)]
        loss = F.smooth_l1_loss(torch.cat(s_hat), torch.cat(s_y))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            tensors["step0/context_encoder_output"] = torch.cat(s_x).detach().clone()
            tensors["step0/encoder_full_output"] = encode(encoder | fixed["encoder"], images, None).detach()
            tensors["step0/target_encoder_output"], tensors["step0/target"] = full, torch.cat(s_y)
            tensors["step0/prediction"] = torch.cat(s_hat).detach().clone()
            for part, named in trained.items():
                tensors |= {f"step0/grad/{part}/{n}": p.grad.clone() for n, p in named.items() if p.grad is not None}
        optimizer.step()
        with torch.no_grad():
            target = {n: momentum * value + (1 - momentum) * encoder[n] for n, value in target.items()}
        trajectory.append({"loss": loss.item(), "lr": lr, "weight_decay": decay, "momentum": momentum})
    for part, w in (*trained.items(), ("target_encoder", target)):
        tensors |= {f"final/{part}/{name}": value.detach().clone() for name, value in w.items()}
    (folder / "other.json").write_text(json.dumps({"meta": meta, "trajectory": trajectory}))
    save_file(tensors, folder / "other.safetensors")
    return str(folder / "other")
