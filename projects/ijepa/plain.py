"""I-JEPA in one file: the whole method in the order of the paper, with torch, numpy and Pillow alone.

    python projects/ijepa/plain.py IMAGES_FOLDER

Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
https://arxiv.org/abs/2301.08243. An encoder sees a part of an image, the context. From its tokens, a predictor predicts
what another encoder, which sees the whole image, computes for blocks that the context leaves out. No pixel is rebuilt
and no two views are made to agree: the loss compares representations, patch by patch.

jepa_kit computes the same numbers, only faster: tests/projects/test_plain.py trains both from the same weights. Masks
are equal; losses and weights agree to rounding. Parameters have the same names in both.

    B  images in a batch          N  patches of an image     D  width of the encoder
    M  target blocks of an image  S  sets of patches         E  width of the predictor
    h  attention heads            L  patches of a set, with padding

Sets are a table [S, L] of patch numbers, and shorter sets end in ``PAD``. Contexts are [B, L_c]; target blocks are
[B * M, L_t], those of an image one after another.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Grid = tuple[int, int]
Range = tuple[float, float]
Masks = tuple[np.ndarray, list[np.ndarray]]
Batch = tuple[Tensor, Tensor, Tensor]
PAD = -1
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's colours

# --- 1. Masks (section 3, figure 4) ---


def multiblock(
    rng: np.random.Generator,
    grid: Grid,
    num_targets: int = 4,
    target_scale: Range = (0.15, 0.2),
    target_aspect_ratio: Range = (0.75, 1.5),
    context_scale: Range = (0.85, 1.0),
    context_aspect_ratio: Range = (1.0, 1.0),
    min_keep: int = 4,
) -> Masks:
    """Draw the context and the target blocks of one image, each as ascending patch numbers (row by row).

    Targets are large, so that each has a content of its own; the context is what they leave of nearly the whole image
    (tables 6 to 10 compare other choices). A scale is a fraction of the grid's area, an aspect ratio is height over
    width. If fewer than ``min_keep`` patches of the context are left, the blocks are placed again.
    """
    rows, columns = grid
    blocks = [(context_scale, context_aspect_ratio)] + num_targets * [(target_scale, target_aspect_ratio)]
    sizes = []
    for (scale, ratio), (u, v) in zip(blocks, rng.random((len(blocks), 2)), strict=True):
        area = max(1.0, rows * columns * (scale[0] + u * (scale[1] - scale[0])))
        aspect = ratio[0] + v * (ratio[1] - ratio[0])
        # If one side would be longer than the grid, the other one takes up the area.
        height = max(math.sqrt(area * aspect), area / columns)
        width = max(math.sqrt(area / aspect), area / rows)
        sizes.append((min(max(round(height), 1), rows), min(max(round(width), 1), columns)))
    for attempt in range(17):
        places = rng.random((len(blocks), 2))
        if attempt == 16:  # only on tiny grids: the context into one corner, all targets into the opposite one
            places[0] = places[0] >= 0.5
            places[1:] = 1.0 - places[0]
        cells = np.zeros((len(blocks), rows, columns), dtype=bool)
        for block, (h, w), (u, v) in zip(cells, sizes, places, strict=True):
            top, left = min(int(u * (rows - h + 1)), rows - h), min(int(v * (columns - w + 1)), columns - w)
            block[top : top + h, left : left + w] = True
        context = cells[0] & ~cells[1:].any(axis=0)  # what is seen need not be predicted
        if context.sum() >= min_keep:
            return np.flatnonzero(context), [np.flatnonzero(block) for block in cells[1:]]
    raise ValueError(f"targets leave less than min_keep (={min_keep}) patches of a grid of {rows} x {columns}")


def pad(sets: Sequence[np.ndarray]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.from_numpy(s) for s in sets], batch_first=True, padding_value=PAD)


def take(x: Tensor, patches: Tensor) -> Tensor:
    """Return the tokens [S, L, D] of these patches [S, L], from those of all [S, N, D]; for ``PAD`` any token."""
    return x.gather(1, patches.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))


# --- 2. Networks (section 3, figure 3; A.1) ---


def sincos_2d(dim: int, grid: Grid) -> Tensor:
    """Return fixed positions [N, dim]: sine and cosine of the column, then of the row, at dim / 4 frequencies."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    angles = [x.reshape(-1, 1) * frequency for x in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [S, h, L, D / h] each
        mask = None if valid is None else valid[:, None, None]  # no token looks at padding
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def init_weights(network: nn.Module) -> None:
    for name, p in network.named_parameters():
        if p.ndim == 4:  # as in MAE; with 0.02, tokens of small patches would be little but positions
            nn.init.xavier_uniform_(p.view(len(p), -1))
        elif p.ndim == 2:
            nn.init.trunc_normal_(p, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class Encoder(nn.Module):
    """ViT without a class token, which no term of the loss would train."""

    def __init__(self, grid: Grid, patch_size: int, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.pos_embed = nn.Buffer(sincos_2d(dim, grid)[None])
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, stride=patch_size)))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        init_weights(self)

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """[B, 3, h, w] -> [B, N, D], or [B, L, D] of these patches [B, L], which then see nothing but each other."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        if patches is not None:
            x = take(x, patches)
        for block in self.blocks:
            x = block(x, None if patches is None else patches != PAD)
        return self.norm(x)


class Predictor(nn.Module):
    """A narrower ViT (table 14: a width of 384 is better than one of 1,024)."""

    def __init__(self, grid: Grid, dim: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.pos_embed = nn.Buffer(sincos_2d(width, grid))
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)
        init_weights(self)

    def forward(self, s_x: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Context tokens [B, L_c, D] -> predictions [B * M, L_t, D], each block by itself.

        The patches to predict enter as mask tokens: the same learned vector for all, plus the position of each.
        """
        context = context.repeat_interleave(len(targets) // len(context), dim=0)  # [B * M, L_c]
        seen = self.embed(s_x).repeat_interleave(len(targets) // len(s_x), dim=0) + self.pos_embed[context]
        hidden = self.mask_token + self.pos_embed[targets]  # [B * M, L_t, E]
        x, valid = torch.cat([seen, hidden], dim=1), torch.cat([context, targets], dim=1) != PAD
        for block in self.blocks:
            x = block(x, valid)
        return self.proj(self.norm(x[:, seen.shape[1] :]))


# --- 3. Loss and target encoder (section 3, figure 3) ---


class IJEPA(nn.Module):
    def __init__(self, encoder: Encoder, predictor: Predictor) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Return the loss [] of images [B, 3, h, w]."""
        with torch.no_grad():  # trained targets would become what is easiest to predict, a constant
            # Targets are taken from the encoded image: their tokens depend on all of it (table 11).
            h = self.target_encoder(images)  # [B, N, D]
            h = F.layer_norm(h, h.shape[-1:])  # all tokens on one scale; in the released code, not in the paper
            s_y = take(h, targets.view(len(h), -1)).view(*targets.shape, -1)  # [B * M, L_t, D]
        s_x = self.encoder(images, context)
        s_hat_y = self.predictor(s_x, context, targets)
        error = F.smooth_l1_loss(s_hat_y, s_y, reduction="none").mean(-1)  # as released; squared in the paper
        valid = targets != PAD
        return ((error * valid).sum(1) / valid.sum(1)).mean()  # every block counts the same, whatever its size

    @torch.no_grad()
    def move_target(self, momentum: float) -> None:
        """Move the target encoder towards the encoder: targets that change slowly are what prevents collapse."""
        for old, new in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
            old.lerp_(new, 1.0 - momentum)


# --- 4. Optimisation (A.1) ---


def schedule(step: int, steps: int, warmup: int, lr: float) -> tuple[float, float, float]:
    """Return learning rate, weight decay and momentum of a step, 0 to ``steps`` - 1, as in the released run."""
    done = step + 1

    def cosine(first: float, last: float, where: float) -> float:
        return last + (first - last) * (1.0 + math.cos(math.pi * where)) / 2.0

    if done < warmup:
        rate = lr / 5 + (lr - lr / 5) * done / warmup
    else:
        rate = cosine(lr, lr / 1000, (done - warmup) / (steps - warmup))
    return rate, cosine(0.04, 0.4, done / steps), 0.996 + 0.004 * step / steps


def train(model: IJEPA, batches: Iterable[Batch], steps: int, warmup: int, lr: float) -> Iterator[Tensor]:
    """Take a step with each batch of images, contexts and targets, and yield its loss []."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},  # biases and norms
    ]
    optimizer, device = torch.optim.AdamW(groups), trained[0].device
    for step, batch in enumerate(batches):
        rate, decay, momentum = schedule(step, steps, warmup, lr)
        optimizer.param_groups[0]["weight_decay"] = decay
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(*(x.to(device) for x in batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.move_target(momentum)
        yield loss.detach()


# --- 5. Images ---


class Images(Dataset[Any]):
    """The images in a folder. Item (epoch, number) is a crop with its masks, a pure function of these and the seed."""

    def __init__(self, folder: Path, side: int, patch_size: int, seed: int) -> None:
        self.files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in Image.registered_extensions())
        self.side, self.grid, self.seed = side, (side // patch_size, side // patch_size), seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Masks]:
        rng = np.random.default_rng([self.seed, *item])
        image = Image.open(self.files[item[1]]).convert("RGB")
        # The only augmentation: a crop of 0.3 to 1 of the area, 3:4 to 4:3. No flips, no changes of colour.
        area = image.width * image.height * rng.uniform(0.3, 1.0)
        aspect = (4 / 3) ** rng.uniform(-1.0, 1.0)
        w, h = min(image.width, math.sqrt(area * aspect)), min(image.height, math.sqrt(area / aspect))
        left, top = rng.random() * (image.width - w), rng.random() * (image.height - h)
        crop = image.resize((self.side, self.side), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        pixels = (torch.from_numpy(np.array(crop)) / 255 - MEAN) / STD
        return pixels.permute(2, 0, 1), multiblock(rng, self.grid)

    def order(self, epochs: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the items of each step, in a new order every epoch; what is left of an epoch fills no batch."""
        for epoch in range(epochs):
            numbers = np.random.default_rng([self.seed, epoch, len(self.files)]).permutation(len(self.files)).tolist()
            for start in range(0, len(numbers) - batch_size + 1, batch_size):
                yield [(epoch, number) for number in numbers[start : start + batch_size]]


def collate(items: Sequence[tuple[Tensor, Masks]]) -> Batch:
    images, masks = zip(*items, strict=True)
    return torch.stack(images), pad([context for context, _ in masks]), pad([t for _, blocks in masks for t in blocks])


def main(argv: Sequence[str] | None = None) -> None:
    example = "example: python projects/ijepa/plain.py photos --epochs 100 --save plain.pt"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], epilog=example)
    parser.add_argument("folder", type=Path, help="of images")
    sizes = {"epochs": 20, "batch-size": 64, "image-size": 64, "patch-size": 8, "width": 192, "depth": 6}
    for name, default in {**sizes, "seed": 0, "workers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="after the warm-up; default: %(default)s")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="for the target encoder; jepa_kit.load_encoder reads it"
    )
    args = parser.parse_args(argv)
    for name in sizes:
        if (value := getattr(args, name.replace("-", "_"))) < 1:
            parser.error(f"--{name} (={value}) must be at least 1")
    if args.image_size % args.patch_size:
        parser.error(f"--patch-size (={args.patch_size}) must divide --image-size (={args.image_size})")
    if args.width % 64:
        parser.error(f"--width (={args.width}) must be a multiple of 64, the width of a head")
    images = Images(args.folder, args.image_size, args.patch_size, args.seed)
    steps = len(images.files) // args.batch_size * args.epochs
    if not steps:
        parser.error(
            f"{args.folder} has {len(images.files)} images, fewer than one batch (--batch-size {args.batch_size})"
        )

    torch.manual_seed(args.seed)
    heads = args.width // 64
    encoder = Encoder(images.grid, args.patch_size, args.width, args.depth, heads)
    predictor = Predictor(images.grid, args.width, args.width // 2, -(-args.depth // 2), heads)
    model = IJEPA(encoder, predictor).to("cuda" if torch.cuda.is_available() else "cpu")
    order = images.order(args.epochs, args.batch_size)
    batches = DataLoader(images, batch_sampler=order, collate_fn=collate, num_workers=args.workers)
    print(f"{len(images.files)} images, {sum(p.numel() for p in encoder.parameters()):,} parameters of the encoder")
    start, losses = time.perf_counter(), []
    for step, loss in enumerate(train(model, batches, steps, steps // 10, args.lr), start=1):
        losses.append(loss.item())
        if step % 10 == 0 or step == steps:
            rate = step * args.batch_size / (time.perf_counter() - start)
            print(f"step {step}/{steps}  loss {np.mean(losses[-10:]):.4f}  {rate:.0f} images/s", flush=True)
    if args.save:  # the paper evaluates the target encoder
        torch.save({"target_encoder": model.target_encoder.state_dict()}, args.save)


if __name__ == "__main__":
    main()
