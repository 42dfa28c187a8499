"""Contexts as the model itself would have drawn them, so that training sees what a rollout feeds back.

Teacher forcing trains on true contexts, and a rollout gives the network its own: small errors of colour and sharpness
that no training pass showed it how to undo, and that grow from chunk to chunk. Here true chunks get noise of a drawn
level and are denoised again by the network, all chunks in one pass a step, each told the true chunks before it. What
comes out keeps the place and bears the network's own faults; from noise alone (level 1) it would be another future,
to which the true next chunk is no answer. A parallel form of resampling histories (Guo et al. 2025, arXiv 2512.15702).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.flow_matching import noised
from longtake.objectives.slot_objective import TrainingPass
from longtake.rollout.conditions import of_chunks
from longtake.rollout.denoise import Network
from longtake.rollout.noise import Draws, NoiseKey, normal, uniform, uniform_of_sample
from longtake.types import Conditions


@torch.no_grad()
def redrawn(
    network: Network,
    chunks: Tensor,
    conditions: Conditions,
    key: NoiseKey,
    levels: Tensor,
    steps: int,
    layout: ChunkLayout,
) -> Tensor:
    """Returns chunks after noise of some level and denoising by the network, [b n v f c h w].

    Args:
        network: predicts velocities.
        chunks: true latents of chunks 0 to n - 1, [b n v f c h w].
        conditions: with the chunks as slot axis.
        key: names the noise.
        levels: noise level of each chunk, [b n].
        steps: network evaluations, even Euler steps from the level to 0.
        layout: teacher forcing of n chunks, one target each.
    """
    slots = [slot.chunk for slot in layout.slots]
    targets = torch.tensor(layout.targets, device=chunks.device)
    clean = chunks.index_select(1, torch.tensor(slots, device=chunks.device))
    told = of_chunks(conditions, slots)
    draws = Draws(list(range(chunks.shape[1])), [0] * chunks.shape[1], *chunks.shape[2:4])
    noise = normal(key, "own", draws, chunks.shape[4:], chunks.device).to(chunks.dtype)
    levels = levels.to(chunks)[:, :, None, None]
    x = noised(chunks, noise, levels[..., None, None, None])
    for step in range(steps):
        sigma = levels.new_zeros(len(chunks), len(slots), 1, 1)
        sigma[:, targets] = levels * (1 - step / steps)
        velocity, _ = network(clean.index_copy(1, targets, x), sigma, told, layout)
        x = x - (levels / steps)[..., None, None, None] * velocity.index_select(1, targets).to(x.dtype)
    torch.clear_autocast_cache()  # weights that were cast without gradient must not serve the training pass
    return x


def own_layout(count: int, grid: Grid, context_sees: Literal["self", "past"]) -> ChunkLayout:
    """Returns the layout of the passes in which the first `count` chunks are drawn again."""
    return ChunkLayout.teacher_forcing(count, 1, grid, context_sees=context_sees)


def with_own_contexts(
    network: Network,
    training_pass: TrainingPass,
    chunks: Tensor,
    conditions: Conditions,
    key: NoiseKey,
    *,
    share: float,
    noise: float,
    steps: int,
) -> TrainingPass:
    """Returns a training pass in which some clips have contexts that the network drew again.

    Args:
        network: predicts velocities.
        training_pass: of teacher forcing, with noise on the contexts or without.
        chunks: the true latents of every chunk, [b n v f c h w].
        conditions: with the chunks as slot axis.
        key: names every draw.
        share: of clips whose contexts are the network's own.
        noise: levels are drawn evenly from [0, this], one a chunk.
        steps: network evaluations.
    """
    layout, count = training_pass.layout, chunks.shape[1] - 1
    if count == 0:
        return training_pass
    chosen = uniform_of_sample(key, "own") < share
    levels = noise * uniform(key, "own_sigma", Draws(list(range(count)), [0] * count))[:, :, 0, 0]
    # every clip takes part, so that every rank runs the network equally often, as sharded networks need
    plain = own_layout(count, layout.grid, layout.context_sees)
    own = redrawn(network, chunks[:, :count], conditions, key, levels, steps, plain)
    contexts = torch.tensor(layout.contexts, device=chunks.device)
    which = torch.tensor([layout.slots[index].chunk for index in layout.contexts], device=chunks.device)
    moved = (own - chunks[:, :count]) * chosen.to(own)[:, None, None, None, None, None, None]
    kept = 1 - training_pass.sigma.index_select(1, contexts)[..., None, None, None]  # what noise left of the context
    changed = training_pass.x.index_select(1, contexts) + kept * moved.index_select(1, which)
    return dataclasses.replace(training_pass, x=training_pass.x.index_copy(1, contexts, changed))
