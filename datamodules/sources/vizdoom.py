"""First-person video with actions from the game Doom, played by a scripted wanderer (`source=vizdoom`).

Engine, maps and textures come with the package `vizdoom`; nothing is downloaded and no display is needed. A
task is one episode of one world: it starts a game of its own from a seed of its own, so it gives the same
bytes in any process. With a rig, several views of each instant are taken (`vizdoom_rig.py`).
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from datamodules.sources.base import SPLITS, RawSample, Skipped, Source, SourceInfo, Task, VideoSpec
from datamodules.sources.vizdoom_engine import ACTION_NAMES, MAX_PUSH, STATE_NAMES, EngineStopped
from datamodules.sources.vizdoom_episode import Episode, EpisodeSettings
from datamodules.sources.vizdoom_frames import CONTROL_TYPES, render_size
from datamodules.sources.vizdoom_rig import View, parse_views
from datamodules.sources.vizdoom_worlds import check_world, parse_worlds
from longtake.errors import ConfigError, DataError, unknown_choice

_LOG = logging.getLogger("longtake")
_TICS_PER_SECOND = 35
_MAX_ENGINE_STARTS = 3  # of one task, when the engine ends by itself
_MAX_RESTARTS = 4  # of one episode, when the player dies or leaves the map
_MAX_TASKS = 1_000_000  # a split; keeps the seeds of splits apart


class VizDoomSource(Source):
    """Clips of games that a scripted wanderer plays, single view or a rig of views."""

    def __init__(
        self,
        *,
        name: str,
        worlds: Mapping[str, Mapping[str, Any]],
        video: Mapping[str, Any],
        num_clips: int,
        num_val_clips: int,
        num_test_clips: int,
        num_long_clips: int,
        clip_frames: int,
        long_frames: int,
        clips_per_episode: int,
        held_out_clips_per_episode: int,
        tics_per_frame: int,
        move_speed: float,
        control_types: Sequence[str],
        control_splits: Sequence[str] | None = None,
        seed: int,
        render: Sequence[int] | None = None,
        rig: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks the settings; nothing is started. Raises ConfigError naming the key that cannot be.

        Args:
            name: name of the set.
            worlds: settings of each world by name, see `vizdoom_worlds.World`; null leaves one out.
            video: {"fps", "height", "width"}; fps is 35 over `tics_per_frame`, the frame is 4:3.
            num_clips: clips of the training split.
            num_val_clips, num_test_clips, num_long_clips: clips of the held-out splits; a clip of `long` is
                an episode.
            clip_frames, long_frames: frames of a clip of train, val and test; of one of long.
            clips_per_episode, held_out_clips_per_episode: clips cut from one episode of train; of val and
                test.
            tics_per_frame: game tics of 1/35 s for which an action is held, which make a frame.
            move_speed: engine units of a full step, at most 127 (25 walks, 50 runs).
            control_types: which of "depth" and "labels" become control video.
            control_splits: the splits that have it; None for all.
            seed: another seed gives other episodes.
            render: (height, width) at which the engine renders, before the area filter; None chooses.
            rig: {"views": {name: {"yaw", "fov", "place"}}}, or None for one view.
        """
        self._name = name
        self._worlds = parse_worlds(worlds)
        counts = (num_clips, num_val_clips, num_test_clips, num_long_clips)
        self._clips: dict[str, int] = dict(zip(SPLITS, counts, strict=True))
        self._frames: dict[str, int] = dict.fromkeys(SPLITS, clip_frames) | {"long": long_frames}
        self._clips_per_episode: dict[str, int] = dict.fromkeys(SPLITS, held_out_clips_per_episode)
        self._clips_per_episode |= {"train": clips_per_episode, "long": 1}
        self._seed = seed
        self._rig = None if rig is None else {key: _plain(value) for key, value in rig.items()}
        self._views = [View("main", 0.0, 90.0)] if rig is None else parse_views(rig)
        self._check_counts(tics_per_frame, move_speed)
        for control_type in control_types:
            if control_type not in CONTROL_TYPES:
                raise unknown_choice("control type", control_type, CONTROL_TYPES, "source.control_types")
        for split in control_splits or ():
            if split not in SPLITS:
                raise unknown_choice("split", split, SPLITS, "source.control_splits")
        self._control_splits = SPLITS if control_splits is None else tuple(control_splits)
        self._video = _parse_video(video, tics_per_frame)
        size = None if render is None else (int(render[0]), int(render[1]))
        self._settings = EpisodeSettings(
            size=(self._video.height, self._video.width),
            render_size=render_size(self._video.height, self._video.width, size, "source.render"),
            tics_per_frame=tics_per_frame,
            move_speed=move_speed,
            views=tuple(self._views),
            is_rig=rig is not None,
            control_types=tuple(control_types),
        )

    def _check_counts(self, tics_per_frame: int, move_speed: float) -> None:
        for split, count in self._clips.items():
            key = "source.num_clips" if split == "train" else f"source.num_{split}_clips"
            if count < 0 or count > _MAX_TASKS:
                raise ConfigError(f"{count} clips for {split}; expected 0 to {_MAX_TASKS}. Change `{key}`.")
        for split, frames in self._frames.items():
            key = "source.long_frames" if split == "long" else "source.clip_frames"
            if frames < 1:
                raise ConfigError(f"clips of {frames} frames; expected 1 or more. Change `{key}`.")
        if min(self._clips_per_episode.values()) < 1:
            raise ConfigError(
                "fewer than 1 clip an episode; expected 1 or more. Change `source.clips_per_episode` or "
                "`source.held_out_clips_per_episode`."
            )
        if not 1 <= tics_per_frame <= _TICS_PER_SECOND:
            raise ConfigError(f"{tics_per_frame} tics a frame; expected 1 to 35. Change `source.tics_per_frame`.")
        if not 0 < move_speed <= MAX_PUSH:
            raise ConfigError(
                f"move_speed {move_speed:g}; expected more than 0, at most {MAX_PUSH}. Change `source.move_speed`."
            )
        if self._seed < 0:
            raise ConfigError(f"seed {self._seed}; expected 0 or more. Change `source.seed`.")

    def info(self) -> SourceInfo:
        """Returns what is true of every sample. Raises ConfigError when a wad or map is missing."""
        for world in self._worlds:
            check_world(world)
        version = importlib.metadata.version("vizdoom")
        return SourceInfo(
            name=self._name,
            licence="clips of Freedoom art (BSD 3-Clause) and ViZDoom scenarios (MIT)",
            origin=f"rendered by ViZDoom {version} while a scripted wanderer plays (source `vizdoom`)",
            video=self._video,
            view_names=tuple(view.name for view in self._views),
            action_names=ACTION_NAMES,
            state_names=STATE_NAMES,
            control_types=self._settings.control_types,
            rig=self._rig,
        )

    def tasks(self) -> list[Task]:
        """Returns one task an episode; any stretch of a split holds the worlds by their shares."""
        return [task for split in SPLITS for task in self._split_tasks(split)]

    def _split_tasks(self, split: str) -> Iterator[Task]:
        left, index = self._clips[split], 0
        counts = dict.fromkeys(range(len(self._worlds)), 0)
        total = sum(world.share for world in self._worlds)
        while left > 0:
            behind = [world.share / total * (index + 1) - counts[i] for i, world in enumerate(self._worlds)]
            chosen = int(np.argmax(behind))
            world = self._worlds[chosen]
            maps = world.maps[split]
            # Seeds 8 apart: those between belong to the restarts of the episode.
            seed = (self._seed * 4 * _MAX_TASKS + SPLITS.index(split) * _MAX_TASKS + index) * 8 % 2**31
            num_clips = min(left, self._clips_per_episode[split])
            map_name = maps[counts[chosen] % len(maps)]
            stem = world.name if world.num_maps == 1 else f"{world.name}_{map_name}"
            payload = {"world": world.name, "map": map_name, "seed": seed, "num_clips": num_clips}
            yield Task(id=f"{stem}_{seed:07d}", split=split, payload=payload)
            counts[chosen] += 1
            left -= num_clips
            index += 1

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        """Yields the clips of one episode. Raises DataError when the engine keeps ending by itself."""
        done = 0
        for start in range(1, _MAX_ENGINE_STARTS + 1):
            try:
                for index, sample in enumerate(self._play(task)):
                    if index >= done:  # after a restart the same samples come again
                        done += 1
                        yield sample
                return
            except EngineStopped as error:
                _LOG.warning("the game engine ended in %s (start %d): %s", task.id, start, error)
                last = error
        raise DataError(
            f"the game engine ended by itself {_MAX_ENGINE_STARTS} times in episode {task.id}, the last time "
            f"with: {last}. Expected it to run; lower the number of workers if memory is short, or set "
            f"`source.worlds.{task.payload['world']}.share` to 0."
        )

    def _play(self, task: Task) -> Iterator[RawSample | Skipped]:
        """Yields the clips of an episode; where it ends early, starts it anew with the next seed."""
        payload = task.payload
        world = next(world for world in self._worlds if world.name == payload["world"])
        clip, num_frames = 0, self._frames[task.split]
        settings = self._settings
        if task.split not in self._control_splits:
            settings = replace(settings, control_types=())
        for restart in range(_MAX_RESTARTS):
            with Episode(world, payload["map"], payload["seed"] + restart, settings) as episode:
                while clip < payload["num_clips"]:
                    key = f"{task.id}_{clip:02d}"
                    sample = episode.record(key, task.id, num_frames)
                    if isinstance(sample, Skipped):
                        yield sample
                        break
                    yield sample
                    clip += 1
            if clip == payload["num_clips"]:
                return


def _parse_video(video: Mapping[str, Any], tics_per_frame: int) -> VideoSpec:
    try:
        fps = Fraction(str(video["fps"]))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"fps {video['fps']!r} is not a number; expected one such as 35/3. Change `video.fps`."
        ) from error
    if fps != Fraction(_TICS_PER_SECOND, tics_per_frame):
        raise ConfigError(
            f"fps {fps} with {tics_per_frame} tics a frame; the game makes 35 tics a second, so expected "
            f"{Fraction(_TICS_PER_SECOND, tics_per_frame)}. Change `video.fps` or `source.tics_per_frame`."
        )
    return VideoSpec(fps=fps, height=int(video["height"]), width=int(video["width"]))


def _plain(value: Any) -> Any:
    """Returns nested settings as plain dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
