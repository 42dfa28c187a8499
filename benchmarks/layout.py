"""Teacher-forcing attention over slots against the same values with a dense mask, forward and backward.

Every target chunk sees the clean chunk before it and itself, every clean chunk itself. The dense mask computes all
pairs of tokens and throws most away; over slots only what is seen is computed: the cost is linear in the chunks.

With glibc a tensor above 32 MB gets fresh pages at every allocation, so that long sequences look more than linear;
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 in the environment shows the arithmetic alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import paired, write_result
from longtake.networks.attention import MixerInput, WindowAttention
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.rope import rotary_table, rotate

HEADS, HEAD_DIM = 6, 64
GRID = Grid(views=1, frames=3, height=8, width=8)  # 192 tokens a slot


def run(argv: list[str]) -> int:
    """Prints milliseconds of both and their ratio, and of slots alone for twice and four times the chunks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks layout", description=__doc__)
    parser.add_argument("--chunks", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=1, help="noisy copies of each chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process, for a busy machine")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    clock = time.process_time if args.cpu_time else time.perf_counter
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        over_slots, dense, gap = _candidates(args.chunks, args.repeats, dtype)
        result = paired(_timed(over_slots, clock), _timed(dense, clock), args.rounds)
        print(result.row(f"{name}, {args.chunks} chunks, ours | dense mask", "ms"))
        print(f"    {1 / result.ratio:.1f} times faster; outputs differ by {gap:.1e}", flush=True)
        longer = {}
        for factor in (2, 4):
            over_slots, _, _ = _candidates(factor * args.chunks, args.repeats, dtype, compare=False)
            times = sorted(_timed(over_slots, clock)() for _ in range(args.rounds + 1))
            longer[factor] = times[len(times) // 2]
            print(f"    {factor} x the chunks, ours: {longer[factor]:.1f} ms", flush=True)
        figures[name] = result.to_json() | {"longer": longer, "difference": gap}
    write_result("layout", figures, args.output)
    return 0


def _timed(step: Callable[[], Tensor], clock: Callable[[], float]) -> Callable[[], float]:
    def milliseconds() -> float:
        start = clock()
        step().float().square().sum().backward()
        return 1000 * (clock() - start)

    return milliseconds


def _candidates(
    chunks: int, repeats: int, dtype: torch.dtype, *, compare: bool = True
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], float]:
    """Returns both computations and, with `compare`, how far apart their outputs are (max|a-b| / max|b|)."""
    layout = ChunkLayout.teacher_forcing(chunks, repeats, GRID)
    torch.manual_seed(0)
    shape = (1, len(layout.slots), GRID.tokens, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    mixer = WindowAttention(HEADS * HEAD_DIM, HEADS, window=1)
    plan = mixer.prepare(layout, None, device=torch.device("cpu"), dtype=dtype)
    table = rotary_table(layout.positions().flatten(0, 1), HEAD_DIM, dtype=dtype)
    mask = _dense_mask(layout) if compare else None

    def over_slots() -> Tensor:
        return mixer(MixerInput(q, q, k, v, layout, plan), None)[0]

    def dense() -> Tensor:
        rows = (rotate(q.flatten(1, 2), table), rotate(k.flatten(1, 2), table), v.flatten(1, 2))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in rows), attn_mask=mask)
        return out.transpose(1, 2).reshape(1, len(layout.slots), GRID.tokens, -1)

    if not compare:
        return over_slots, dense, float("nan")
    with torch.no_grad():
        a, b = over_slots(), dense()
    return over_slots, dense, ((a - b).abs().max() / b.abs().max()).item()


def _dense_mask(layout: ChunkLayout) -> Tensor:
    slots = layout.slots
    sees = torch.eye(len(slots), dtype=torch.bool)
    for i, query in enumerate(slots):
        for j, key in enumerate(slots):
            sees[i, j] |= query.role == "target" and key.role == "context" and key.chunk == query.chunk - 1
    return sees.repeat_interleave(GRID.tokens, 0).repeat_interleave(GRID.tokens, 1)
