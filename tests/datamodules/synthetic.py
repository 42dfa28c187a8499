"""A source of moving squares for the tests of the writer, with every kind of misbehaviour on demand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.sources.base import RawSample, Skipped, Source, SourceInfo, Task, VideoSpec
from longtake.errors import ConfigError

HEIGHT, WIDTH = 16, 24


def squares(num_frames: int, seed: int) -> np.ndarray:
    """Returns a bright square that moves over a dark ground, uint8 [t h w c]."""
    rng = np.random.default_rng(seed)
    frames = np.full((num_frames, HEIGHT, WIDTH, 3), 30, np.uint8)
    colour, x0, y0 = rng.integers(120, 255, 3), *rng.integers(0, 8, 2)
    for t in range(num_frames):
        y, x = (y0 + t) % (HEIGHT - 6), (x0 + 2 * t) % (WIDTH - 6)
        frames[t, y : y + 6, x : x + 6] = colour
    return frames


@dataclass
class Squares(Source):
    """`num_tasks` tasks of `per_task` clips.

    Attributes:
        faults: what goes wrong in a task, by task number; see `_misbehave` and `_spoil`.
        trace: a folder in which every task that begins leaves a file; or None.
        pause_s: time that every sample takes.
        memory: bytes of ballast in `meta` of every sample.
    """

    num_tasks: int = 4
    per_task: int = 3
    num_frames: int = 5
    views: tuple[str, ...] = ("main",)
    control: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "train", "val")
    licence: str = "CC0"
    faults: dict[int, str] = field(default_factory=dict)
    trace: str | None = None
    pause_s: float = 0.0
    ballast: int = 0
    version: int = 1

    def info(self) -> SourceInfo:
        return SourceInfo(
            name="squares",
            licence=self.licence,
            origin="made by the tests",
            video=VideoSpec(Fraction(35, 3), HEIGHT, WIDTH),
            view_names=self.views,
            action_names=("dx", "dy"),
            state_names=("x",),
            control_types=self.control,
        )

    def tasks(self) -> list[Task]:
        splits = self.splits
        return [Task(f"t{n}", splits[n % len(splits)], {"number": n}) for n in range(self.num_tasks)]

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        number = task.payload["number"]
        if self.trace is not None:
            Path(self.trace, f"{task.id}-{os.getpid()}").touch()
        for index in range(self.per_task):
            time.sleep(self.pause_s)
            if index == 1:
                yield from self._misbehave(self.faults.get(number, ""))
            sample = self._sample(number, index)
            yield _spoil(sample, self.faults.get(number, "")) if index == 1 else sample

    def _sample(self, number: int, index: int) -> RawSample:
        seed = 1000 * number + index
        rng = np.random.default_rng(seed)
        return RawSample(
            key=f"s{number:03d}-{index}",
            episode=f"episode {number}",
            views={view: squares(self.num_frames, seed + i) for i, view in enumerate(self.views)},
            control={
                kind: {view: squares(self.num_frames, seed + 50 + i) for i, view in enumerate(self.views)}
                for kind in self.control
            },
            actions=rng.standard_normal((self.num_frames, 2)).astype(np.float32),
            states=rng.standard_normal((self.num_frames, 1)).astype(np.float32),
            captions=["a square moves", "ein Quadrat läuft"],
            meta={"seed": seed, "ballast": rng.bytes(self.ballast // 2).hex()},
        )

    def _misbehave(self, fault: str) -> Iterator[Skipped]:
        first_try = self.trace is not None and len(list(Path(self.trace).glob("crashed*"))) == 0
        if fault == "crash once" and first_try:
            Path(str(self.trace), "crashed").touch()
        if fault == "segv" or (fault == "crash once" and first_try):
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "exit":
            os._exit(3)
        if fault == "hang":
            time.sleep(1000)
        if fault == "raise":
            raise KeyError("no such thing")
        if fault == "config":
            raise ConfigError("source.num_tasks is wrong")
        if fault == "skip":
            yield Skipped("clip 7", "too dark")


def _spoil(sample: RawSample, fault: str) -> RawSample:
    """Returns the sample with one thing wrong in it."""
    assert sample.actions is not None
    view = next(iter(sample.views))
    changed: dict[str, Any] = {}
    if fault == "duplicate key":
        changed["key"] = "s000-0"
    elif fault == "own key again":
        changed["key"] = f"{sample.key[:-1]}0"
    elif fault == "key with a dot":
        changed["key"] = "a.b"
    elif fault == "nan":
        changed["actions"] = np.full_like(sample.actions, np.nan)
    elif fault == "columns":
        changed["actions"] = sample.actions[:, :1]
    elif fault == "rows":
        changed["actions"] = sample.actions[1:]
    elif fault == "dtype":
        changed["actions"] = sample.actions.astype(np.float64)
    elif fault == "no actions":
        changed["actions"] = None
    elif fault == "frame size":
        changed["views"] = {view: sample.views[view][:, :8]}
    elif fault == "float frames":
        changed["views"] = {view: sample.views[view].astype(np.float32)}
    elif fault == "no frames":
        changed["views"] = {view: sample.views[view][:0]}
    elif fault == "lengths":
        changed["views"] = {**sample.views, view: sample.views[view][1:]}
    elif fault == "unknown view":
        changed["views"] = {"rear": sample.views[view]}
    elif fault == "no video":
        changed["views"] = {}
    elif fault == "two lines":
        changed["captions"] = ["one\ntwo"]
    elif fault == "meta":
        changed["meta"] = {"what": object()}
    elif fault == "meta nan":
        changed["meta"] = {"what": float("nan")}
    elif fault == "pickle member":
        changed["encoded"] = {"evil.pkl": b"cos\nsystem\n(S'touch /tmp/evil'\ntR."}
    elif fault == "broken mp4":
        changed["views"] = {}
        changed["encoded"] = {"mp4": b"\0" * 1000}
    elif fault == "episode":
        changed["episode"] = "a\u2028b"
    elif fault == "leak":
        changed["episode"] = "episode 0"
    elif fault == "long key":
        changed["key"] = "k" * 120
    return RawSample(**{**sample.__dict__, **changed})
