"""A video tokenizer without weights for tests: colours of 8x8 blocks in 4 x 4 x 4 levels, 1 + 8k frames, causal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.encoders.video_tokens import TokenGeometry, VideoTokens

LEVELS = 4


class BlockTokens(VideoTokens):
    """A token is the colour of a block in the last frame of a group; its frames all have that colour."""

    fingerprint = "block-tokens-1"

    def __init__(self) -> None:
        super().__init__(TokenGeometry(ratio_time=8, ratio_space=8, levels=(LEVELS, LEVELS, LEVELS)))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def encode_clips(self, video: Tensor) -> Tensor:
        height, width = video.shape[-2:]
        blocks = video[:, ::8].unflatten(-1, (width // 8, 8)).unflatten(-3, (height // 8, 8)).mean(dim=(-3, -1))
        digits = ((blocks + 1) / 2 * LEVELS).long().clamp(0, LEVELS - 1)  # [n f c h w]
        return digits[:, :, 0] + LEVELS * (digits[:, :, 1] + LEVELS * digits[:, :, 2])

    def decode_clips(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        digits = torch.stack([tokens // LEVELS**place % LEVELS for place in range(3)], dim=2)
        frames = (digits + 0.5) / LEVELS * 2 - 1
        frames = frames.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)
        counts = [1 if state is None and index == 0 else 8 for index in range(tokens.shape[1])]
        return frames.repeat_interleave(torch.tensor(counts), dim=1), True
