"""A codec that loses nothing and a network that knows the video: what is left is the bookkeeping of a rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.encoders.video import LatentGeometry
from longtake.geometry import group_by_latent
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.memory import Memory
from longtake.types import Conditions

RATIO = 4


class LosslessCodec:
    """Four frames of three colours become the twelve channels of a latent; the first frame stands alone.

    Args:
        keep: notes in `encoded` what it was given.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.geometry = LatentGeometry(ratio_time=RATIO, ratio_space=1, channels=12)
        self.encoded: list[Tensor] = []

    def encode(self, video: Tensor) -> Tensor:
        if self.keep:
            self.encoded.append(video.clone())
        assert video.shape[2] % RATIO == 1, f"{video.shape[2]} frames are no causal clip"
        padded = torch.cat([torch.zeros_like(video[:, :, :3]).expand(-1, -1, 3, -1, -1, -1), video], dim=2)
        return padded.unflatten(2, (-1, RATIO)).flatten(3, 4)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.unflatten(3, (RATIO, 3)).flatten(2, 3)[:, :, 3:].clone()


class KnowsTheVideo:
    """Predicts the velocity that leads to the source, [b v t c h w]. Its action column tells it the frame numbers."""

    streams = False

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.sigmas: list[Tensor] = []
        self.xs: list[Tensor] = []

    def grid(self, shape: tuple[int, ...]) -> Grid:
        views, frames, _, height, width = shape[-5:]
        return Grid(views, frames, height, width)

    def empty_memory(self) -> Memory:
        return Memory.empty(1)

    def __call__(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, layout: ChunkLayout, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        assert memory is None
        self.xs.append(x)
        self.sigmas.append(sigma)
        assert conditions.actions is not None
        first = int(conditions.actions[0, 0, 0, -1])  # of the latent that codes the first frame alone
        window = self.source[:, :, first : first + 1 + RATIO * (x.shape[3] - 1)]
        missing = 1 + RATIO * (x.shape[3] - 1) - window.shape[2]
        window = torch.cat([window, window[:, :, -1:].expand(-1, -1, missing, -1, -1, -1)], dim=2)
        truth = LosslessCodec().encode(window)[:, None]
        return (x - truth) / sigma.clamp(min=1e-6)[..., None, None, None], None


def frame_numbers(start: int, count: int) -> Conditions:
    """Returns conditions of one window whose action is the number of each frame."""
    numbers = torch.arange(start, start + count, dtype=torch.float32)[None, :, None]
    return Conditions(actions=group_by_latent(numbers, RATIO)[:, None])
