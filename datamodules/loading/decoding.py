"""From the members of one sample to the fields of a `Clip`: what every kind of clip shares.

A decoder returns the fields of one clip without the batch axis; `collate` stacks them. It draws nothing by itself:
where a sub-clip starts or which caption is taken comes from `Draws`, a pure function of the plan position.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from datamodules.loading.reading import Sample
from datamodules.shards import DatasetInfo
from longtake.errors import BadSampleError
from longtake.keyed import keyed_below
from longtake.types import Clip

Fields = dict[str, Any]


@dataclass(frozen=True)
class Draws:
    """The random draws of one clip.

    Attributes:
        key: what they depend on, (seed, plan position) in training; None makes every draw 0 (validation).
    """

    key: tuple[int | str, ...] | None

    def below(self, bound: int, purpose: str) -> int:
        """Returns an integer in [0, bound), always the same for the same key and purpose."""
        return 0 if self.key is None else keyed_below(bound, *self.key, purpose)


@dataclass(frozen=True)
class Window:
    """Which pixel frames of a sample are wanted: `num_frames` of them, `stride` apart.

    Attributes:
        start: first frame, or None to draw it.
        num_frames: frames of the sub-clip.
        stride: frames of the sample from one frame of the sub-clip to the next.
    """

    start: int | None
    num_frames: int
    stride: int = 1

    @property
    def span(self) -> int:
        """Frames of the sample from the first to the last one wanted, both included."""
        return (self.num_frames - 1) * self.stride + 1

    def place(self, available: int, draws: Draws) -> Window:
        """Returns the window with its start drawn. Raises BadSampleError where the sample is too short."""
        if available < self.span + (self.start or 0):
            raise BadSampleError(f"has {available} frames; {self.span} are needed from frame {self.start or 0} on")
        if self.start is not None:
            return self
        return Window(draws.below(available - self.span + 1, "start"), self.num_frames, self.stride)

    def frames(self) -> range:
        """Returns the frame numbers; the start must be known."""
        assert self.start is not None, "the start of a window is drawn before its frames are listed"
        return range(self.start, self.start + self.span, self.stride)


class Decoder(Protocol):
    """Turns one sample into the fields of one clip."""

    def __call__(self, sample: Sample, window: Window, draws: Draws) -> Fields:
        """Returns the fields without the batch axis. Raises BadSampleError for a sample that cannot be used."""
        ...


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns (shape, Fortran order, dtype). Parsing costs more than reading a table, and most headers are alike."""
    stream = io.BytesIO(header)
    major, _ = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return read(stream)


def read_array(sample: Sample, member: str) -> np.ndarray:
    """Returns an .npy member, read-only. Pickled arrays are refused: nothing that is read is executed."""
    content = sample.read(member)
    try:
        length_bytes = 2 if content[6] == 1 else 4
        start = 8 + length_bytes + int.from_bytes(content[8 : 8 + length_bytes], "little")
        shape, fortran, dtype = _npy_header(content[:start])
        if dtype.hasobject:
            raise BadSampleError(f"member {member!r} holds Python objects; refused")
        count = math.prod(shape)
        return np.frombuffer(content, dtype, count, start).reshape(shape, order="F" if fortran else "C")
    except BadSampleError:
        raise
    except Exception as error:  # numpy raises ValueError, EOFError, SyntaxError, ... on damaged headers
        raise BadSampleError(f"member {member!r} is no array: {error}") from error


def read_rows(sample: Sample, member: str, window: Window, columns: int, reduce: str = "last") -> np.ndarray | None:
    """Returns the rows of a per-frame table that belong to the frames of a window, float32 [t columns], or None.

    Args:
        sample: the sample.
        member: "actions.npy" or "states.npy".
        window: with its start known.
        columns: expected number; 0 where the set has no such table.
        reduce: how the rows between two frames of a strided window become one: "last", "mean", "sum", or "max" for the
            one of largest size, column by column.

    Raises:
        BadSampleError: missing, of a wrong shape, with too few rows, or with values that are not finite.
    """
    if columns == 0:
        return None
    table = read_array(sample, member)
    frames = window.frames()
    if table.ndim != 2 or table.shape[1] != columns or table.shape[0] <= frames[-1]:
        raise BadSampleError(f"{member} has shape {table.shape}; expected ({frames[-1] + 1} or more, {columns})")
    if table.dtype.kind not in "fiub":
        raise BadSampleError(f"{member} holds {table.dtype}; expected numbers")
    if window.stride > 1 and reduce != "last":
        rows = _reduced(table.astype(np.float32), frames, reduce)
    else:
        rows = table[frames.start : frames.stop : frames.step].astype(np.float32)
    if not np.isfinite(rows).all():
        raise BadSampleError(f"{member} holds values that are not finite")
    return rows


