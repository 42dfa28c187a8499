"""What a source of clips is: a fixed list of tasks, each of which yields samples in one worker process.

A source never writes files and never sees other tasks: `samples(task)` is a pure function of the source's settings and
of the task, so the same request gives the same bytes on any number of workers, and a build that was stopped goes on
with the tasks that are missing. Nothing in here imports torch: workers start in a fraction of a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

SPLITS = ("train", "val", "test", "long")


@dataclass(frozen=True)
class VideoSpec:
    """The geometry every clip of a set has. Stated once, in `conf/video/*.yaml`.

    Attributes:
        fps: frames per second, exact.
        height: pixel rows, even.
        width: pixel columns, even.
    """

    fps: Fraction
    height: int
    width: int


@dataclass(frozen=True)
class SourceInfo:
    """What is true of every sample of a source; becomes the head of `dataset.json`.

    Attributes:
        name: name of the set.
        licence: under which terms the clips may be used.
        origin: where they come from, in a sentence.
        video: geometry of every view.
        view_names: names of the views in rig order; ("main",) for one camera.
        action_names: names of the columns of `actions`, empty if there are none.
        state_names: names of the columns of `states`, empty if there are none.
        control_types: names of the control videos, empty if there are none.
        rig: for several views, their angles and their place in a grid (free-form, JSON-able).
        tokens: for tokenised clips {"vocab_size": int, "grid": [t, h, w], "ratio_time": int, "tokenizer": str}.
        latents: for encoded clips {"channels": int, "ratio_time": int, "ratio_space": int, "encoder_fingerprint": str}.
    """

    name: str
    licence: str
    origin: str
    video: VideoSpec | None
    view_names: tuple[str, ...] = ("main",)
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()
    control_types: tuple[str, ...] = ()
    rig: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    latents: dict[str, Any] | None = None


@dataclass(frozen=True)
class Task:
    """One unit of work: small enough to redo, large enough to be worth a worker.

    Attributes:
        id: unique in the source, `[A-Za-z0-9_-]+`; tasks are written in the order of the list, never by this name.
        split: where all its samples go.
        payload: what `samples` needs to know, JSON-able.
    """

    id: str
    split: str
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RawSample:
    """One clip, before it is packed into a shard.

    Attributes:
        key: unique in the set, `[A-Za-z0-9_-]+` (no dot: shard members are `<key>.<member>`).
        episode: what the clip was cut from; an episode never stands in two splits.
        views: for each view name its frames, uint8 [t h w c] RGB, all of the same length.
        control: for each control type and view name its frames, uint8 [t h w c].
        actions: float32 [t a] or None; row t is what produced frame t, row 0 of an episode is zeros.
        states: float32 [t s] or None.
        captions: any number of captions of the whole clip, without line breaks.
        tokens: integers [v t h w] or None.
        meta: anything JSON-able worth keeping (seed, map, first frame, ...).
        encoded: further members that are bytes already, by member name ("latents.safetensors", or "mp4" when a clip
            passes through unchanged; it then stands in place of `views`).
        num_frames: pixel frames of the clip; may be left out where `views` holds them.
    """

    key: str
    episode: str
    views: dict[str, np.ndarray] = field(default_factory=dict)
    control: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    actions: np.ndarray | None = None
    states: np.ndarray | None = None
    captions: list[str] = field(default_factory=list)
    tokens: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    encoded: dict[str, bytes] = field(default_factory=dict)
    num_frames: int | None = None


@dataclass(frozen=True)
class Skipped:
    """Something that could not be used: counted, and named with its reason in the log and in `dataset.json`."""

    name: str
    reason: str


class Source(ABC):
    """Base of all sources. Instances are built from yaml (`conf/source/*.yaml`) and must pickle."""

    @abstractmethod
    def info(self) -> SourceInfo:
        """Returns what is true of every sample. Raises ConfigError when the settings cannot work."""

    @abstractmethod
    def tasks(self) -> list[Task]:
        """Returns every task, in the order in which samples are to be written. Cheap, deterministic, no decoding."""

    @abstractmethod
    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        """Yields the samples of one task, one at a time so that memory stays bounded. Runs in a worker process."""
