"""What a video tokenizer is: pixels <-> tokens of a codebook, causal in time, decoded in a stream.

The discrete sibling of `VideoEncoder`. The first pixel frame is one latent frame of tokens, every `ratio_time` further
ones another: 1 + 8k frames are 1 + k latent frames at 8. Tokens of the first frames of a clip are the first tokens of
the clip, whatever follows.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longtake.encoders.frozen import FrozenEncoder
from longtake.encoders.video import LatentGeometry
from longtake.errors import ConfigError, DataError
from longtake.geometry import latent_frames


@dataclass(frozen=True)
class TokenGeometry:
    """How tokens relate to pixels.

    Attributes:
        ratio_time: pixel frames a latent frame, the first one aside.
        ratio_space: pixels a token, in rows and in columns.
        levels: of the digits of a token, the fastest one first.
    """

    ratio_time: int
    ratio_space: int
    levels: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """Tokens there are: 0 .. vocab_size - 1."""
        return math.prod(self.levels)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens. Raises ConfigError naming the nearest sizes that fit."""
        return LatentGeometry(self.ratio_time, self.ratio_space, len(self.levels)).grid(height, width)


class VideoTokens(FrozenEncoder):
    """Base of all video tokenizers.

    Args:
        geometry: how tokens relate to pixels.
    """

    def __init__(self, geometry: TokenGeometry) -> None:
        super().__init__()
        self.geometry = geometry

    @abstractmethod
    def encode_clips(self, video: Tensor) -> Tensor:
        """Returns the tokens, int64 [n f h w], of clips [n t c h w] in [-1, 1], in the dtype of the weights."""

    @abstractmethod
    def decode_clips(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Returns the frames [n t c h w] of tokens [n f h w], and what the next call needs."""

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Returns tokens, int64 [b v t h w]. Those of a prefix of the video are a prefix of them, bit for bit.

        Args:
            video: in [-1, 1], [b v t c h w] with 1 + k * ratio_time frames; it begins at a causal start.

        Raises:
            ConfigError: another number of frames, or a size that is no multiple of the tokenizer's.
        """
        num_lat = latent_frames(video.shape[2], self.geometry.ratio_time, "video.num_frames")
        grid = self.geometry.grid(video.shape[-2], video.shape[-1])
        tokens = self._encoded(video)
        if tokens.shape[1:] != (num_lat, *grid):
            raise ConfigError(
                f"the weights make {list(tokens.shape[1:])} tokens (frames, rows, columns) of this video, and "
                f"{[num_lat, *grid]} were expected with ratios of {self.geometry.ratio_time} and "
                f"{self.geometry.ratio_space}. Change `encoder.video.ratio_time` or `encoder.video.ratio_space`."
            )
        return rearrange(tokens, "(b v) t h w -> b v t h w", b=video.shape[0])

    def encode_starts(self, video: Tensor, starts: Mapping[int, int]) -> dict[int, Tensor]:
        """Returns what `encode` makes of several sub-clips of a video, by their first frame; alike ones in one batch.

        Args:
            video: as for `encode`, of any length.
            starts: for each first frame the number of frames, 1 + k * ratio_time.
        """
        found: dict[int, Tensor] = {}
        for count in sorted(set(starts.values())):
            alike = [start for start, own in starts.items() if own == count]
            clips = torch.cat([video[:, :, start : start + count] for start in alike])
            found |= zip(alike, self.encode(clips).split(len(video)), strict=True)
        return {start: found[start] for start in starts}

    @torch.no_grad()
    def decode_stream(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the frames of the next tokens, and what the following call needs.

        All chunks of a video, however it is cut, give the frames that `decode` gives at once, bit for bit.

        Args:
            tokens: int [b v t h w].
            state: what the call before returned; None at the start of a video.

        Raises:
            DataError: a token that is none of this tokenizer's.
            ConfigError: no token grids at all.
        """
        if tokens.ndim != 5 or 0 in tokens.shape or tokens.is_floating_point():
            raise ConfigError(
                f"tokens are {tokens.dtype} of shape {list(tokens.shape)}; expected whole numbers, [batch, views, "
                "latent frames, rows, columns]. Change `data` or `input_tokens_dir`."
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.geometry.vocab_size:
            raise DataError(
                f"tokens reach from {low} to {high}; expected 0 to {self.geometry.vocab_size - 1}, which this "
                "tokenizer has. They were made by another one: change `encoder/video`, `data` or `input_tokens_dir`."
            )
        return self._decoded(tokens.long(), state)
