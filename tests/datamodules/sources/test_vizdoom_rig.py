"""The rig of the ViZDoom source: all views of one instant, from one eye, in the directions of the yaml."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from datamodules.sources import vizdoom_engine
from datamodules.sources.base import RawSample, Skipped
from datamodules.sources.vizdoom import VizDoomSource
from datamodules.sources.vizdoom_engine import ACTION_NAMES
from datamodules.sources.vizdoom_rig import Rig, parse_views
from longtake.errors import ConfigError
from tests.datamodules.sources.doom_games import (
    action,
    clips,
    digest,
    make_default_source,
    make_source,
    only_world,
    settings,
    start_game,
)

# The engine's lens at 4:3: 90 degrees wide; a pixel is 1.2 times as high as wide, as on the screens of its time.
_FOCAL_X, _FOCAL_Y = 0.5, 0.8  # of the width, of the height


def sample_on_cylinder(frame: np.ndarray, degrees: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Grey values where a view sees azimuths (to the right of its direction) and slopes (of the height), [n m]."""
    height, width = frame.shape[:2]
    azimuth = np.radians(degrees)
    columns = width / 2 + _FOCAL_X * width * np.tan(azimuth) - 0.5
    rows = height / 2 + _FOCAL_Y * height * slopes[:, None] / np.cos(azimuth)[None, :] - 0.5
    grey = frame.astype(np.float64).mean(axis=2)
    top, left = np.floor(rows).astype(int), np.broadcast_to(np.floor(columns).astype(int), rows.shape)
    below, beside = rows - top, np.broadcast_to(columns, rows.shape) - left
    upper = grey[top, left] * (1 - beside) + grey[top, left + 1] * beside
    lower = grey[top + 1, left] * (1 - beside) + grey[top + 1, left + 1] * beside
    return upper * (1 - below) + lower * below


def overlap_correlation(left: np.ndarray, right: np.ndarray, apart: float) -> float:
    """Correlation of what two frames see where they overlap, the second turned `apart` degrees to the right."""
    degrees = np.linspace(apart - 43.0, 43.0, 30)
    slopes = np.linspace(-0.35, 0.35, 30)
    a, b = sample_on_cylinder(left, degrees, slopes), sample_on_cylinder(right, degrees - apart, slopes)
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.fixture(scope="module")
def rig_clips() -> list[RawSample]:
    """Two clips of seven views in the arena, which has monsters."""
    source = make_source("vizdoom_rig", "clip_frames=49", "num_clips=2", *only_world("deathmatch"))
    return clips(source, source.tasks()[0])


def test_rig_samples_hold_all_views_and_controls(rig_clips: list[RawSample]) -> None:
    names = list(settings("vizdoom_rig")["rig"]["views"])
    info = make_source("vizdoom_rig").info()
    assert list(info.view_names) == names
    assert info.control_types == ("depth", "labels")
    assert info.rig is not None
    assert info.rig["views"]["rear"] == {"yaw": 180, "fov": 90, "place": [2, 1]}
    for sample in rig_clips:
        assert list(sample.views) == names
        for frames in (*sample.views.values(), *sample.control["depth"].values()):
            assert (frames.dtype, frames.shape) == (np.uint8, (49, 48, 64, 3))
        assert set(sample.control["labels"]) == set(names)


def test_the_views_are_of_one_eye_and_one_instant(rig_clips: list[RawSample]) -> None:
    for sample in rig_clips:
        residual = sample.meta["rig_residual"]
        assert residual["position_map_units"] == 0.0
        assert residual["angle_degrees"] < 0.003  # half a step of the engine
        assert residual["front_view_changed_levels_mean"] < 1.0  # the map's script goes on: somebody may appear


