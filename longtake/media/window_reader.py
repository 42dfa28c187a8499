"""Videos read window by window, in order, holding one window: views and control video of any length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from longtake.errors import BadSampleError, ConfigError
from longtake.media.containers import describe
from longtake.media.edges import edge_video, grey
from longtake.media.grid import fitted
from longtake.media.read import VideoInfo, iter_video, probe_video


def probe(path: Path, key: str) -> VideoInfo:
    """Returns what a video is. Raises ConfigError naming the key that holds its path."""
    try:
        return probe_video(path)
    except BadSampleError as error:
        raise ConfigError(f"{error}; expected a video. Change `{key}`.") from error


def taken(num_frames: int, first: int, stride: int) -> int:
    """Returns how many frames are left when every `stride`-th is taken from `first` on."""
    return max(0, -((first - num_frames) // stride))


def stride_of(found: Fraction, wanted: Fraction) -> int | None:
    """Returns every how many frames one is taken to get from one rate to another; None: it does not come out even."""
    ratio = found / wanted
    return int(ratio) if ratio.denominator == 1 else None


class Windows(Protocol):
    """Frames of one view that are read window by window."""

    def window(self, start: int, stop: int) -> np.ndarray:
        """Returns frames [start, stop), uint8 [t h w c]; past the end the last frame is repeated."""
        ...


class FrameReader:
    """Frames of one video in a wanted size and rate, read forwards.

    Args:
        source: a video file, or its bytes.
        key: configuration key that holds its path, for messages.
        size: pixel rows and columns wanted; other frames are cut around the middle and resized.
        first: frames at the front that are left out.
        stride: every how many frames one is taken.
    """

    def __init__(
        self, source: Path | bytes, *, key: str, size: tuple[int, int], first: int = 0, stride: int = 1
    ) -> None:
        self._name, self._key, self._size = describe(source), key, size
        self._frames: Iterator[tuple[float, np.ndarray]] = islice(iter_video(source), first, None, stride)
        self._kept: np.ndarray | None = None  # the window before, [t h w c]
        self._start = 0

    def window(self, start: int, stop: int) -> np.ndarray:
        """Returns frames [start, stop), uint8 [t h w c]; past the end the last frame is repeated.

        Windows come in order: `start` never falls, and lies inside of the window before or right behind it. The first
        one may begin anywhere: frames before it are left out.

        Raises:
            ConfigError: the video is damaged, or has no frame there and none before.
        """
        kept = [] if self._kept is None else list(self._kept[start - self._start :])
        assert start >= self._start, f"window {start} after window {self._start}"
        assert self._kept is None or start <= self._start + len(self._kept), "a window leaves out frames"
        skipped = start if self._kept is None else 0
        try:
            wanted = islice(self._frames, skipped, skipped + stop - start - len(kept))
            new = [self._fit(frame) for _, frame in wanted]
        except BadSampleError as error:
            raise ConfigError(f"{error}; expected a video that is whole. Change `{self._key}`.") from error
        frames = kept + new
        if not frames and self._kept is None:
            raise ConfigError(f"{self._name} has no frames there; expected a longer video. Change `{self._key}`.")
        last = frames[-1] if frames else self._kept[-1]  # type: ignore[index]
        frames += [last] * (stop - start - len(frames))
        self._kept, self._start = np.stack(frames), start
        return self._kept

    def _fit(self, frame: np.ndarray) -> np.ndarray:
        return frame if frame.shape[:2] == self._size else fitted(frame[None], *self._size)[0]


class EdgeReader:
    """Edges of a video, extracted as its windows come.

    Args:
        frames: the video.
        preset: how strong an edge must be, see `longtake.media.edges`.
    """

    def __init__(self, frames: Windows, preset: str = "medium") -> None:
        self._frames, self._preset = frames, preset

    def window(self, start: int, stop: int) -> np.ndarray:
        """Returns the edges of frames [start, stop), uint8 [t h w c]."""
        return edge_video(self._frames.window(start, stop), self._preset)


class ViewsReader:
    """Several views of one video, window by window.

    Args:
        views: one a view.
    """

    def __init__(self, views: Sequence[Windows]) -> None:
        self._views = tuple(views)

    def window(self, start: int, stop: int) -> np.ndarray:
        """Returns frames [start, stop), uint8 [v t h w c]."""
        return np.stack([view.window(start, stop) for view in self._views])


class ControlReader:
    """Control video of several types and views, window by window.

    Args:
        readers: for each type one reader a view, in the order of the view axis; None: the view has none.
        size: pixel rows and columns.
        masks: for types whose control counts in some places only, one video a view, white where it counts; None: it
            counts everywhere in that view.
    """

    def __init__(
        self,
        readers: Mapping[str, Sequence[Windows | None]],
        size: tuple[int, int],
        masks: Mapping[str, Sequence[Windows | None]] | None = None,
    ) -> None:
        self._readers, self._size, self._masks = dict(readers), size, dict(masks or {})

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the control types."""
        return tuple(self._readers)

    def there(self, kind: str) -> list[bool]:
        """Returns which views have a video of a type."""
        return [reader is not None for reader in self._readers[kind]]

    def window(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns the frames [start, stop) by type, uint8 [v t h w c]; black where a view has none."""
        return {kind: self._stacked(readers, start, stop, 0) for kind, readers in self._readers.items()}

    def where(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns how much control counts in each place, 0..1, float32 [v t h w], of the types that have masks."""
        frames = {kind: self._stacked(masks, start, stop, 255) for kind, masks in self._masks.items()}
        return {kind: grey(part).astype(np.float32) / 255 for kind, part in frames.items()}

    def _stacked(self, readers: Sequence[Windows | None], start: int, stop: int, blank: int) -> np.ndarray:
        empty = np.full((stop - start, *self._size, 3), blank, np.uint8)
        return np.stack([empty if reader is None else reader.window(start, stop) for reader in readers])
