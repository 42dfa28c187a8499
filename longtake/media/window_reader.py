"""Videos read window by window, in order, holding one window: control video of any length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from longtake.errors import BadSampleError, ConfigError
from longtake.media.containers import describe
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

        Windows come in order: `start` never falls, and lies inside of the window before or right behind it.

        Raises:
            ConfigError: the video is damaged, or has no frame there and none before.
        """
        kept = [] if self._kept is None else list(self._kept[start - self._start :])
        assert start >= self._start, f"window {start} after window {self._start}"
        assert self._kept is None or start <= self._start + len(self._kept), "a window leaves out frames"
        try:
            new = [self._fit(frame) for _, frame in islice(self._frames, stop - start - len(kept))]
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


class ControlReader:
    """Control video of several types and views, window by window.

    Args:
        readers: for each type one reader a view, in the order of the view axis; None: the view has none.
        size: pixel rows and columns.
    """

    def __init__(self, readers: Mapping[str, Sequence[FrameReader | None]], size: tuple[int, int]) -> None:
        self._readers, self._size = dict(readers), size

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the control types."""
        return tuple(self._readers)

    def there(self, kind: str) -> list[bool]:
        """Returns which views have a video of a type."""
        return [reader is not None for reader in self._readers[kind]]

    def window(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns the frames [start, stop) by type, uint8 [v t h w c]; black where a view has none."""
        black = np.zeros((stop - start, *self._size, 3), np.uint8)
        return {
            kind: np.stack([black if reader is None else reader.window(start, stop) for reader in readers])
            for kind, readers in self._readers.items()
        }
