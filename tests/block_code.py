"""A video encoder without weights for tests: mean colours of 8x8 blocks, 1 + 4k frames, causal and streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.encoders.video import LatentGeometry, VideoEncoder


class BlockCode(VideoEncoder):
    """Channels: red, green, blue of the last frame of a group, and how much brighter it is than the first."""

    fingerprint = "block-code-1"

    def __init__(self) -> None:
        super().__init__(LatentGeometry(ratio_time=4, ratio_space=8, channels=4), torch.zeros(4), torch.ones(4))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def encode_clips(self, video: Tensor) -> Tensor:
        height, width = video.shape[-2:]
        blocks = video.unflatten(-1, (width // 8, 8)).unflatten(-3, (height // 8, 8)).mean(dim=(-3, -1))
        last = blocks[:, ::4]  # frames 0, 4, 8, ...: each ends a group
        first = torch.cat([blocks[:, :1], blocks[:, 1::4]], dim=1)
        step = (last - first).mean(dim=2, keepdim=True)
        return 2 * torch.cat([last, step], dim=2)

    def decode_clips(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        colour, step = latents[:, :, :3] / 2, latents[:, :, 3:] / 2
        fractions = torch.arange(3, -1, -1, device=latents.device).view(4, 1, 1, 1) / 3
        frames = (colour.unsqueeze(2) - step.unsqueeze(2) * fractions).flatten(1, 2)
        frames = frames.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)
        return (frames[:, 3:] if state is None else frames), True
