"""From a rollout of latents to frames, chunk by chunk: nothing of the video is held but the chunk at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from longtake.errors import DataError
from longtake.rollout.chunks import Chunk
from longtake.rollout.plan import RolloutPlan

C = TypeVar("C")


class StreamDecoder(Protocol):
    """What streaming needs of a video encoder."""

    def decode_stream(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the frames of the next latents [b v t c h w] in [-1, 1], and what the following call needs."""
        ...


@dataclass(frozen=True)
class VideoChunk:
    """The frames of one chunk of a rollout.

    Attributes:
        index: of the chunk in the video.
        start: number of its first frame.
        frames: uint8 [b v t h w c]; the last chunk ends where the wanted video ends.
        num_given: how many of its first frames belong to the start that was given.
        control: the control frames beside them by type, uint8 [v t h w c]; None: there is no control.
    """

    index: int
    start: int
    frames: np.ndarray
    num_given: int
    control: Mapping[str, np.ndarray] | None = None

    @property
    def stop(self) -> int:
        """One past its last frame."""
        return self.start + self.frames.shape[2]


def decoded(chunks: Iterator[Chunk], decoder: StreamDecoder, plan: RolloutPlan) -> Iterator[VideoChunk]:
    """Yields the frames of every chunk as soon as its latents are there, those of the start included.

    Args:
        chunks: of the rollout, from the first one on.
        decoder: turns latents into frames.
        plan: of the rollout; frames past its end are cut off.
    """
    state: Any = None
    for chunk in chunks:
        if plan.trained.own_starts:
            state = None
        with torch.no_grad():
            video, state = decoder.decode_stream(chunk.latents, state)
        start, stop = plan.frames_of(chunk.index)
        assert video.shape[2] >= stop - start, f"{video.shape[2]} frames decoded for frames {start} to {stop}"
        given = min(max(plan.start_px - start, 0), stop - start)
        yield VideoChunk(chunk.index, start, to_uint8(video[:, :, : stop - start]), given)


def finite(chunks: Iterator[C], values: Callable[[C], Tensor]) -> Iterator[C]:
    """Yields the chunks of a rollout. Raises DataError for the first whose `values` are not all finite: NaN has no
    colour, and every later chunk would be made from it."""
    for number, chunk in enumerate(chunks):
        if not torch.isfinite(values(chunk)).all():
            raise DataError(
                f"chunk {number} of the video came out as numbers that are not finite, so there is no picture of it. "
                "Take other weights (`ckpt`), smaller values in `actions`, rollout.guidance=1, or precision=float32."
            )
        yield chunk


def to_uint8(video: Tensor) -> np.ndarray:
    """Returns video in [-1, 1], [... c h w], as uint8 [... h w c], rounded."""
    pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "... c h w -> ... h w c").cpu().numpy()


def to_unit_range(frames: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Returns uint8 frames [... h w c] as float in [-1, 1], [... c h w]."""
    pixels = torch.tensor(frames, device=device) if isinstance(frames, np.ndarray) else frames.to(device)
    return rearrange(pixels, "... h w c -> ... c h w").float() / 127.5 - 1
