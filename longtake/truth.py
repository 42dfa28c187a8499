"""What a rollout is compared with: true frames chunk by chunk, and what the video encoder alone makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.geometry import covering_latent_frames
from longtake.rollout.sliding_plan import AnyPlan, SlidingPlan
from longtake.streaming import StreamDecoder, VideoChunk, to_uint8, to_unit_range


class Codec(StreamDecoder, Protocol):
    """A video encoder, for what its own round trip costs."""

    def encode(self, video: Tensor) -> Tensor:
        """Returns latents of video in [-1, 1], [b v t c h w]."""
        ...


class WindowSource(Protocol):
    """Frames that are read window by window, in order."""

    def window(self, start: int, stop: int) -> np.ndarray:
        """Returns frames [start, stop), uint8 [v t h w c]; past the end the last one is repeated."""
        ...


@dataclass(frozen=True)
class TrueFrames:
    """The truth beside one chunk, uint8 [v t h w c]; `frames` and `recoded` may be shorter than it, or empty.

    Attributes:
        frames: the true frames.
        recoded: what the encoder makes of them.
        before: the true frame before them; None: there is none.
    """

    frames: np.ndarray
    recoded: np.ndarray
    before: np.ndarray | None


@dataclass(frozen=True)
class TrueVideo:
    """A true video that is read as it is needed.

    Attributes:
        source: its frames.
        num_frames: how many it has.
    """

    source: WindowSource
    num_frames: int


class Truth(Protocol):
    """True frames chunk by chunk; must be asked for every chunk, in order."""

    def of(self, chunk: VideoChunk) -> TrueFrames:
        """Returns what a chunk should show."""
        ...


def truth_of(video: np.ndarray | TrueVideo, codec: Codec, plan: AnyPlan, device: torch.device) -> Truth:
    """Returns the truth of a rollout.

    Args:
        video: from the first given frame on, uint8 [v t h w c], or read as it is needed (sliding windows only); may be
            shorter than the rollout.
        codec: the model's encoder.
        plan: of the rollout.
        device: of the encoder.
    """
    if isinstance(plan, SlidingPlan):
        told = TrueVideo(_Array(video), video.shape[1]) if isinstance(video, np.ndarray) else video
        return _WindowTruth(told, codec, plan, device)
    assert isinstance(video, np.ndarray), "chunks that follow from memory are compared with whole videos"
    return _ChunkTruth(video, codec, plan, device)


class _Array:
    """A video that is held whole, as a `WindowSource`."""

    def __init__(self, frames: np.ndarray) -> None:
        self._frames = frames

    def window(self, start: int, stop: int) -> np.ndarray:
        return self._frames[:, np.minimum(np.arange(start, stop), self._frames.shape[1] - 1)]


class _ChunkTruth:
    """Chunks that follow each other in one encoding, or are each encoded by itself."""

    def __init__(self, frames: np.ndarray, codec: Codec, plan: Any, device: torch.device) -> None:
        self._frames, self._plan, self._codec = frames, plan, codec
        self._state: Any = None
        trained, length = plan.trained, frames.shape[1]
        count = covering_latent_frames(length, trained.ratio, trained.block_lat)
        usable = trained.pixels(count) if trained.pixels(count) <= length else trained.pixels(count - 1)
        self._latents: Tensor | None = None
        if usable:
            step = trained.pixels(trained.chunk_lat) if trained.own_starts else usable
            parts = to_unit_range(frames[:, :usable], device)[None].split(step, dim=2)
            with torch.no_grad():
                self._latents = torch.cat([codec.encode(part) for part in parts], dim=2)

    def of(self, chunk: VideoChunk) -> TrueFrames:
        """See `Truth`; decoding carries its state from one chunk to the next."""
        true = self._frames[:, chunk.start : chunk.stop]
        before = self._frames[:, chunk.start - 1 : chunk.start] if chunk.start else None
        size = self._plan.trained.chunk_lat
        part = None if self._latents is None else self._latents[:, :, chunk.index * size : (chunk.index + 1) * size]
        if part is None or not part.shape[2]:
            return TrueFrames(true, true[:, :0], before)
        with torch.no_grad():
            state = None if self._plan.trained.own_starts else self._state
            video, self._state = self._codec.decode_stream(part, state)
        return TrueFrames(true, to_uint8(video)[0][:, : true.shape[1]], before)


class _WindowTruth:
    """Each window is a causal start of its own, read and encoded when it comes."""

    def __init__(self, video: TrueVideo, codec: Codec, plan: SlidingPlan, device: torch.device) -> None:
        self._video, self._codec, self._plan, self._device = video, codec, plan, device
        self._last: np.ndarray | None = None  # frame of the window before, where windows share none

    def of(self, chunk: VideoChunk) -> TrueFrames:
        """See `Truth`; nothing is re-coded of a window that the truth ends in."""
        start, stop = self._plan.windows.window_of(chunk.index)
        window = self._video.source.window(start, stop)
        first = chunk.start - start
        before = window[:, first - 1 : first] if first else self._last
        self._last = window[:, -1:].copy()
        true = window[:, first : max(first, min(chunk.stop, self._video.num_frames) - start)]
        if stop > self._video.num_frames:
            return TrueFrames(true, true[:, :0], before)
        with torch.no_grad():
            latents = self._codec.encode(to_unit_range(window, self._device)[None])
            video = self._codec.decode_stream(latents, None)[0]
        return TrueFrames(true, to_uint8(video)[0][:, first : chunk.stop - start], before)
