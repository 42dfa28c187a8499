"""What a briefly trained context -> target model has learnt: it looks at the context and at the actions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lightning_modules.ar_diffusion import ARDiffusion
from longtake.rollout.noise import NoiseKey
from longtake.types import Clip
from tests.random_clips import RandomClips
from tests.tiny_ar import ACTIONS, VIDEO, fit_tiny, make_data, make_module

BLOCKS = 3


class Lamps(RandomClips):
    """Grey clips that are as bright as the block before, and brighter or darker as the first action of a block says."""

    def batch(self, positions: list[int]) -> Clip:
        generators = [torch.Generator().manual_seed(position) for position in positions]
        start = torch.stack([torch.rand(1, generator=g) * 120 + 70 for g in generators])
        pushes = torch.stack([torch.randint(0, 2, (BLOCKS,), generator=g) * 2.0 - 1 for g in generators])
        pushes[:, 0] = 0
        levels = (start + 25 * pushes.cumsum(1)).repeat_interleave(9, dim=1)
        actions = torch.zeros(len(positions), 9 * BLOCKS, ACTIONS)
        actions[:, :, 0] = pushes.repeat_interleave(9, dim=1)
        video = levels.to(torch.uint8)[:, None, :, None, None, None].expand(-1, 1, -1, 3, *self.size[2:])
        base = super().batch(positions)
        return dataclasses.replace(base, video=video.contiguous(), actions=actions)


def make_context_module(**objective: Any) -> ARDiffusion:
    nodes: dict[str, Any] = {
        "_target_": "longtake.objectives.context_target.ContextTarget",
        "block_px": 9,
        "num_frames_px": 9 * BLOCKS,
        "action_dropout": 0.0,
        "own_solver": {"_target_": "longtake.rollout.solvers.Euler"},
        "noise_levels": {"_target_": "longtake.objectives.flow_matching.NoiseLevels", "weighting": "none"},
        "chunk_lat": 3,
        **objective,
    }
    return make_module(lr=1e-2, video={**VIDEO, "num_frames": 9 * BLOCKS}, raw_objective=nodes)


def test_the_loss_rises_with_another_context_and_with_other_actions(tmp_path: Path) -> None:
    context = {"clean": 0.4, "noised": 0.2, "recoded": 0.2, "own": 0.2}
    module = make_context_module(context=context, image_start=0.1, own_steps=2)
    data = make_data(num_frames=9 * BLOCKS, batch_size=8)
    data.__class__ = Lamps
    fit_tiny(module, tmp_path, 150, data=data)
    clip = data.batch(list(range(5000, 5032)))
    latents, conditions = module.encoded(clip)
    key = NoiseKey(0, tuple(clip.key))

    def loss(latents: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        told = dataclasses.replace(conditions, actions=actions)
        found = [module._val_objective.evaluate(module.network, latents, told, key, s).per_chunk for s in (0.5, 0.75)]
        return torch.stack(found).mean(0)[1]  # block 1 from block 0

    assert conditions.actions is not None
    other = latents.clone()
    other[:, :, :3] = latents[:, :, :3].roll(1, 0)
    flipped = conditions.actions.clone()
    flipped[:, 1] = -flipped[:, 1]
    true = loss(latents, conditions.actions)
    assert loss(other, conditions.actions) > 1.2 * true
    assert loss(latents, flipped) > 1.1 * true