def _reduced(table: np.ndarray, frames: range, reduce: str) -> np.ndarray:
    """Returns one row a frame for the `frames.step` rows that lead to it; rows before the first are zeros."""
    padded = np.concatenate([np.zeros((frames.step, table.shape[1]), np.float32), table])
    spans = np.stack([padded[frame + 1 : frame + 1 + frames.step] for frame in frames])
    if reduce == "max":
        return np.take_along_axis(spans, np.abs(spans).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    return spans.mean(axis=1) if reduce == "mean" else spans.sum(axis=1)


def read_actions(sample: Sample, window: Window, columns: int, reduce: str = "last") -> np.ndarray | None:
    """Returns the actions of a window, float32 [t a]: row t produced frame t, and row 0 is null (zeros).

    What led to the first frame is not known in a rollout either, so it is not shown in training.
    """
    rows = read_rows(sample, "actions.npy", window, columns, reduce)
    if rows is not None:
        rows[0] = 0
    return rows


def read_caption(sample: Sample, draws: Draws) -> str | None:
    """Returns one of the sample's captions, drawn, or None where it has none."""
    if not sample.has("txt"):
        return None
    lines = [line.strip() for line in sample.read("txt").decode("utf-8", errors="replace").split("\n")]
    captions = [line for line in lines if line]
    return captions[draws.below(len(captions), "caption")] if captions else None


@dataclass(frozen=True)
class Companions:
    """What comes along with the frames of a clip, whatever the frames are made of.

    Attributes:
        num_actions: columns of actions, 0 for none.
        num_states: columns of states, 0 for none.
        fps: pixel frames per second of the stored clips.
        reduce_actions: how the actions between two frames of a strided window become one.
    """

    num_actions: int
    num_states: int
    fps: float
    reduce_actions: str = "last"

    @classmethod
    def of(cls, info: DatasetInfo, reduce_actions: str = "last") -> Companions:
        """Returns what the samples of a set have."""
        source = info.source
        fps = float(source.video.fps) if source.video else 0.0
        return cls(len(source.action_names), len(source.state_names), fps, reduce_actions)

    def read(self, sample: Sample, window: Window, draws: Draws, view_ids: list[int]) -> Fields:
        """Returns actions [t a], states [t s], caption, fps, and the views and frames that are real (all of them)."""
        return {
            "actions": read_actions(sample, window, self.num_actions, self.reduce_actions),
            "states": read_rows(sample, "states.npy", window, self.num_states),
            "captions": read_caption(sample, draws),
            "view_ids": np.array(view_ids),
            "view_mask": np.ones(len(view_ids), dtype=bool),
            "frame_mask": np.ones(window.num_frames, dtype=bool),
            "fps": np.float32(self.fps / window.stride),
        }


def read_meta(sample: Sample) -> dict[str, Any]:
    """Returns the sample's json member, {} where it has none."""
    if not sample.has("json"):
        return {}
    try:
        meta = json.loads(sample.read("json"))
    except ValueError as error:
        raise BadSampleError(f"member 'json' cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise BadSampleError(f"member 'json' holds a {type(meta).__name__}; expected an object")
    return meta


def collate(fields: list[Fields]) -> Clip:
    """Returns one batch of clips that have the same shapes.

    A field that no clip has is None. A caption that one clip lacks is empty; a control video that one clip lacks is
    all zeros with its mask False; any other field is there in all clips of a plan run or in none.
    """
    present = {name for item in fields for name, value in item.items() if value is not None}
    batch: Fields = {}
    for name in present:
        values = [item.get(name) for item in fields]
        if name == "captions":
            batch[name] = [value or "" for value in values]
        elif name == "key":
            batch[name] = values
        else:
            batch[name] = _stacked(name, values, [item["key"] for item in fields])
    return Clip(**batch)


def _stacked(name: str, values: list[Any], keys: list[str]) -> Any:
    """Returns one field of a batch: tensors, arrays, or dicts of tensors, stacked."""
    without = [key for key, value in zip(keys, values, strict=True) if value is None]
    if without:
        raise BadSampleError(f"has no {name}, which other samples of its batch have: {', '.join(without)}")
    if isinstance(values[0], dict):
        return {kind: torch.stack([value[kind] for value in values]) for kind in values[0]}
    return torch.stack(values) if isinstance(values[0], Tensor) else torch.from_numpy(np.stack(values))
