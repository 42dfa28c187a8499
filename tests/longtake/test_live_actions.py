"""Actions by keys: what a key means, for which frames it is asked, and how the video ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import longtake
from longtake.errors import ConfigError
from longtake.generate import VideoModel
from longtake.live_actions import ActionSource, KeyActions, VideoEnded
from tests.longtake.test_generate import TRUST, frames

NAMES, TYPICAL = ("forward", "turn_right", "jump"), (2.0, 15.0, 1.0)


def keys(typed: str, asked: list[str] | None = None) -> Callable[[str], str | None]:
    """Returns what gives these keys one after another, and notes the prompts."""
    left = list(typed)

    def read(prompt: str) -> str | None:
        if asked is not None:
            asked.append(prompt)
        return left.pop(0) if left else None

    return read


class Table:
    """Actions of a whole video, given chunk by chunk; ends where the table does."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.asked: list[tuple[int, int, int]] = []

    def rows(self, start: int, stop: int, given: int) -> np.ndarray:
        self.asked.append((start, stop, given))
        if start >= len(self.table):
            raise VideoEnded
        return self.table[start:stop]


def test_a_key_is_held_for_a_chunk_and_the_first_frame_has_none() -> None:
    asked: list[str] = []
    source = KeyActions(NAMES, TYPICAL, keys("wdx A", asked))
    assert isinstance(source, ActionSource)
    first, second, third, fourth = (source.rows(start, start + 4, 0) for start in (0, 4, 8, 12))
    assert first.tolist() == [[0, 0, 0], *[[2, 0, 0]] * 3]
    assert second.tolist() == [[0, 15, 0]] * 4
    assert third.tolist() == [[0, 0, 0]] * 4  # x means nothing, so it asks again: space
    assert fourth.tolist() == [[0, -15, 0]] * 4
    assert "frames 4 to 7: w s a d, space" in asked[1]
    assert len(asked) == 5


def test_nobody_is_asked_about_given_frames() -> None:
    known = np.arange(15, dtype=np.float32).reshape(5, 3)
    asked: list[str] = []
    source = KeyActions(NAMES, TYPICAL, keys("ws", asked), known)
    assert np.array_equal(source.rows(0, 4, 5), known[:4])
    assert asked == []
    part = source.rows(4, 8, 5)
    assert np.array_equal(part, np.concatenate([known[4:], [[2, 0, 0]] * 3]))
    assert source.rows(8, 12, 5).tolist() == [[-2, 0, 0]] * 4


@pytest.mark.parametrize("typed", ["q", "Q", ""])
def test_q_and_the_end_of_the_keys_end_the_video(typed: str) -> None:
    with pytest.raises(VideoEnded):
        KeyActions(NAMES, TYPICAL, keys(typed)).rows(0, 4, 0)


def test_keys_need_columns_whose_meaning_is_clear() -> None:
    with pytest.raises(ConfigError, match="no column of the actions is named"):
        KeyActions(("a", "b"), (1.0, 1.0), keys("w"))
    with pytest.raises(ConfigError, match="trained without any"):
        KeyActions((), (), keys("w"))
    asked: list[str] = []
    KeyActions(("throttle_forward",), (1.0,), keys("w", asked)).rows(0, 2, 0)
    assert "w s, space" in asked[0]  # nothing turns


@pytest.fixture(scope="module")
def model(run_folder: Path) -> VideoModel:
    return longtake.load(run_folder, trust=TRUST)


@pytest.mark.parametrize("given", [0, 1, 9])
def test_actions_that_come_chunk_by_chunk_make_the_video_of_all_of_them_at_once(model: VideoModel, given: int) -> None:
    table = np.random.default_rng(0).normal(size=(33, 3)).astype(np.float32)
    start = frames(given) if given else None
    source = Table(table)
    live = model.generate(num_frames=33, start=start, actions=source, num_samples=2).video()
    assert np.array_equal(live, model.generate(num_frames=33, start=start, actions=table, num_samples=2).video())
    assert source.asked == [(0, 9, given), (9, 21, given), (21, 33, given)]


def test_the_video_ends_where_the_actions_do(model: VideoModel) -> None:
    table = np.zeros((21, 3), np.float32)
    assert model.generate(num_frames=333, actions=Table(table)).video().shape[2] == 21
