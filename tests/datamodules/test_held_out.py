"""Held-out clips one by one, and what weights remember of their data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.describe import describe
from datamodules.held_out import held_out_clips, held_out_views, pixel_data
from datamodules.shards import DatasetInfo
from datamodules.video import VideoDataModule
from datamodules.writing.build import WriterSettings, build_dataset
from longtake.errors import ConfigError, DataError
from longtake.media.edges import edge_video
from tests.datamodules.synthetic import Squares
from tests.datamodules.toy_set import damage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Returns a set of 4 training clips, 4 for validation and 4 in `long`, of 13 frames each."""
    source = Squares(num_tasks=6, per_task=2, num_frames=13, splits=("train", "val", "long"))
    settings = WriterSettings(task_timeout_s=60)
    build_dataset(source, tmp_path / "set", request={"a": 1}, settings=settings, num_workers=1, progress=False)
    return tmp_path / "set"


def module(root: Path, **changes: object) -> VideoDataModule:
    return VideoDataModule(root=root, num_frames=9, video_reader="pyav", **changes)  # type: ignore[arg-type]


def test_clips_are_spread_over_the_split_and_begin_at_their_start(root: Path) -> None:
    clips = list(held_out_clips(module(root), 9, 2))
    assert [clip.key for clip in clips] == ["s002-0", "s005-0"]
    for clip in clips:
        assert clip.frames.shape == (1, 9, 16, 24, 3)
        assert clip.frames.dtype == np.uint8
        assert clip.caption == "a square moves"
        assert clip.actions is not None
        assert clip.actions.shape == (9, 2)
        assert not clip.actions[0].any()  # what led to the first frame is not known


def test_a_clip_that_is_shorter_comes_whole_and_there_are_never_more_than_there_are(root: Path) -> None:
    clips = list(held_out_clips(module(root), 500, 50))
    assert [clip.frames.shape[1] for clip in clips] == [13] * 4


def test_another_split_or_validation_where_there_is_no_such(root: Path) -> None:
    keys = [clip.key for clip in held_out_clips(module(root), 9, 4, split="val")]
    assert keys == ["s001-0", "s001-1", "s004-0", "s004-1"]
    data = module(root, splits={"predict": "nothing"})
    assert [clip.key for clip in held_out_clips(data, 9, 4)] == keys
    with pytest.raises(ConfigError, match="long"):
        list(held_out_clips(module(root), 9, 4, split="lnog"))


def test_damaged_clips_are_left_out_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(root, "long", 0, "mp4")
    assert [clip.key for clip in held_out_clips(module(root), 9, 4)] == ["s002-1", "s005-0", "s005-1"]
    assert "s002-0" in caplog.text
    for number in (1, 2, 3):
        damage(root, "long", number, "mp4")
    with pytest.raises(DataError, match="no clip of split 'long'"):
        list(held_out_clips(module(root), 9, 4))


def test_views_are_read_window_by_window(tmp_path: Path) -> None:
    source = Squares(num_tasks=2, per_task=2, num_frames=13, views=("front", "rear"), control=("depth",))
    source.splits = ("train", "long")
    settings = WriterSettings(task_timeout_s=60)
    build_dataset(source, tmp_path / "set", request={"a": 1}, settings=settings, num_workers=1, progress=False)
    whole = module(tmp_path / "set", control=["depth", "edge"])
    for stride in (1, 2):
        data = module(tmp_path / "set", frame_stride=stride, reduce_actions="last")
        clips = list(held_out_views(data, 2, control=("depth", "edge")))
        assert [clip.key for clip in clips] == ["s001-0", "s001-1"]
        for clip, held in zip(clips, held_out_clips(whole, 13, 2), strict=True):
            frames = held.frames[:, ::stride]
            assert (clip.num_frames, clip.views, clip.caption) == (frames.shape[1], (0, 1), "a square moves")
            assert clip.actions is not None
            assert clip.actions.shape == (frames.shape[1], 2)
            assert clip.control is not None
            for start in (0, 2):
                wanted = frames[:, start : start + 5]
                assert np.array_equal(clip.frames.window(start, start + 5), wanted)
                control = clip.control.window(start, start + 5)
                assert np.array_equal(control["edge"][1], edge_video(wanted[1]))
                assert control["depth"].shape == wanted.shape
                assert clip.control.there("depth") == [True, True]
    (rear,) = held_out_views(module(tmp_path / "set", views=["rear"]), 1)
    assert (rear.views, rear.control) == ((1,), None)
    with pytest.raises(ConfigError, match="'dept'.*depth"):
        list(held_out_views(module(tmp_path / "set"), 1, control=("dept",)))


def test_data_without_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match="clips of pixels"):
        pixel_data(object())


def test_weights_remember_columns_and_their_usual_size(root: Path) -> None:
    told = describe(DatasetInfo.load(root), "train")
    assert told["action_names"] == ["dx", "dy"]
    assert told["view_names"] == ["main"]
    assert told["text"] is None
    rows = np.concatenate([clip.actions for clip in held_out_clips(module(root), 13, 9, split="train")])  # type: ignore[misc]
    assert told["action_typical"] == pytest.approx([0.8, 0.8], abs=0.15)  # mean magnitude of a standard normal
    assert rows.shape == (4 * 13, 2)
