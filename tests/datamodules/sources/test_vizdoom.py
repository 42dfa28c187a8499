"""The ViZDoom source: actions against poses, depth and labels, reproducibility, engine failures.

The rig of views has its own file, `test_vizdoom_rig.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.sources.base import SPLITS, RawSample, Skipped, Task
from datamodules.sources.vizdoom_engine import ACTION_NAMES, DEPTH_UNIT, STATE_NAMES
from datamodules.sources.vizdoom_episode import Episode
from datamodules.sources.vizdoom_frames import LABEL_COLOURS, to_depth, to_labels, to_rgb
from datamodules.sources.vizdoom_worlds import parse_worlds
from longtake.errors import DataError
from tests.datamodules.sources.doom_games import (
    action,
    clips,
    digest,
    engine_processes,
    make_default_source,
    make_source,
    only_world,
    settings,
    start_game,
)

# --- actions, poses, pictures


def test_turning_by_known_angles_turns_the_pose_exactly() -> None:
    with start_game("health_gathering.wad") as game:
        game.idle(20)
        game.turn(0.0)
        before = game.look()
        for degrees in (30.0, -45.0, 8.0, -0.5, 90.0, -171.3):
            asked = game.whole_turn(degrees)
            assert abs(asked - degrees) <= 0.5 * 3 * 360 / 65536
            game.act(action(turn_right_degrees=asked))
            after = game.look()
            assert before is not None
            assert after is not None
            turned = (before.pose[3] - after.pose[3] + 180.0) % 360.0 - 180.0
            assert turned == pytest.approx(asked, abs=1e-5)
            np.testing.assert_allclose(after.pose[:3], before.pose[:3])
            before = after


def test_a_turn_to_the_right_moves_the_picture_to_the_left() -> None:
    with start_game("health_gathering.wad") as game:
        game.idle(20)
        game.turn(0.0)
        first = game.look()
        game.act(action(turn_right_degrees=game.whole_turn(6.0)))
        second = game.look()
    assert first is not None
    assert second is not None
    size = (48, 64)
    old = to_rgb(first, size)[20:40].astype(float).mean(axis=2)
    new = to_rgb(second, size)[20:40].astype(float).mean(axis=2)

    def error(shift: int) -> float:
        """Of new[x] against old[x + shift]: where the picture has moved to the left by `shift`."""
        return float(np.mean((new[:, 10:50] - old[:, 10 + shift : 50 + shift]) ** 2))

    best = min(range(-8, 9), key=error)
    assert 2 <= best <= 5  # 6 degrees at 32 / tan(45) pixels: 3.4


def test_steps_move_the_player_forward_and_to_the_right() -> None:
    for name, offset in (("move_forward", 0.0), ("move_right", -90.0)):
        with start_game("health_gathering.wad") as game:
            game.idle(20)
            game.turn(0.0)
            start = game.look()
            game.act(action(**{name: 1.0}))
            end = game.look()
        assert start is not None
        assert end is not None
        way = end.pose[:2] - start.pose[:2]
        heading = np.radians(start.pose[3] + offset)
        assert float(way @ [np.cos(heading), np.sin(heading)]) == pytest.approx(np.linalg.norm(way), rel=1e-3)
        assert np.linalg.norm(way) > 1.0


def test_depth_counts_map_units() -> None:
    """Walking to a wall, its depth sinks as the pose moves."""
    with start_game("health_gathering.wad") as game:
        game.idle(20)
        game.turn(game.angle)  # east, along the long way of the room
        levels, places = [], []
        for _ in range(45):
            game.act(action(move_forward=0.6))
            seen = game.look()
            assert seen is not None
            levels.append(int(seen.depth[95, 128]))
            places.append(seen.pose[0])
    near = np.array(levels) < 90  # not at the end of the scale
    slope, _ = np.polyfit(np.array(places)[near], np.array(levels)[near], 1)
    assert near.sum() > 20
    assert -1.0 / slope == pytest.approx(DEPTH_UNIT, rel=0.03)


def test_controls_have_one_scale_and_pure_colours() -> None:
    palette = {tuple(colour) for colour in LABEL_COLOURS.values()}
    with start_game("deadly_corridor.wad", monsters=True) as game:
        game.idle(20)
        game.turn(0.0)
        seen = game.look()
    assert seen is not None
    labels, depth = to_labels(seen, (48, 64)), to_depth(seen, (48, 64))
    colours = {tuple(int(value) for value in colour) for colour in labels.reshape(-1, 3)}
    assert colours <= palette
    assert {LABEL_COLOURS[name] for name in ("wall", "floor", "ceiling", "monster")} <= colours
    rows = np.arange(48)[:, None]
    assert not np.any((labels == LABEL_COLOURS["floor"]).all(axis=2) & (rows < 24))
    assert not np.any((labels == LABEL_COLOURS["ceiling"]).all(axis=2) & (rows >= 24))
    assert np.array_equal(depth[..., 0], depth[..., 2])
    assert depth[24:, :, 0].mean(axis=1)[0] > depth[24:, :, 0].mean(axis=1)[-1]  # the floor comes nearer


def test_clips_hold_frames_and_the_actions_that_made_them() -> None:
    source = make_source("vizdoom", "control_splits=null", *only_world("deathmatch"))
    task = next(task for task in source.tasks() if task.split == "train")
    samples = clips(source, task)
    assert [sample.key for sample in samples] == [f"{task.id}_00", f"{task.id}_01"]
    for sample in samples:
        assert sample.episode == task.id
        assert sample.actions is not None
        assert sample.states is not None
        assert (sample.actions.dtype, sample.actions.shape) == (np.float32, (13, len(ACTION_NAMES)))
        assert (sample.states.dtype, sample.states.shape) == (np.float32, (13, len(STATE_NAMES)))
        for frames in (sample.views["main"], sample.control["depth"]["main"], sample.control["labels"]["main"]):
            assert (frames.dtype, frames.shape) == (np.uint8, (13, 48, 64, 3))
        assert sample.num_frames == 13
        assert len(sample.captions) == 3
        assert all("\n" not in caption for caption in sample.captions)
    first, second = samples
    assert first.actions is not None
    assert second.actions is not None
    assert not first.actions[0].any()
    assert second.actions[0].any()  # the game went on: what produced its first frame
    assert (first.meta["first_frame"], second.meta["first_frame"]) == (0, 13)
    actions = np.concatenate([first.actions, second.actions])
    states = np.concatenate([sample.states for sample in samples if sample.states is not None])
    turned = (states[:-1, 3] - states[1:, 3] + 180.0) % 360.0 - 180.0
    np.testing.assert_allclose(turned, actions[1:, ACTION_NAMES.index("turn_right_degrees")], atol=1e-3)


@pytest.mark.parametrize("world", ["my_way_home", "deathmatch", "health_gathering_supreme", "freedoom1"])
def test_clips_move(world: str) -> None:
    source = make_source("vizdoom", "clip_frames=49", "num_clips=2", *only_world(world))
    samples = clips(source, source.tasks()[0])
    for sample in samples:
        frames = sample.views["main"].astype(np.float64)
        changes = np.mean((frames[1:] - frames[:-1]) ** 2, axis=(1, 2, 3))
        assert 10 * np.log10(255**2 / changes.mean()) < 30.0  # a copy of the last frame is a poor guess
        assert np.mean(changes < 1.0) < 0.3  # and seldom a perfect one
        assert frames.std() > 8.0
    turns = np.concatenate([sample.actions[:, 2] for sample in samples if sample.actions is not None])
    assert np.abs(turns).max() <= 8.0 + 0.01
    assert np.mean(np.abs(turns) > 1.0) > 0.3


def test_scattered_clips_each_start_anew() -> None:
    source = make_source("vizdoom", *only_world("freedoom2"))
    first, second = clips(source, source.tasks()[0])
    assert first.states is not None
    assert second.states is not None
    assert second.actions is not None
    assert not second.actions[0].any()
    assert np.linalg.norm(second.states[0, :2] - first.states[-1, :2]) > 64.0


# --- the same bytes, whatever happens


def test_the_same_task_gives_the_same_bytes_in_another_process() -> None:
    overrides = ["control_splits=null"]
    source = make_source("vizdoom", *overrides)
    tasks = [task for task in source.tasks() if task.split in ("train", "val")]
    code = (
        "import sys; from tests.datamodules.sources.doom_games import *\n"
        "source = make_source('vizdoom', *sys.argv[1:])\n"
        "tasks = [task for task in source.tasks() if task.split in ('train', 'val')]\n"
        "print(*[digest(list(source.samples(task))) for task in reversed(tasks)])"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, *overrides]
    other = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert [digest(list(source.samples(task))) for task in tasks] == other.stdout.split()[::-1]


def test_a_seed_decides_what_happens() -> None:
    tasks = [make_source("vizdoom", f"seed={seed}").tasks()[0] for seed in (0, 1)]
    first, second = (clips(make_source(), task)[0] for task in tasks)
    assert not np.array_equal(first.views["main"], second.views["main"])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the engine's process under /proc")
def test_an_engine_that_dies_is_started_again_and_gives_the_same_bytes() -> None:
    source = make_source()
    task = source.tasks()[0]
    expected = digest(list(source.samples(task)))
    samples = source.samples(task)
    received = [next(samples)]
    (engine,) = engine_processes()
    os.kill(engine, signal.SIGKILL)
    received += list(samples)
    assert digest(received) == expected


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the engine's process under /proc")
def test_an_engine_that_keeps_dying_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Episode.record

    def die(self: Episode, *args: Any) -> RawSample | Skipped:
        for engine in engine_processes():
            os.kill(engine, signal.SIGKILL)
        return record(self, *args)

    monkeypatch.setattr(Episode, "record", die)
    source = make_source()
    task = source.tasks()[0]
    with pytest.raises(DataError, match=f"ended by itself 3 times in episode {task.id}"):
        list(source.samples(task))
    assert engine_processes() == []


def test_an_episode_that_ends_early_is_skipped_and_played_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, calls = Episode._choose, []

    def choose_or_die(self: Episode, seen: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 13 + 5:  # in the second clip
            self._game.command("kill")
        return choose(self, seen)

    monkeypatch.setattr(Episode, "_choose", choose_or_die)
    source = make_source()
    task = source.tasks()[0]
    first, skipped, second = source.samples(task)
    assert isinstance(skipped, Skipped)
    assert skipped.name == f"{task.id}_01"
    assert re.search("died or left the map after .* of 13 frames", skipped.reason)
    assert isinstance(first, RawSample)
    assert isinstance(second, RawSample)
    assert (first.key, second.key) == (f"{task.id}_00", f"{task.id}_01")
    assert second.meta["seed"] == first.meta["seed"] + 1


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "cwd")
    source = make_source()
    samples = source.samples(source.tasks()[0])
    next(samples)
    assert list((tmp_path / "tmp").iterdir())  # while the game runs
    samples.close()  # type: ignore[attr-defined]
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "cwd").iterdir())
    assert engine_processes() == []


def test_the_main_process_never_loads_the_engine() -> None:
    code = (
        "import sys; from tests.datamodules.sources.doom_games import *\n"
        "source = make_source('vizdoom_rig'); source.info(), source.tasks()\n"
        "assert 'vizdoom' not in sys.modules and 'torch' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# --- slow


@pytest.mark.slow
def test_every_map_of_the_yaml_gives_clips() -> None:
    worlds = parse_worlds(settings()["worlds"])
    source = make_source()
    for world in worlds:
        for split in SPLITS:
            for name in world.maps[split]:
                payload = {"world": world.name, "map": name, "seed": 8, "num_clips": 2}
                samples = clips(source, Task(id=f"{world.name}_{name}", split=split, payload=payload))
                assert np.stack([sample.views["main"] for sample in samples]).std() > 5.0


@pytest.mark.slow
def test_the_long_split_is_whole() -> None:
    source = make_default_source()
    tasks = [task for task in source.tasks() if task.split == "long"]
    assert len(tasks) == 8
    for task in tasks:
        (sample,) = clips(source, task)
        assert sample.views["main"].shape == (561, 48, 64, 3)
