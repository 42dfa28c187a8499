"""Training step of VideoDiT against diffusers' Wan transformer, in turn, eager and compiled.

Both have the same weights and inputs: mixer full, one slot, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import paired, write_result
from longtake.networks.attention import FullAttention
from longtake.networks.conditioning import TextEmbedding
from longtake.networks.layout import ChunkLayout
from longtake.networks.video_dit import VideoDiT
from longtake.pretrained.wan import load_pretrained
from longtake.types import Conditions


@dataclass(frozen=True)
class Case:
    """One size: 16-channel latents of `frames` x `side` x `side`, patch (1, 2, 2)."""

    width: int
    heads: int
    layers: int
    frames: int
    side: int
    batch: int
    text: int = 32

    @property
    def tokens(self) -> int:
        return self.frames * (self.side // 2) ** 2


CASES = {
    384: Case(width=384, heads=6, layers=6, frames=6, side=16, batch=4),
    1024: Case(width=1024, heads=16, layers=4, frames=6, side=24, batch=1),
}


def run(argv: list[str]) -> int:
    """Prints tokens a second of both, their ratio, and the share of the machine's matmul ceiling."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds, clock: {clock.__name__}")
    figures: dict[str, Any] = {}
    for dtype in [torch.bfloat16] if args.bf16_only else [torch.float32, torch.bfloat16]:
        ceiling = matmul_ceiling(dtype, args.device, clock)
        figures[f"ceiling_gflops_{_name(dtype)}"] = ceiling / 1e9
        print(f"matmul ceiling {_name(dtype)}: {ceiling / 1e9:.0f} GFLOP/s")
        for width in args.widths:
            for compiled in [False, True] if args.compile else [False]:
                name = f"width {width} {_name(dtype)} {'compiled' if compiled else 'eager'}"
                figures[name] = _compare(name, CASES[width], dtype, compiled, ceiling, args, clock)
    write_result("train_step", figures, args.output)
    return 0


def matmul_ceiling(dtype: torch.dtype, device: str, clock: Callable[[], float], size: int = 2048) -> float:
    """Returns the FLOP/s of a large square matmul, the best of ten."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = clock()
        a @ b
        _wait(device)
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds)


def _compare(
    name: str,
    case: Case,
    dtype: torch.dtype,
    compiled: bool,
    ceiling: float,
    args: argparse.Namespace,
    clock: Callable[[], float],
) -> dict[str, Any]:
    if compiled:
        torch.compiler.reset()
    ours, peer, flops = _candidates(case, dtype, compiled, args.device)

    def speed(step: Callable[[], None]) -> Callable[[], float]:
        def tokens_a_second() -> float:
            start = clock()
            step()
            _wait(args.device)
            return case.batch * case.tokens / (clock() - start)

        return tokens_a_second

    result = paired(speed(ours), speed(peer), args.rounds)
    token = 3 * flops / (case.batch * case.tokens)
    shares = [token * statistics.median(speeds) / ceiling for speeds in (result.ours, result.peer)]
    row = result.row(f"{name}, ours | peer", "tokens/s")
    print(f"{row}; of the ceiling {shares[0]:.0%} | {shares[1]:.0%}", flush=True)
    return result.to_json() | {"ceiling_share_ours": shares[0], "ceiling_share_peer": shares[1]}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _candidates(
    case: Case, dtype: torch.dtype, compiled: bool, device: str
) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Returns a forward and backward pass of each network and the FLOPs of a forward pass."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    head_dim = case.width // case.heads
    peer = WanTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=head_dim,
        ffn_dim=4 * case.width,
        num_layers=case.layers,
        text_dim=64,
    ).to(device)
    network = VideoDiT(
        dim=case.width,
        ffn_dim=4 * case.width,
        num_heads=case.heads,
        num_layers=case.layers,
        mixer=FullAttention,
        text=partial(TextEmbedding, text_dim=64, attends_padding=True),
    ).to(device)
    load_pretrained(network, peer.state_dict())
    latents = torch.randn(case.batch, 16, case.frames, case.side, case.side, device=device)
    timestep = 1000 * torch.rand(case.batch, device=device)
    text = torch.randn(case.batch, case.text, 64, device=device)
    slots = latents.transpose(1, 2)[:, None, None]
    layout = ChunkLayout.one_shot(network.grid(slots.shape))
    conditions, sigma = Conditions(text_emb=text[:, None]), (timestep / 1000).view(-1, 1, 1, 1)
    if compiled:
        for block in network.blocks:
            block.compile()
        for block in peer.blocks:
            block.compile()

    def ours() -> Tensor:
        return network(slots, sigma, conditions, layout)[0]

    def theirs() -> Tensor:
        return peer(latents, timestep, text, return_dict=False)[0]

    flops = network.num_flops(layout, case.batch, case.text)
    return _step(ours, network, dtype, device), _step(theirs, peer, dtype, device), flops


def _step(forward: Callable[[], Tensor], network: nn.Module, dtype: torch.dtype, device: str) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = forward().float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    return step


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train_step", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--compile", action="store_true", help="compare compiled blocks too")
    parser.add_argument("--bf16-only", action="store_true", help="leave out float32")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a busy machine (1 thread)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    return parser.parse_args(argv)
