"""Version 1.1 of the challenge: a token grid for each single frame at 30 frames a second, actions beside it.

`metadata.json` {"num_images": n, "s": 16, "token_dtype", "hz"}, `video.bin` [n s s], `segment_ids.bin` int32 [n], and
`actions/{joint_pos,driving_command,neck_desired,l_hand_closure,r_hand_closure}.bin` float32 [n 21], [n 2], [n 1], ...
A clip is 16 frames taken every 15 (2 a second) out of one recording.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from datamodules.sources.onex_format import (
    HZ,
    Dropped,
    OnexClip,
    OnexFolder,
    OnexGeometry,
    Unit,
    frame_rate,
    map_numbers,
    read_metadata,
)
from longtake.errors import BadSampleError, ConfigError

ACTIONS = {"joint_pos": 21, "driving_command": 2, "neck_desired": 1, "l_hand_closure": 1, "r_hand_closure": 1}
VOCAB_SIZE = 2**18
RATIO_SPACE = 16
TOKENIZER = "1X-magvit2-16x16"
_DTYPES = ("uint32", "int32", "uint16", "int16", "int64")
_FRAMES_A_UNIT = 100_000


class V1Folder(OnexFolder):
    """One split of v1.1.

    Args:
        path: the folder.
        clip_frames: frames of a clip.
        stride: frames of the recording from one frame of a clip to the next.
        filter_overlaps: whether a frame is in one clip at most, as in the challenge's validation; False takes every
            start, about clip_frames times as many clips.
        vocab_size: of the tokenizer; None takes what metadata.json states, or 2**18.
        use_states: whether actions are read (the values at the frames that are taken).
        hz: frames a second of the recording; None takes what metadata.json states, or 30.
        tokenizer: name of what made the tokens.

    Raises:
        ConfigError: a setting cannot be.
        BadSampleError: metadata.json cannot be read.
    """

    version: ClassVar[str] = "v1.1"
    expected: ClassVar[str] = "metadata.json, video.bin, segment_ids.bin and actions/"

    def __init__(
        self,
        path: Path,
        *,
        clip_frames: int = 16,
        stride: int = 15,
        filter_overlaps: bool = True,
        vocab_size: int | None = None,
        use_states: bool = True,
        hz: float | None = None,
        tokenizer: str | None = None,
    ) -> None:
        for key, value in (("clip_frames", clip_frames), ("stride", stride)):
            if value < 1:
                raise ConfigError(f"source.{key} is {value}; expected 1 or more. Change `source.{key}`.")
        self.path, self._stride, self._use_states = path, stride, use_states
        self._filter_overlaps = filter_overlaps
        self._meta = read_metadata(path / "metadata.json", num_images=int, s=int)
        dtype = self._meta.get("token_dtype", "uint32")
        if dtype not in _DTYPES:
            raise BadSampleError(
                f"{path / 'metadata.json'} states token_dtype {dtype!r}; expected {', '.join(_DTYPES)}"
            )
        self._dtype, side = np.dtype(dtype), self._meta["s"]
        stated = self._meta.get("vocab_size")
        self.geometry = OnexGeometry(
            grid=(clip_frames, side, side),
            vocab_size=vocab_size or (stated if isinstance(stated, int) else VOCAB_SIZE),
            ratio_time=1,
            ratio_space=RATIO_SPACE,
            fps=frame_rate(hz or self._meta.get("hz", HZ), str(path / "metadata.json")) / stride,
            tokenizer=tokenizer or TOKENIZER,
            columns=tuple(_columns()) if use_states else (),
        )

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether there is one video for all."""
        return (path / "video.bin").is_file() or (path / "segment_ids.bin").is_file()

    def units(self) -> list[Unit]:
        """Returns units of whole recordings, of about 100,000 frames; clips never leave a recording."""
        segments = self._segments()
        edges = np.concatenate([[0], np.flatnonzero(np.diff(segments)) + 1, [len(segments)]])
        units, first = [], 0
        for edge in edges[1:].tolist():
            if edge - first >= _FRAMES_A_UNIT or edge == len(segments):
                units.append(Unit(f"frames{first:09d}", first, edge))
                first = edge
        return units

    def clips(self, unit: Unit) -> Iterator[OnexClip | Dropped]:
        """Yields the clips of a range of frames; starts whose clip would leave the recording count as straddling.

        Raises:
            BadSampleError: a file is missing or has another size.
        """
        n, side = self._meta["num_images"], self._meta["s"]
        promise = "num_images in metadata.json"
        tokens = map_numbers(self.path / "video.bin", self._dtype, (n, side, side), f"{promise} and s {side}")
        actions = self._open_actions(n, promise)
        segments = np.array(self._segments()[unit.first : unit.stop])
        edges = np.concatenate([[0], np.flatnonzero(np.diff(segments)) + 1, [len(segments)]])
        for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            begin, end = begin + unit.first, end + unit.first
            segment = int(segments[begin - unit.first])
            for start in self._starts(begin, end):
                frames = slice(start, start + self._span, self._stride)
                rows = [np.array(table[frames]) for table in actions]
                states = np.concatenate(rows, axis=1) if rows else None
                clip = OnexClip(self._tokens(tokens[frames]), states, segment, f"frame{start:09d}", 0, start)
                yield self.checked(clip)
            first = max(begin, end - self._span + 1)
            crossing = min(end, n - self._span + 1) - first
            if crossing > 0:
                reason = f"{crossing} starts from frame {first} on straddle segment {segment} and the next one"
                yield Dropped("straddling", f"frame{first:09d}", reason, crossing)

    @property
    def _span(self) -> int:
        """Frames of the recording from the first of a clip to its last."""
        return 1 + (self.geometry.grid[0] - 1) * self._stride

    def _starts(self, begin: int, end: int) -> Iterator[int]:
        """Yields the first frames of clips inside [begin, end), greedily without overlap where that is asked for."""
        free_from: dict[int, int] = {}  # by remainder of the stride: the first frame that no clip has taken
        for start in range(begin, end - self._span + 1):
            lane = start % self._stride
            if not self._filter_overlaps or start >= free_from.get(lane, begin):
                free_from[lane] = start + self.geometry.grid[0] * self._stride
                yield start

    def _tokens(self, frames: np.ndarray) -> np.ndarray:
        """Returns tokens as int32; what does not fit becomes -1, which is out of range of every vocabulary."""
        wide = frames.astype(np.int64)
        return np.where((wide >= 0) & (wide < 2**31), wide, -1).astype(np.int32)

    def _segments(self) -> np.ndarray:
        n = self._meta["num_images"]
        return map_numbers(self.path / "segment_ids.bin", np.int32, (n,), f"num_images {n} in metadata.json")

    def _open_actions(self, n: int, promise: str) -> list[np.ndarray]:
        if not self._use_states:
            return []
        folder = self.path / "actions"
        return [map_numbers(folder / f"{name}.bin", np.float32, (n, width), promise) for name, width in ACTIONS.items()]


def _columns() -> Sequence[str]:
    return [f"{name}_{i}" if width > 1 else name for name, width in ACTIONS.items() for i in range(width)]
