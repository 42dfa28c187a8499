"""`source=gymnasium`: whole clips, the actions that caused their frames, the same bytes for a seed."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from datamodules.sources.base import RawSample, Source
from longtake.errors import ConfigError
from tests.datamodules.sources.numbered_clips import build, collect, numbers

HERE = "tests.datamodules.sources.counting_env"


def counting(**changes: Any) -> Source:
    return build("gymnasium", env_id=f"{HERE}:Counting-v0", **{"num_clips": 20, **changes})


def test_clips_are_whole_follow_each_other_and_never_straddle_a_reset() -> None:
    samples, skipped, splits = collect(counting(env_kwargs={"length": 12}))
    assert not skipped
    assert list(splits.values()).count("train") == 20
    assert list(splits.values()).count("val") == 1
    # An episode of 13 frames (0 to 12) gives two clips of 5; the rest of it is too short.
    starts = [numbers(sample)[0] for sample in samples.values()]
    assert all(numbers(s) == list(range(numbers(s)[0], numbers(s)[0] + 5)) for s in samples.values())
    assert set(starts) == {0, 5}
    assert all(sample.meta["first_frame"] == numbers(sample)[0] for sample in samples.values())
    episodes: dict[str, set[str]] = {}
    for key, sample in samples.items():
        episodes.setdefault(sample.episode, set()).add(splits[key])
    assert all(len(found) == 1 for found in episodes.values())


def test_actions_stand_at_the_frame_they_caused() -> None:
    source = counting(env_kwargs={"actions": "box"}, policy=f"{HERE}.StepPolicy", record_observations=True)
    info = source.info()
    assert info.action_names == ("action_0", "action_1")
    assert info.state_names == ("obs_0", "obs_1")
    samples, _, _ = collect(source)
    for sample in samples.values():
        shown = numbers(sample)
        assert sample.actions is not None
        assert sample.states is not None
        # The policy says which step it is about to cause; nothing caused frame 0.
        assert sample.actions.tolist() == [[number, 1] if number else [0, 0] for number in shown]
        assert sample.states[:, 0].tolist() == shown


def test_a_frame_skip_holds_the_action_and_counts_in_frames() -> None:
    source = counting(
        env_kwargs={"actions": "box"},
        policy=f"{HERE}.StepPolicy",
        policy_kwargs={},
        frame_skip=2,
        video={"fps": 5},
    )
    assert source.info().video.fps == 5
    sample = next(iter(collect(source)[0].values()))
    assert numbers(sample) == [0, 2, 4, 6, 8]
    assert sample.actions[:, 0].tolist() == [0, 1, 3, 5, 7]


@pytest.mark.parametrize(
    ("actions", "names"),
    [
        ("discrete", ["action_0", "action_1", "action_2"]),
        ("multi", ["action_0_0", "action_0_1", "action_1_0", "action_1_1", "action_1_2"]),
        ("binary", ["action_0", "action_1"]),
        ("dict", ["action_look_0", "action_look_1", "action_move_0", "action_move_1"]),
        ("tuple", ["action_0_0", "action_0_1", "action_1_0"]),
    ],
)
def test_every_action_space_becomes_named_columns(actions: str, names: list[str]) -> None:
    source = counting(env_kwargs={"actions": actions}, num_clips=8)
    assert list(source.info().action_names) == names
    rows = np.concatenate([s.actions[1:] for s in collect(source)[0].values() if s.actions is not None])
    assert rows.shape[1] == len(names)
    if actions == "discrete":
        assert (rows.sum(axis=1) == 1).all()
        assert (rows.sum(axis=0) > 0).all(), "every choice is taken at some time"
    if actions == "multi":
        assert (rows[:, :2].sum(axis=1) == 1).all()
        assert (rows[:, 2:].sum(axis=1) == 1).all()


def test_random_actions_are_held_as_long_as_asked_for() -> None:
    source = counting(env_kwargs={"actions": "box"}, hold_frames=[3, 3], num_clips=4, clip_frames=30)
    rows = next(iter(collect(source)[0].values())).actions
    assert rows is not None
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    assert changes.tolist() == list(range(1, 30, 3))


def contents(samples: dict[str, RawSample]) -> list[tuple[str, bytes, bytes]]:
    return [(key, s.views["main"].tobytes(), np.asarray(s.actions).tobytes()) for key, s in samples.items()]


def test_the_same_seed_gives_the_same_bytes_in_any_worker() -> None:
    one, _, _ = collect(counting(record_observations=True))
    two, _, _ = collect(pickle.loads(pickle.dumps(counting(record_observations=True))))
    other, _, _ = collect(counting(record_observations=True, seed=1))
    assert contents(one) == contents(two)
    assert contents(one) != contents(other)
    offsets = {float(s.states[0, 1]) for s in one.values() if s.states is not None}
    assert len(offsets) > 2, "tasks and episodes have seeds of their own"
    # A task alone gives what it gives among the others.
    source = counting(record_observations=True)
    last = source.tasks()[-1]
    alone = {s.key: s for s in source.samples(last) if isinstance(s, RawSample)}
    assert contents(alone) == [row for row in contents(one) if row[0] in alone]


def test_episodes_that_are_all_too_short_end_with_a_reason() -> None:
    samples, skipped, _ = collect(counting(env_kwargs={"length": 3}, num_clips=8))
    assert not samples
    assert all("longest had 4 frames" in item.reason for item in skipped)
    assert "source.clip_frames" in skipped[0].reason


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"video": {"fps": 25}}, "video.fps"),
        ({"env_kwargs": {"actions": "text"}}, "source.env_id"),
        ({"env_kwargs": {"nonsense_argument": 1}}, "source.env_kwargs"),
        ({"policy": "no_such_module.Policy"}, "source.policy"),
        ({"policy": f"{HERE}.ACTIONS.nothing"}, "source.policy"),
        ({"action_names": ["one"]}, "source.action_names"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_recorded(changes: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        counting(**changes).info()


def test_an_unknown_environment_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"source\.env_id"):
        build("gymnasium", env_id="NoSuchEnv-v0").info()
    with pytest.raises(ConfigError, match=r"source\.env_id"):
        build("gymnasium")
    with pytest.raises(ConfigError, match="num_clips"):
        counting(num_clips=-1)
    with pytest.raises(ConfigError, match=r"source\.hold_frames"):
        counting(hold_frames=[3, 2])
    assert counting(video={"fps": 25}, ignore_render_fps=True).info().video.fps == 25


def test_a_real_environment_is_drawn_and_moves() -> None:
    pytest.importorskip("pygame")
    source = build("gymnasium", env_id="Acrobot-v1", num_clips=2, video={"fps": 15, "height": 48, "width": 64})
    samples, skipped, _ = collect(source)
    assert not skipped
    assert source.info().action_names == ("action_0", "action_1", "action_2")
    for sample in samples.values():
        video = sample.views["main"]
        assert video.shape == (5, 48, 64, 3)
        assert all((video[i] != video[i + 1]).any() for i in range(4))
        assert not video[:, :, :4].any(), "a square picture stands between black bars"
        assert video[:, 4:44, 12:52].mean() > 150
