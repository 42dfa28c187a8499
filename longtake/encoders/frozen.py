"""What encoders of videos share, whether they make latents or tokens: frozen weights, causal clips, a stream of frames.

Views go through the network as clips of their own. Results do not depend on an autocast around the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn


class FrozenEncoder(nn.Module, ABC):
    """Base: built from trained weights, in evaluation mode, without gradient."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names the weights: what encoders with equal fingerprints make means the same."""

    @abstractmethod
    def encode_clips(self, video: Tensor, /) -> Tensor:
        """Returns what clips [n t c h w] in [-1, 1], in the dtype of the weights, become."""

    @abstractmethod
    def decode_clips(self, codes: Tensor, state: Any, /) -> tuple[Tensor, Any]:
        """Returns the frames [n t c h w] of what `encode_clips` made, and what the next call needs.

        Args:
            codes: those that follow the ones of the call that gave `state`.
            state: None at the start of a clip.
        """

    @abstractmethod
    def decode_stream(self, codes: Tensor, /, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the next frames, float32 in [-1, 1], [b v t c h w], and what the following call needs."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def decode(self, codes: Tensor, /) -> Tensor:
        """Returns the video, float32 in [-1, 1], [b v t c h w], of codes [b v t ...] that begin at a causal start."""
        return self.decode_stream(codes, None)[0]

    def freeze(self) -> Self:
        """Makes it ready for use: evaluation mode, no gradient. Returns itself."""
        return self.eval().requires_grad_(False)

    def _encoded(self, video: Tensor) -> Tensor:
        """Returns `encode_clips` of a video [b v t c h w], [(b v) ...]."""
        with torch.autocast(video.device.type, enabled=False):
            return self.encode_clips(rearrange(video, "b v t c h w -> (b v) t c h w").to(self.dtype))

    def _decoded(self, codes: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Returns the video [b v t c h w] of codes [b v ...] in the dtype that `decode_clips` takes."""
        with torch.autocast(codes.device.type, enabled=False):
            video, state = self.decode_clips(codes.flatten(0, 1), state)
        return rearrange(video.float().clamp(-1, 1), "(b v) t c h w -> b v t c h w", b=codes.shape[0]), state
