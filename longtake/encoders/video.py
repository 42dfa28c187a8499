"""What a video encoder is: pixels <-> normalised latents, causal in time, decoded in a stream.

The first pixel frame is coded by itself, every `ratio_time` further ones together: 1 + 4k frames are 1 + k latents.
Latents of the first frames of a clip are the first latents of the clip, whatever follows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longtake.encoders.frozen import FrozenEncoder
from longtake.errors import ConfigError
from longtake.geometry import latent_frames, pixel_frames

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LatentGeometry:
    """How latents relate to pixels.

    Attributes:
        ratio_time: pixel frames a latent frame, the first one aside.
        ratio_space: pixels a latent cell, in rows and in columns.
        channels: of the latents.
    """

    ratio_time: int
    ratio_space: int
    channels: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of latents. Raises ConfigError naming the nearest sizes that fit."""
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.ratio_space:
                below = max(1, size // self.ratio_space) * self.ratio_space
                raise ConfigError(
                    f"video.{name} is {size}; expected a multiple of {self.ratio_space}, for example {below} or "
                    f"{below + self.ratio_space}. Change `video.{name}`."
                )
        return height // self.ratio_space, width // self.ratio_space


class VideoEncoder(FrozenEncoder):
    """Base of all video encoders. Results are float32 whatever the encoder computes in.

    Args:
        geometry: how latents relate to pixels.
        mean: of each channel of the raw latents; they are normalised to (raw - mean) / std.
        std: of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, geometry: LatentGeometry, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())

    @abstractmethod
    def encode_clips(self, video: Tensor) -> Tensor:
        """Returns normalised latents [n f c h w] of clips [n t c h w] in [-1, 1], in the dtype of the weights."""

    @abstractmethod
    def decode_clips(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Returns the frames [n t c h w] of normalised latents [n f c h w], and what the next call needs."""

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Returns normalised latents, float32 [b v t c h w]. The same video always gives the same latents.

        Args:
            video: in [-1, 1], [b v t c h w] with 1 + k * ratio_time frames; it begins at a causal start.

        Raises:
            ConfigError: another number of frames, or a size that is no multiple of the encoder's.
        """
        latent_frames(video.shape[2], self.geometry.ratio_time, "video.num_frames")
        self.geometry.grid(video.shape[-2], video.shape[-1])
        return rearrange(self._encoded(video).float(), "(b v) t c h w -> b v t c h w", b=video.shape[0])

    def encode_starts(self, video: Tensor, starts: Mapping[int, int]) -> dict[int, Tensor]:
        """Returns what `encode` makes of several sub-clips of a video, by their first frame.

        Args:
            video: as for `encode`, of any length.
            starts: for each first frame the number of frames, 1 + k * ratio_time.
        """
        return {start: self.encode(video[:, :, start : start + count]) for start, count in starts.items()}

    def encode_blocks(self, video: Tensor, block_lat: int | None) -> Tensor:
        """Returns normalised latents [b v t c h w] of a video in blocks, each of them a causal start of its own.

        Args:
            video: as for `encode`; whole blocks, and after them what makes a causal clip, or nothing.
            block_lat: latent frames of a block; None: the video is one causal clip, as for `encode`.
        """
        if block_lat is None:
            return self.encode(video)
        blocks = video.split(pixel_frames(block_lat, self.geometry.ratio_time), dim=2)
        return torch.cat([self.encode(block) for block in blocks], dim=2)

    def decode_blocks(self, latents: Tensor, block_lat: int | None) -> Tensor:
        """Returns the video of latents that `encode_blocks` made, float32 in [-1, 1], [b v t c h w]."""
        if block_lat is None:
            return self.decode(latents)
        return torch.cat([self.decode(block) for block in latents.split(block_lat, dim=2)], dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the frames of the next latents, and what the following call needs.

        All chunks of a video, however it is cut, give the frames that `decode` gives at once.

        Args:
            latents: normalised, [b v t c h w].
            state: what the call before returned; None at the start of a video.
        """
        if latents.shape[3] != self.geometry.channels:
            raise ConfigError(
                f"latents have {latents.shape[3]} channels, this encoder has {self.geometry.channels}; expected "
                "latents that it made. Change `encoder/video` or `data`."
            )
        return self._decoded(latents.to(self.dtype), state)
