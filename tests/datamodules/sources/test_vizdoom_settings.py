"""Settings of the ViZDoom source: what is refused, and which tasks come out of them."""

from __future__ import annotations

import pickle
import re

import pytest
from omegaconf import OmegaConf

from datamodules.sources.base import SPLITS, RawSample
from datamodules.sources.vizdoom import VizDoomSource
from datamodules.sources.vizdoom_engine import ACTION_NAMES, STATE_NAMES
from longtake.errors import ConfigError
from tests.datamodules.sources.doom_games import (
    make_default_source,
    make_source,
    only_world,
    settings,
)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vizdoom", {"train": 512, "val": 64, "test": 64, "long": 8}),
        ("vizdoom_rig", {"train": 40, "val": 16, "test": 16, "long": 2}),
    ],
)
def test_default_sets_have_the_documented_sizes(name: str, counts: dict[str, int]) -> None:
    tasks = make_default_source(name).tasks()
    made = {split: sum(t.payload["num_clips"] for t in tasks if t.split == split) for split in SPLITS}
    assert made == counts


def test_info_names_what_samples_hold() -> None:
    info = make_source().info()
    assert info.view_names == ("main",)
    assert info.action_names == ACTION_NAMES
    assert info.state_names == STATE_NAMES
    assert info.video is not None
    assert (info.video.fps.numerator, info.video.fps.denominator) == (35, 3)
    assert "Freedoom" in info.licence


def test_tasks_are_fixed_and_splits_are_disjoint() -> None:
    tasks = make_default_source().tasks()
    assert tasks == make_default_source().tasks()
    assert len({task.id for task in tasks}) == len(tasks)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", task.id) for task in tasks)
    by_split = {split: [task for task in tasks if task.split == split] for split in SPLITS}
    seeds = [task.payload["seed"] for task in tasks]
    assert len({seed // 8 for seed in seeds}) == len(seeds)  # an episode and its restarts take 8 seeds
    levels = {
        split: {(task.payload["world"], task.payload["map"]) for task in tasks if "freedoom" in task.id}
        for split, tasks in by_split.items()
    }
    assert levels["train"]
    assert not levels["train"] & (levels["val"] | levels["test"] | levels["long"])
    assert not levels["val"] & (levels["test"] | levels["long"])


def test_another_seed_gives_other_episodes() -> None:
    first, second = make_source(), make_source("vizdoom", "seed=1")
    assert {t.payload["seed"] for t in first.tasks()}.isdisjoint(t.payload["seed"] for t in second.tasks())


def test_a_stretch_of_tasks_holds_the_worlds_by_their_shares() -> None:
    tasks = [task for task in make_source("vizdoom", "num_clips=2000").tasks() if task.split == "train"]
    worlds = settings()["worlds"]
    total = sum(world["share"] for world in worlds.values())
    for start in (0, 300, 700):
        names = [task.payload["world"] for task in tasks[start : start + 200]]
        for name, world in worlds.items():
            assert abs(names.count(name) - 200 * world["share"] / total) <= 2


def test_source_pickles() -> None:
    source = make_source("vizdoom_rig")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.tasks() == source.tasks()
    assert copy.info() == source.info()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("tics_per_frame=4", "video.fps"),
        ("tics_per_frame=0", "source.tics_per_frame"),
        ("video.fps=fast", "video.fps"),
        ("video.width=80", "video.width"),
        ("control_types=[dept]", "source.control_types"),
        ("num_val_clips=-1", "source.num_val_clips"),
        ("clip_frames=0", "source.clip_frames"),
        ("clips_per_episode=0", "source.clips_per_episode"),
        ("seed=-1", "source.seed"),
        ("move_speed=128", "source.move_speed"),
        ("render=[100,100]", "source.render"),
        ("worlds.freedoom1.maps.val=[e1m3]", "source.worlds.freedoom1.maps.val"),
        ("worlds.freedoom1.maps.test=[]", "source.worlds.freedoom1.maps.test"),
        ("worlds.my_way_home.maps=[map01,map02]", "source.worlds.my_way_home.maps"),
        ("worlds.my_way_home.skill=9", "source.worlds.my_way_home.skill"),
        ("worlds.my_way_home.scatter=true", "source.worlds.my_way_home.scatter"),
        ("+worlds.my_way_home.colour=red", "source.worlds.my_way_home.colour"),
        ("worlds.my_way_home.wad=my_way_hom.wad", "source.worlds.my_way_home.wad"),
        ("worlds.my_way_home.maps=[map02]", "source.worlds.my_way_home.maps"),
    ],
)
def test_settings_that_cannot_work_name_the_key(override: str, key: str) -> None:
    values = settings("vizdoom")
    plus, path = override.startswith("+"), override.lstrip("+")
    changed = OmegaConf.create(values)
    name, text = path.split("=", 1)
    OmegaConf.update(changed, name, OmegaConf.create(f"x: {text}").x, force_add=plus)
    container = OmegaConf.to_container(changed)
    assert isinstance(container, dict)
    with pytest.raises(ConfigError) as caught:
        VizDoomSource(**{str(k): v for k, v in container.items()}).info()
    assert f"`{key}`" in str(caught.value)


def test_no_world_left_is_an_error() -> None:
    values = settings()
    values["worlds"] = dict.fromkeys(values["worlds"])
    with pytest.raises(ConfigError, match="share"):
        VizDoomSource(**values)


def test_control_is_rendered_for_the_splits_that_ask_for_it() -> None:
    source = make_source("vizdoom", "control_splits=[long]", *only_world("my_way_home"))
    assert source.info().control_types == ("depth", "labels")
    for split, expected in (("val", set()), ("long", {"depth", "labels"})):
        task = next(task for task in source.tasks() if task.split == split)
        sample = next(iter(source.samples(task)))
        assert isinstance(sample, RawSample)
        assert set(sample.control) == expected
    with pytest.raises(ConfigError, match="control_splits"):
        make_source("vizdoom", "control_splits=[tets]")
