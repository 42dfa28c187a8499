"""The wanderer of the ViZDoom source, and the captions made from what it did."""

from __future__ import annotations

import re

import numpy as np

from datamodules.sources.vizdoom_captions import make_captions
from datamodules.sources.vizdoom_policy import Wanderer, clearance
from tests.datamodules.sources.doom_games import (
    action,
    clips,
    make_source,
    start_game,
)


def test_captions_say_what_happens() -> None:
    rows = np.stack([action(move_forward=1.0, turn_right_degrees=-2.0)] * 40)
    long, middle, short = make_captions("a hall", rows, [frozenset({"Monster"})] * 40)
    assert "a hall" in long
    assert "walking forward and turning left" in long
    assert "monsters are in view" in long
    assert "shooting" not in long
    assert "walking forward" in middle
    assert "turning left" in short
    rows = np.stack([action(attack=1.0)] * 40)
    long, *_ = make_captions("a hall", rows, [frozenset()] * 40)
    assert "standing nearly still and looking straight ahead, shooting" in long
    assert "monster" not in long


def test_captions_use_a_moderate_vocabulary() -> None:
    source = make_source("vizdoom", "num_clips=12", "clips_per_episode=1")
    words = {
        word
        for task in source.tasks()
        if task.split == "train"
        for sample in clips(source, task)
        for caption in sample.captions
        for word in re.findall("[a-z-]+", caption)
    }
    assert 15 < len(words) < 200


def test_clearance_sees_what_is_in_the_way() -> None:
    depth = np.full((192, 256), 60, dtype=np.uint8)
    depth[:, :60] = 5
    free = clearance(depth)
    assert free.left < 250.0 < free.right
    assert free.ahead > 400.0
    depth[:, 120:136] = 10
    assert clearance(depth).ahead < 80.0


def test_the_wanderer_follows_its_seed() -> None:
    with start_game("my_way_home.wad") as game:
        game.idle(20)
        game.turn(0.0)
        seen = game.look()
    assert seen is not None
    runs = []
    for seed in (1, 1, 2):
        wanderer = Wanderer(np.random.default_rng(seed), fights=False)
        runs.append(np.stack([wanderer.choose(seen) for _ in range(30)]))
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    changes = np.abs(np.diff(runs[0][:, 2]))
    assert changes.max() <= 3.0 + 1e-9  # smooth
