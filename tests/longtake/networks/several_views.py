"""Tiny networks over several views, and what they work on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longtake.networks.attention import FullAttention
from longtake.networks.control import Control
from longtake.networks.layout import ChunkLayout
from longtake.networks.video_dit import VideoDiT
from longtake.networks.views import CrossViews, ViewChannels
from longtake.types import Conditions
from tests.longtake.networks.tiny import tiny_network

RIG = {"views": {"front": {"yaw": 0}, "right": {"yaw": 90}, "rear": {"yaw": 180}, "left": {"yaw": 270}}}
RING = {"front": ["left", "right"], "right": ["front", "rear"], "rear": ["right"], "left": ["front", "rear"]}
DESIGNS = {"channels": partial(ViewChannels, rig=RIG), "cross": partial(CrossViews, rig=RIG, neighbours=RING)}
CONTROL = partial(Control, types=["depth", "labels"], into=[0, 1])


def network_of(design: str, *, mixer: Any = FullAttention, **changes: Any) -> VideoDiT:
    """Returns a network in which every parameter matters; without text and actions unless asked for."""
    plain: dict[str, Any] = {"text": None, "actions": None, "frame_rate": None, "views": DESIGNS[design]}
    return tiny_network(mixer, **(plain | changes))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents_of(ids: list[list[int]], *, slots: int = 1, frames: int = 2, size: int = 4) -> Tensor:
    """Returns latents [b s v f c h w]; those of a view depend on its id, not on where it stands."""
    whole = drawn(len(ids), slots, len(RIG["views"]), frames, 4, size, size)
    return torch.stack([whole[row][:, torch.tensor(own)] for row, own in enumerate(ids)])


def predicted(network: VideoDiT, x: Tensor, *, sigma: Tensor | None = None, **told: Any) -> Tensor:
    """Returns the velocities [b s v f c h w] of one bidirectional slot."""
    level = torch.full((len(x), 1, 1, 1), 0.6, dtype=x.dtype) if sigma is None else sigma
    layout = ChunkLayout.one_shot(network.grid(x.shape))
    with torch.no_grad():
        return network(x, level, Conditions(**told), layout)[0]
