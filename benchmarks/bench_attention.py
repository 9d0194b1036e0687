"""Time ``attend`` and its alternatives, forward and backward, on the ragged sets of real masks.

    python benchmarks/bench_attention.py --threads 1
    python benchmarks/bench_attention.py --grid 8 --batch-size 128 --heads 3 --dtypes bf16

Sets are the contexts of a batch, the predictor's sequences (a context and one target block), and as many of one length.
Lengths are new at every repeat, as in training: some CPU kernels are compiled for each new size. The alternatives:

    xformers, sdpa   backends of ``attend``, where they can run here
    fused            torch's scaled_dot_product_attention: one call for sets of one length, else one for each set
    padded           one scaled_dot_product_attention over sets padded to the longest, with a mask

Times are medians in milliseconds: CPU time of the process on a CPU (others may use the machine), events on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.encoders.attention import attend, why_not
from jepa_kit.maskers import MultiBlock
from jepa_kit.set_lengths import SetLengths

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Way = Callable[[Tensor, Tensor, Tensor, SetLengths], Tensor]


def draw_lengths(grid: int, batch_size: int, device: str, count: int) -> Iterator[dict[str, SetLengths]]:
    """Yield lengths of each kind of sets, ``count`` times."""
    masker = MultiBlock(grid=(grid, grid))
    for epoch in range(count):
        masks = masker(np.arange(batch_size), seed=0, epoch=epoch).to(device)
        sequences = masks.sequences
        uniform = SetLengths([round(sequences.total / len(sequences))] * len(sequences), device)
        yield {"contexts": masks.context.lengths, "sequences": sequences, "one length": uniform}


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    """Return sets padded to the longest one, and a mask."""
    place = torch.arange(lengths.longest, device=q.device)
    length = torch.tensor(lengths.on_host, device=q.device)
    mask = place < length[:, None]  # [S, L]
    rows = [torch.nn.utils.rnn.pad_sequence(x.split(lengths.on_host), batch_first=True) for x in (q, k, v)]
    qs, ks, vs = (x.transpose(1, 2) for x in rows)  # 3 x [S, h, L, d]
    out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask[:, None, None])
    return out.transpose(1, 2)[mask]


def fused(q: Tensor, k: Tensor, v: Tensor, lengths: SetLengths) -> Tensor:
    """Run torch's fused kernel: one call for sets of one length, otherwise one per set."""
    rows = [lengths.total] if lengths.uniform else list(lengths.on_host)
    out = []
    for part in zip(*(x.split(rows) for x in (q, k, v)), strict=True):
        length = lengths.longest if lengths.uniform else len(part[0])
        qs, ks, vs = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in part)  # 3 x [S or 1, h, L, d]
        out.append(F.scaled_dot_product_attention(qs, ks, vs).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def ways(device: str, dtype: torch.dtype) -> dict[str, Way]:
    sample = torch.empty(0, device=device, dtype=dtype)
    backends = {name: partial(attend, backend=name) for name in ("xformers", "sdpa") if why_not(name, sample) is None}
    return {**backends, "fused": fused, "padded": padded}


def timed(run: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Return milliseconds and the result of a call."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)), out
    begin = time.process_time()
    out = run()
    return 1e3 * (time.process_time() - begin), out


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the median time of forward and backward per kind of sets and alternative; compare their values."""
    times: dict[tuple[str, str], list[float]] = {}
    tolerance = 6e-2 if dtype == torch.bfloat16 else 1e-5
    for repeat, kinds in enumerate(draw_lengths(args.grid, args.batch_size, args.device, args.repeats + 1)):
        for kind, lengths in kinds.items():
            shape = (lengths.total, 3, args.heads, args.head_dim)
            qkv = torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True)
            expected = both(padded, qkv, lengths)
            for name, way in ways(args.device, dtype).items():
                spent, out = timed(partial(both, way, qkv, lengths), args.device)
                torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
                if repeat:  # the first repeat warms up
                    times.setdefault((kind, name), []).append(spent)
    return [{"sets": kind, "way": way, "ms": statistics.median(t)} for (kind, way), t in times.items()]


def both(way: Way, qkv: Tensor, lengths: SetLengths) -> Tensor:
    """Run forward and backward."""
    q, k, v = qkv.unbind(1)
    out = way(q, k, v, lengths)
    out.backward(torch.ones_like(out))
    return out.detach()


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=14, help="side of the grid in patches")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_attention.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name().replace(" ", "_") if on_gpu else f"cpu_{platform.machine()}"
    name = f"{machine}_torch{torch.__version__.split('+')[0]}_attention.json"
    output = args.output or Path(__file__).parent / "results" / name
    results = []
    for dtype in args.dtypes:
        for row in measure(args, DTYPES[dtype]):
            results.append({"dtype": dtype, **row})
            print(f"{dtype:8s} {row['sets']:11s} {row['way']:9s} {row['ms']:8.1f} ms", flush=True)
    setting = {k: v for k, v in vars(args).items() if k != "output"}
    report = {"machine": machine, "torch": torch.__version__, "load_average": os.getloadavg()[0], **setting}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**report, "results": results}, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