def test_actions_and_poses_of_a_rig_agree(rig_clips: list[RawSample]) -> None:
    actions = np.concatenate([sample.actions for sample in rig_clips if sample.actions is not None])
    states = np.concatenate([sample.states for sample in rig_clips if sample.states is not None])
    turned = (states[:-1, 3] - states[1:, 3] + 180.0) % 360.0 - 180.0
    np.testing.assert_allclose(turned, actions[1:, ACTION_NAMES.index("turn_right_degrees")], atol=4e-3)
    assert np.linalg.norm(np.diff(states[:, :2], axis=0), axis=1).mean() > 1.0


def test_neighbouring_views_join_up(rig_clips: list[RawSample]) -> None:
    """Where two neighbours overlap they see the same, and only there."""
    views = settings("vizdoom_rig")["rig"]["views"]
    ring = sorted((name for name in views if views[name]["fov"] == 90), key=lambda name: views[name]["yaw"])
    joined, mirrored, later = [], [], []
    for sample in rig_clips:
        for name, neighbour in zip(ring, ring[1:] + ring[:1], strict=True):
            apart = (views[neighbour]["yaw"] - views[name]["yaw"]) % 360
            for t in range(0, 49, 8):
                left, right = sample.views[name][t], sample.views[neighbour][t]
                joined.append(overlap_correlation(left, right, apart))
                mirrored.append(overlap_correlation(right, left, apart))
                later.append(overlap_correlation(left, sample.views[neighbour][(t + 24) % 49], apart))
    assert len(joined) > 30
    assert np.mean(joined) > 0.9
    assert np.quantile(joined, 0.1) > 0.8
    assert np.mean(mirrored) < 0.6
    assert np.mean(later) < np.mean(joined) - 0.2


def test_the_telephoto_view_is_the_middle_of_the_wide_one(rig_clips: list[RawSample]) -> None:
    share = np.tan(np.radians(15.0))  # of a frame 90 degrees wide
    box = (32 * (1 - share), 24 * (1 - share), 32 * (1 + share), 24 * (1 + share))
    agreements = []
    for sample in rig_clips:
        for t in range(0, 49, 8):
            wide, tele = (Image.fromarray(sample.views[name][t]).convert("L") for name in ("front_wide", "front_tele"))
            middle = np.asarray(wide.resize((16, 12), Image.Resampling.BILINEAR, box=box), dtype=np.float64)
            near = np.asarray(tele.reduce(4), dtype=np.float64)
            assert abs(near.mean() - middle.mean()) < 8.0
            if near.std() > 12.0:
                agreements.append(float(np.corrcoef(near.ravel(), middle.ravel())[0, 1]))
    assert len(agreements) > 3
    assert np.median(agreements) > 0.9


def test_the_world_stands_still_between_views_and_moves_between_frames() -> None:
    views = parse_views(settings("vizdoom_rig")["rig"])
    with start_game("defend_the_center.wad", monsters=True) as game:
        game.command("god")
        game.idle(60)  # monsters have come
        rig = Rig(game, views)
        rig.advance(action())
        first = rig.shoot()
        game.idle(60)
        again = rig.shoot()
        for _ in range(12):
            rig.advance(action())
            later = rig.shoot()
    assert first is not None
    assert again is not None
    assert later is not None
    for view in views:
        assert np.array_equal(first.seen[view.name].rgb, again.seen[view.name].rgb)
    assert np.array_equal(first.front.pose, later.front.pose)
    moved = [not np.array_equal(first.seen[v.name].labels, later.seen[v.name].labels) for v in views]
    assert any(moved)


