"""Folders of the 1X World Model Challenge: what v1.1 and v2.0 have in common, and how their raw files are checked.

Nothing in these folders says what it is: a .bin file is numbers without a head. So sizes are compared with what the
metadata promise before anything is read, and a mistake is a sentence instead of shifted numbers.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from longtake.errors import BadSampleError, ConfigError

HZ = 30  # frames a second of a recording that does not state it
_MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class OnexGeometry:
    """What is true of every clip of a folder.

    Attributes:
        grid: latent frames, rows and columns of the tokens of a clip.
        vocab_size: tokens are 0 to vocab_size - 1.
        ratio_time: pixel frames a latent frame after the first.
        ratio_space: pixels a side of a token.
        fps: pixel frames a second of a clip.
        tokenizer: name of what made the tokens.
        columns: names of the columns of the states.
    """

    grid: tuple[int, int, int]
    vocab_size: int
    ratio_time: int
    ratio_space: int
    fps: Fraction
    tokenizer: str
    columns: tuple[str, ...]

    @property
    def num_frames(self) -> int:
        """Pixel frames of a clip."""
        return 1 + (self.grid[0] - 1) * self.ratio_time


@dataclass(frozen=True)
class OnexClip:
    """One clip whose tokens mean something from its own start on.

    Attributes:
        tokens: int32 [t h w].
        states: float32 [t_px s], or None where they are left out.
        segment: what the recording was called: an integer that frames of one recording share.
        name: of the clip in its folder, `[A-Za-z0-9_-]+`.
        shard: number of the file; 0 in v1.1.
        first_frame: number of its first frame in the file.
    """

    tokens: np.ndarray
    states: np.ndarray | None
    segment: int
    name: str
    shard: int = 0
    first_frame: int = 0


@dataclass(frozen=True)
class Dropped:
    """Clips that were left out.

    Attributes:
        kind: "partial" (fewer frames than a clip), "straddling" (two recordings), or "damaged" (values that cannot be).
        name: which.
        reason: a sentence.
        count: how many clips.
    """

    kind: str
    name: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class Unit:
    """A part of a folder that is read in one go; JSON-able fields.

    Attributes:
        name: `[A-Za-z0-9_-]+`, unique in the folder.
        first: number of the shard (v2.0), or first frame (v1.1).
        stop: one past the last frame (v1.1).
    """

    name: str
    first: int
    stop: int = 0


class OnexFolder(ABC):
    """One split of the challenge as it lies on disk.

    Attributes:
        path: the folder.
        geometry: what is true of every clip.
    """

    version: ClassVar[str]
    expected: ClassVar[str]  # the files that make a folder one of this version, for messages

    path: Path
    geometry: OnexGeometry

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether a folder looks like one of this version."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """Returns the parts of the folder in order. Cheap. Raises BadSampleError where even that cannot be told."""

    @abstractmethod
    def clips(self, unit: Unit) -> Iterator[OnexClip | Dropped]:
        """Yields the clips of a part in order, and what was dropped. Raises BadSampleError if all of it is unusable."""

    def checked(self, clip: OnexClip) -> OnexClip | Dropped:
        """Returns the clip, or why its values cannot be what they should."""
        low, high = int(clip.tokens.min()), int(clip.tokens.max())
        if low < 0 or high >= self.geometry.vocab_size:
            reason = (
                f"tokens run from {low} to {high}; expected 0 to {self.geometry.vocab_size - 1}. Change "
                "`source.vocab_size` if the tokenizer has another vocabulary"
            )
            return Dropped("damaged", clip.name, reason)
        if clip.states is not None and not np.isfinite(clip.states).all():
            frame = clip.first_frame + int(np.argwhere(~np.isfinite(clip.states))[0][0])
            reason = f"states hold NaN or infinity (frame {frame}); expected finite numbers"
            return Dropped("damaged", clip.name, reason)
        return clip


def read_metadata(path: Path, **needed: type) -> dict[str, Any]:
    """Returns a metadata file.

    Args:
        path: of the json file.
        needed: keys that must be there, and what they must be; an int must be positive.

    Raises:
        BadSampleError: it is missing, no JSON object, or a key is missing or something else.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadSampleError(f"{path} cannot be read ({reason}); expected a JSON object") from error
    for key, kind in needed.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            raise BadSampleError(
                f"{path} states {key} {value!r}; expected a {'positive ' * (kind is int)}{kind.__name__}"
            )
    return content


def map_numbers(path: Path, dtype: np.dtype | type, shape: tuple[int, ...], promise: str) -> np.ndarray:
    """Returns a .bin file as an array without reading it, [*shape], read-only.

    Args:
        path: of the file.
        dtype: of its numbers.
        shape: that the metadata promise.
        promise: where the shape comes from, in words, for the message.

    Raises:
        BadSampleError: it is missing, or has another size.
    """
    dtype = np.dtype(dtype)
    needed = math.prod(shape) * dtype.itemsize
    try:
        found = path.stat().st_size
    except OSError as error:
        raise BadSampleError(f"{path} is missing ({error.strerror}); expected {needed} bytes, by {promise}") from error
    if found != needed:
        row = math.prod(shape[1:]) * dtype.itemsize
        rows = f"{found // row} rows" if found % row == 0 else f"{found / row:.2f} rows, not a whole number,"
        raise BadSampleError(
            f"{path} has {found} bytes, that is {rows} of {dtype} {list(shape[1:])}; expected {shape[0]} rows "
            f"({needed} bytes), by {promise}"
        )
    return np.memmap(path, dtype, mode="r", shape=shape)


def frame_rate(value: object, where: str) -> Fraction:
    """Returns a frame rate of a metadata file. Raises ConfigError for anything that is none."""
    try:
        rate = Fraction(str(value)).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise ConfigError(f"{where} states hz {value!r}; expected frames a second above 0. Change `source.hz`.")
    return rate
