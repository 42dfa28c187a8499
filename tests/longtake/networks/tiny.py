"""Tiny networks and sequences for the tests of this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longtake.networks.attention import BlockCausalAttention, FullAttention, WindowAttention
from longtake.networks.conditioning import ActionEmbedding, FrameRateEmbedding, TextEmbedding
from longtake.networks.lact import LaCT
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.memory import Memory
from longtake.networks.video_dit import VideoDiT
from longtake.types import Conditions

# Every causal mixer, with what makes its memory interesting.
CAUSAL_MIXERS: dict[str, Callable[..., Any]] = {
    "block_causal": BlockCausalAttention,
    "window1": partial(WindowAttention, window=1),
    "window2_sink1": partial(WindowAttention, window=2, sinks=1),
    "window1_sink2": partial(WindowAttention, window=1, sinks=2),
    "window1_part": partial(WindowAttention, window=1, kv_tokens=5),
    "window2_part_sink1": partial(WindowAttention, window=2, kv_tokens=7, sinks=1),
    "lact": LaCT,
    "lact_no_time": partial(LaCT, time_rope="none"),
    "lact_momentum": partial(LaCT, momentum=True),
    "lact_muon": partial(LaCT, muon=True, momentum=True),
    "lact_sink": partial(LaCT, window=1, sinks=1),
}
MIXERS = {"full": FullAttention, **CAUSAL_MIXERS}


def difference(a: Tensor, b: Tensor) -> float:
    """Returns max|a - b| / max|b|, the measure of every "equal within" of the project."""
    return ((a - b).abs().max() / b.abs().max()).item()


def tiny_network(
    mixer: Callable[..., Any], *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> VideoDiT:
    """Returns a network of 2 layers with head width 20 (8 + 6 + 6), all parts of which matter to the output."""
    settings: dict[str, Any] = {
        "dim": 80,
        "ffn_dim": 128,
        "num_heads": 4,
        "num_layers": 2,
        "in_channels": 4,
        "freq_dim": 32,
        "text": partial(TextEmbedding, text_dim=12),
        "actions": partial(ActionEmbedding, action_dim=3),
        "frame_rate": FrameRateEmbedding,
    }
    torch.manual_seed(seed)
    network = VideoDiT(mixer=mixer, **(settings | changes))
    stir(network)
    return network.to(dtype)


def stir(network: VideoDiT) -> None:
    """Moves every parameter away from zeros and ones, and lets the fast weights learn fast enough to be seen."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, parameter in network.named_parameters():
            if name.endswith("lr_proj.bias"):
                parameter += 4.0
            if name.endswith("ttt_scale_proj.bias"):
                parameter += 1.0


@dataclasses.dataclass
class Sequence4:
    """Clean and noisy chunks with all their conditions: what a training pass and a rollout must agree on."""

    clean: Tensor  # [b chunks v f c h w]
    noisy: Tensor  # [b chunks repeats v f c h w]
    sigma: Tensor  # [b chunks repeats v f]
    actions: Tensor  # [b chunks f a]
    text_index: Tensor  # [b chunks v]
    text: Tensor  # [b n l d]
    text_mask: Tensor
    fps: Tensor

    def slots(self, layout: ChunkLayout) -> tuple[Tensor, Tensor, Conditions]:
        """Returns latents, noise levels and conditions of the slots of a layout."""
        x, sigma = [], []
        for slot in layout.slots:
            is_clean = slot.role == "context"
            x.append(self.clean[:, slot.chunk] if is_clean else self.noisy[:, slot.chunk, slot.repeat])
            level = self.sigma[:, slot.chunk, slot.repeat]
            sigma.append(torch.zeros_like(level) if is_clean else level)
        chunks = [slot.chunk for slot in layout.slots]
        conditions = Conditions(
            text_emb=self.text,
            text_mask=self.text_mask,
            text_index=self.text_index[:, chunks],
            actions=self.actions[:, chunks],
            fps=self.fps,
        )
        return torch.stack(x, 1), torch.stack(sigma, 1), conditions


def tiny_sequence(
    *, batch: int = 2, chunks: int = 5, repeats: int = 1, views: int = 1, frames: int = 3, size: int = 4, seed: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Sequence4:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    latents = (views, frames, 4, size, size)
    return Sequence4(
        clean=randn(batch, chunks, *latents),
        noisy=randn(batch, chunks, repeats, *latents),
        sigma=torch.rand(batch, chunks, repeats, views, frames, generator=draw, dtype=torch.float64).to(dtype),
        actions=randn(batch, chunks, frames, 3),
        text_index=torch.randint(0, 2, (batch, chunks, views), generator=draw),
        text=randn(batch, 2, 6, 12),
        text_mask=torch.arange(6) < torch.tensor([[4, 0], [6, 3]]).repeat(batch // 2 or 1, 1)[:batch, :, None],
        fps=torch.linspace(8.0, 16.0, batch, dtype=dtype),
    )


def tiny_grid(sequence: Sequence4) -> Grid:
    _, _, views, frames, _, height, width = sequence.clean.shape
    return Grid(views, frames, height // 2, width // 2)


def rolled_out(
    network: VideoDiT,
    sequence: Sequence4,
    *,
    repeat: int = 0,
    at_chunk: Callable[[int, Memory], Memory] | None = None,
    is_right: bool = True,
) -> Tensor:
    """Returns the velocities [b chunks v f c h w] of a rollout that is fed the clean chunks, as a sampler would ask:
    the commit of chunk i-1 together with the first evaluation of chunk i, then one more that only reads.

    Args:
        at_chunk: is given the memory after each commit and returns the one to go on with.
        is_right: False where a mistake was put in, and the two evaluations may differ.
    """
    grid, memory = tiny_grid(sequence), network.empty_memory()
    outs = []
    for chunk in range(sequence.clean.shape[1]):
        layout = ChunkLayout.stream(chunk, grid, commit=chunk > 0)
        x, sigma, conditions = sequence.slots(_of_repeat(layout, repeat))
        first, memory = network(x, sigma, conditions, layout, memory)
        out = first[:, -1]
        if at_chunk is not None:
            memory = at_chunk(chunk, memory)
        layout = ChunkLayout.stream(chunk, grid, commit=False)
        x, sigma, conditions = sequence.slots(_of_repeat(layout, repeat))
        again, same = network(x, sigma, conditions, layout, memory)
        assert same is memory
        assert not is_right or difference(again[:, 0], out) < (1e-9 if out.dtype == torch.float64 else 1e-4)
        outs.append(again[:, 0])
    return torch.stack(outs, 1)


def _of_repeat(layout: ChunkLayout, repeat: int) -> ChunkLayout:
    slots = tuple(s if s.role == "context" else dataclasses.replace(s, repeat=repeat) for s in layout.slots)
    return dataclasses.replace(layout, slots=slots)


def teacher_forced(network: VideoDiT, sequence: Sequence4) -> tuple[Tensor, ChunkLayout]:
    """Returns the velocities of the training pass [b s v f c h w] and its layout."""
    chunks, repeats = sequence.noisy.shape[1:3]
    layout = ChunkLayout.teacher_forcing(chunks, repeats, tiny_grid(sequence))
    x, sigma, conditions = sequence.slots(layout)
    return network(x, sigma, conditions, layout)[0], layout