@pytest.mark.parametrize(("start_tics", "degrees"), [(60, 0.0), (61, 45.0)])
def test_time_goes_on_by_exactly_the_tics_of_a_frame(
    start_tics: int, degrees: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dust where a shot hit rises by a map unit a tic."""
    configure = vizdoom_engine._configure

    def configure_with_objects(*args: Any, **kwargs: Any) -> Any:
        game = configure(*args, **kwargs)
        game.set_objects_info_enabled(True)
        return game

    monkeypatch.setattr(vizdoom_engine, "_configure", configure_with_objects)
    views = parse_views(settings("vizdoom_rig")["rig"])
    with start_game("defend_the_center.wad") as game:
        game.command("god")
        game.idle(start_tics)
        game.turn(degrees)
        rig, heights = Rig(game, views), []
        for index in range(8):
            rig.advance(action(attack=float(index == 0)))
            if index % 2:
                game.idle(1)  # whatever number of tics a shot takes
            assert rig.shoot() is not None
            objects = game._game.get_state().objects
            heights += [thing.position_z for thing in objects if thing.name == "BulletPuff"]
    assert len(heights) > 3
    np.testing.assert_allclose(np.diff(heights), 3.0)


def test_a_rig_task_gives_the_same_bytes_again() -> None:
    source = make_source("vizdoom_rig", "clip_frames=5", *only_world("freedoom1"))
    task = source.tasks()[0]
    assert digest(list(source.samples(task))) == digest(list(source.samples(task)))


def test_an_episode_that_ends_in_mid_rig_is_dropped_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    look, calls = Rig._turn_to, []

    def look_or_die(self: Rig, angle: float) -> Any:
        calls.append(1)
        if len(calls) == 9:
            self._game.command("kill")
        return look(self, angle)

    monkeypatch.setattr(Rig, "_turn_to", look_or_die)
    source = make_source("vizdoom_rig", "clip_frames=5", "num_clips=1")
    task = source.tasks()[0]
    skipped, sample = source.samples(task)
    assert isinstance(skipped, Skipped)
    assert isinstance(sample, RawSample)
    assert {len(frames) for frames in sample.views.values()} == {5}


def test_views_come_from_the_yaml_alone() -> None:
    values = settings("vizdoom_rig")
    values["rig"] = {"views": {"left_eye": {"yaw": 350, "place": [0, 0]}, "right_eye": {"yaw": 10, "place": [0, 1]}}}
    values |= {"clip_frames": 3, "num_clips": 1, "control_types": []}
    source = VizDoomSource(**values)
    assert source.info().view_names == ("left_eye", "right_eye")
    (sample,) = clips(source, source.tasks()[0])
    assert overlap_correlation(sample.views["left_eye"][0], sample.views["right_eye"][0], 20.0) > 0.8


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rig.views.rear.fov=120", "source.rig.views.rear.fov"),
        ("rig.views.rear.yaw=null", "source.rig.views.rear.yaw"),
        ("rig.views.rear.place=[1,1]", "source.rig.views.rear.place"),
        ("rig.views.rear.place=2", "source.rig.views.rear.place"),
        ("rig.views={}", "source.rig.views"),
    ],
)
def test_rigs_that_cannot_work_name_the_key(override: str, key: str) -> None:
    changed = OmegaConf.create(settings("vizdoom_rig"))
    name, text = override.split("=", 1)
    OmegaConf.update(changed, name, OmegaConf.create(f"x: {text}").x, merge=False)
    values = OmegaConf.to_container(changed)
    assert isinstance(values, dict)
    with pytest.raises(ConfigError) as caught:
        VizDoomSource(**{str(k): v for k, v in values.items()})
    assert f"`{key}`" in str(caught.value)


@pytest.mark.slow
def test_a_long_clip_of_the_rig_is_whole_and_still() -> None:
    source = make_default_source("vizdoom_rig")
    tasks = [task for task in source.tasks() if task.split == "long"]
    assert len(tasks) == 2
    for task in tasks:
        (sample,) = clips(source, task)
        assert {frames.shape for frames in sample.views.values()} == {(561, 48, 64, 3)}
        assert sample.meta["rig_residual"]["position_map_units"] < 0.01


@pytest.mark.slow
def test_levels_with_lifts_and_teleporters_are_seen_from_one_eye() -> None:
    source = make_source("vizdoom_rig", "clip_frames=49", "num_clips=24", *only_world("freedoom2"))
    for task in source.tasks():
        if task.split == "train":
            for sample in clips(source, task):
                assert sample.meta["rig_residual"]["position_map_units"] < 0.01
                assert sample.meta["rig_residual"]["angle_degrees"] < 0.003
