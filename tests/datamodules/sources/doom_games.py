"""What the tests of the ViZDoom source share: sources from the project's yaml, games, digests of samples."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from datamodules.sources.base import RawSample, Skipped, Task
from datamodules.sources.vizdoom import VizDoomSource
from datamodules.sources.vizdoom_engine import ACTION_NAMES, Game
from datamodules.sources.vizdoom_worlds import parse_worlds

_CONF = Path(__file__).parents[3] / "conf"


SMALL = ("num_clips=4", "num_val_clips=2", "num_test_clips=2", "num_long_clips=1", "clip_frames=13")
SMALL += ("long_frames=30", "clips_per_episode=2", "held_out_clips_per_episode=2")


def settings(name: str = "vizdoom", *overrides: str) -> dict[str, Any]:
    """The source's settings as a run composes them."""
    changes = [f"source.{setting}" for setting in overrides]
    with initialize_config_dir(str(_CONF), version_base="1.3"):
        config = compose(overrides=["+video=doom", f"+source={name}", *changes])
    values = OmegaConf.to_container(config.source, resolve=True)
    assert isinstance(values, dict)
    assert values.pop("_target_") == "datamodules.sources.vizdoom.VizDoomSource"
    return {str(key): value for key, value in values.items()}


def make_source(name: str = "vizdoom", *overrides: str) -> VizDoomSource:
    """A source with few short clips."""
    return VizDoomSource(**settings(name, *SMALL, *overrides))


def make_default_source(name: str = "vizdoom") -> VizDoomSource:
    return VizDoomSource(**settings(name))


def only_world(name: str) -> list[str]:
    """Overrides that leave one world of the yaml."""
    names = settings()["worlds"]
    return [f"worlds.{other}.share=0" for other in names if other != name]


def digest(samples: list[RawSample | Skipped]) -> str:
    """A hash of every byte of the samples."""
    sha = hashlib.sha256()
    for sample in samples:
        if isinstance(sample, Skipped):
            sha.update(repr(sample).encode())
            continue
        arrays = [*sample.views.values(), *(v for views in sample.control.values() for v in views.values())]
        for array in (*arrays, sample.actions, sample.states):
            assert array is not None
            sha.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        sha.update(repr((sample.key, sample.episode, sample.captions, sample.meta)).encode())
    return sha.hexdigest()


def clips(source: VizDoomSource, task: Task) -> list[RawSample]:
    """The samples of a task, of which none may be skipped."""
    samples = [sample for sample in source.samples(task) if isinstance(sample, RawSample)]
    assert len(samples) == task.payload["num_clips"]
    return samples


def start_game(wad: str, *, seed: int = 3, **world: Any) -> Game:
    parsed = parse_worlds({"test": {"wad": wad, **world}})[0]
    return Game(parsed, "map01", seed=seed, render_size=(192, 256), tics_per_frame=3, move_speed=25.0)


def action(**columns: float) -> np.ndarray:
    row = np.zeros(len(ACTION_NAMES))
    for name, value in columns.items():
        row[ACTION_NAMES.index(name)] = value
    return row


def engine_processes() -> list[int]:
    """Process ids of game engines that this process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = entry.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        if name == "vizdoom" and int(fields[1]) == os.getpid():
            found.append(int(entry.parent.name))
    return found
