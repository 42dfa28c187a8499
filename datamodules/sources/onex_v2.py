"""Version 2.0 of the challenge: shards of clips of 17 frames, tokenised one by one, 30 frames a second.

Of shard i with n frames: `video_{i}.bin` int32 [ceil(n/17) 3 32 32], `segment_idx_{i}.bin` int32 [n], `states_{i}.bin`
float32 [n 25], `metadata_{i}.json` {"shard_num_frames": n}; and `metadata.json` {"num_shards", "hz", "num_images"}.
val has all files in one folder ("flat"), train has metadata/, videos/, segment_indices/ and robot_states/ ("folders").
"""

from __future__ import annotations

import logging
import math
import re
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

_log = logging.getLogger("longtake")

ARM = ("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow_pitch", "elbow_yaw", "wrist_pitch", "wrist_roll")
STATE_NAMES = (
    *("hip_yaw", "hip_roll", "hip_pitch", "knee_pitch", "ankle_roll", "ankle_pitch"),
    *(f"left_{name}" for name in ARM),
    *(f"right_{name}" for name in ARM),
    *("neck_pitch", "left_hand_closure", "right_hand_closure", "linear_velocity", "angular_velocity"),
)
GRID = (3, 32, 32)
VOCAB_SIZE = 64000
RATIO_TIME, RATIO_SPACE = 8, 8
TOKENIZER = "Cosmos-0.1-Tokenizer-DV8x8x8"
FOLDERS = {"video": "videos", "segment_idx": "segment_indices", "states": "robot_states", "metadata": "metadata"}


class V2Folder(OnexFolder):
    """One split of v2.0 in either layout.

    Args:
        path: the folder.
        grid: latent frames, rows and columns of a clip.
        vocab_size: of the tokenizer.
        use_states: whether states are read.
        state_names: names of their columns.
        hz: frames a second; None takes what metadata.json states, or 30.
        tokenizer: name of what made the tokens.

    Raises:
        ConfigError: a setting cannot be.
    """

    version: ClassVar[str] = "v2.0"
    expected: ClassVar[str] = "video_0.bin, segment_idx_0.bin, states_0.bin and metadata_0.json, flat or in subfolders"

    def __init__(
        self,
        path: Path,
        *,
        grid: Sequence[int] | None = None,
        vocab_size: int | None = None,
        use_states: bool = True,
        state_names: Sequence[str] | None = None,
        hz: float | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.path, self._use_states = path, use_states
        self._head = self._read_head()
        t, h, w = check_grid(grid or GRID)
        self.geometry = OnexGeometry(
            grid=(t, h, w),
            vocab_size=vocab_size or VOCAB_SIZE,
            ratio_time=RATIO_TIME,
            ratio_space=RATIO_SPACE,
            fps=frame_rate(hz or self._head.get("hz", HZ), str(path / "metadata.json")),
            tokenizer=tokenizer or TOKENIZER,
            columns=tuple(state_names or STATE_NAMES) if use_states else (),
        )

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether there are numbered videos, flat or in a folder of their own."""
        return bool(_numbers(path, "video", "bin") | _numbers(path, "metadata", "json"))

    def units(self) -> list[Unit]:
        """Returns a unit a shard: every one of which there is a video or metadata."""
        numbers = sorted(_numbers(self.path, "video", "bin") | _numbers(self.path, "metadata", "json"))
        promised = self._head.get("num_shards")
        if isinstance(promised, int) and promised != len(numbers):
            _log.warning("%s: metadata.json states %d shards, %d are there", self.path, promised, len(numbers))
        return [Unit(f"shard{number:04d}", number) for number in numbers]

    def clips(self, unit: Unit) -> Iterator[OnexClip | Dropped]:
        """Yields the clips of a shard. Raises BadSampleError for a file that is missing or has another size."""
        number, length = unit.first, self.geometry.num_frames
        tokens, segments, states = self._open(number)
        num_whole = len(segments) // length
        of_clip = np.array(segments[: num_whole * length]).reshape(num_whole, length)
        is_whole = (of_clip == of_clip[:, :1]).all(axis=1)
        for index in range(num_whole):
            name, first = f"{unit.name}-clip{index:06d}", index * length
            if not is_whole[index]:
                ends = f"segments {of_clip[index, 0]} and {of_clip[index, -1]}"
                yield Dropped("straddling", name, f"frames {first} to {first + length - 1} straddle {ends}")
                continue
            rows = None if states is None else np.array(states[first : first + length])
            yield self.checked(OnexClip(np.array(tokens[index]), rows, int(of_clip[index, 0]), name, number, first))
        if len(segments) % length:
            reason = f"the last clip has {len(segments) % length} of {length} frames"
            yield Dropped("partial", f"{unit.name}-clip{num_whole:06d}", reason)

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns tokens [clips t h w], segments [n] and states [n s] of a shard, checked against each other."""
        meta = self._file("metadata", number, "json")
        num_frames = read_metadata(meta, shard_num_frames=int)["shard_num_frames"]
        promise = f"shard_num_frames {num_frames} in {meta.name}"
        num_clips = math.ceil(num_frames / self.geometry.num_frames)
        video = self._file("video", number, "bin")
        try:
            tokens = map_numbers(video, np.int32, (num_clips, *self.geometry.grid), promise)
        except BadSampleError as error:
            raise BadSampleError(f"{error}{self._other_grid(video, num_clips)}") from error
        segments = map_numbers(self._file("segment_idx", number, "bin"), np.int32, (num_frames,), promise)
        if not self._use_states:
            return tokens, segments, None
        shape = (num_frames, len(self.geometry.columns))
        return tokens, segments, map_numbers(self._file("states", number, "bin"), np.float32, shape, promise)

    def _other_grid(self, video: Path, num_clips: int) -> str:
        """Returns the hint that fits: another grid of the same number of clips, or another number of clips."""
        if not video.is_file():
            return ""
        t = self.geometry.grid[0]
        side = math.isqrt(video.stat().st_size // (4 * t * num_clips))
        if side and video.stat().st_size == 4 * t * num_clips * side * side:
            return f". It would be {num_clips} clips of {t} x {side} x {side} tokens: change `source.grid`"
        return ". The shard is not whole, its metadata belong to another one, or `source.grid` is wrong"

    def _file(self, kind: str, number: int, ending: str) -> Path:
        """Returns where a file is, or where it should be."""
        name = f"{kind}_{number}.{ending}"
        flat, nested = self.path / name, self.path / FOLDERS[kind] / name
        return nested if nested.exists() or (not flat.exists() and nested.parent.is_dir()) else flat

    def _read_head(self) -> dict[str, object]:
        for path in (self.path / "metadata.json", self.path / FOLDERS["metadata"] / "metadata.json"):
            if path.is_file():
                return read_metadata(path)
        return {}


def check_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    """Returns a grid as a tuple. Raises ConfigError for anything but three positive integers."""
    if len(grid) != 3 or any(not isinstance(size, int) or size < 1 for size in grid):
        raise ConfigError(f"source.grid is {list(grid)}; expected latent frames, rows, columns. Change `source.grid`.")
    return grid[0], grid[1], grid[2]


def _numbers(path: Path, kind: str, ending: str) -> set[int]:
    pattern = re.compile(rf"{kind}_([0-9]+)\.{ending}")
    folders = (path, path / FOLDERS[kind])
    names = (file.name for folder in folders if folder.is_dir() for file in folder.iterdir())
    return {int(match[1]) for name in names if (match := pattern.fullmatch(name))}
