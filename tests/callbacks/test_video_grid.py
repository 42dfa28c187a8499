"""Sample videos: when they are made, what is in them, which clips they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.ema import EMA
from callbacks.video_grid import VideoGrid, alike, chunk_psnr, make_grid, make_sheet, taken
from longtake.errors import ConfigError
from longtake.media.read import probe_video
from longtake.rollout.plan import TrainedFor, plan_rollout
from tests.tiny_ar import fit_tiny, make_data, make_module


def grid_of(folder: Path, steps: int, **changes: object) -> VideoGrid:
    settings = {"every_n_steps": 2, "num_samples": 2, **changes}
    return VideoGrid(str(folder / "samples"), **settings)  # type: ignore[arg-type]


def test_there_is_one_every_so_many_steps_and_one_at_the_end(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 5)
    fit_tiny(make_module(), tmp_path, 5, EMA(), grid)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step_0000002", "step_0000004", "step_0000005"]
    assert grid.last == tmp_path / "samples" / "step_0000005" / "grid.mp4"
    info = probe_video(grid.last)
    assert (info.num_frames, info.fps) == (21, 10)
    assert Image.open(grid.last.with_suffix(".png")).size[0] > 500


def test_without_an_interval_there_is_only_the_last_one(tmp_path: Path) -> None:
    fit_tiny(make_module(), tmp_path, 3, grid_of(tmp_path, 3, every_n_steps=None))
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_0000003"]


def test_training_goes_on_as_if_nothing_had_been_shown(tmp_path: Path) -> None:
    plain, shown = make_module(), make_module()
    fit_tiny(plain, tmp_path / "plain", 4, EMA())
    fit_tiny(shown, tmp_path / "shown", 4, EMA(), grid_of(tmp_path, 4, every_n_steps=1))
    mine, theirs = plain.state_dict(), shown.state_dict()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert shown.training


def test_tensorboard_gets_picture_and_figures(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="tb")
    fit_tiny(make_module(), tmp_path, 2, grid_of(tmp_path, 2), logger=board)
    board.finalize("success")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert "val/rollout" in events.Tags()["images"]
    assert "val/rollout/psnr@chunk01" in events.Tags()["scalars"]
    assert "val/rollout/psnr@chunk00" not in events.Tags()["scalars"]  # that chunk is given


def test_a_grid_has_a_row_a_clip_and_holds_the_last_given_frame() -> None:
    rng = np.random.default_rng(0)
    truth, rolled = (rng.integers(0, 255, (2, 1, 6, 16, 16, 3), np.uint8) for _ in range(2))
    grid = make_grid(truth, rolled, given=3, keys=["a", "b"])
    assert len(grid) == 6
    tile = grid.shape[2] // 3
    given = grid[:, :, : tile - 4]
    assert np.array_equal(given[3], given[2])
    assert np.array_equal(given[5], given[2])
    assert not np.array_equal(given[1], given[2])
    one = make_grid(truth[:1], rolled[:1], given=3, keys=["a"])
    assert grid.shape[1] == 2 * one.shape[1] + 4
    assert make_sheet(truth, rolled, 3, ["a", "b"]).ndim == 3
    assert len(make_grid(truth, rolled, given=0, keys=["a", "b"])) == 6


def test_psnr_by_chunk_leaves_out_what_was_given() -> None:
    trained = TrainedFor(rollouts=("memory",), chunk_lat=3, starts_lat=(0, 1))
    plan = plan_rollout("memory", num_frames_px=21, context_px=1, trained=trained)
    truth = np.full((1, 1, 21, 4, 4, 3), 100, np.uint8)
    rolled = truth.copy()
    rolled[:, :, 0] = 0  # given: does not count
    rolled[:, :, 9:] = 151  # an error of 0.2
    found = chunk_psnr(truth, rolled, plan)
    assert found == pytest.approx({"val/rollout/psnr@chunk00": 100, "val/rollout/psnr@chunk01": 13.98}, abs=0.01)


def test_clips_are_spread_over_the_set(tmp_path: Path) -> None:
    """Of 7 validation clips, one a batch, and one that only fills up; and of fewer than are wanted, all there are."""
    for val_clips, expected in ((7, ["0", "2", "5"]), (2, ["0", "1"])):
        grid = grid_of(tmp_path / str(val_clips), 1, num_samples=3)
        fit_tiny(make_module(), tmp_path, 1, grid, data=make_data(val_clips=val_clips), limit_val_batches=1.0)
        assert grid._clips is not None
        assert [key[-1] for key in grid._clips.key] == expected


def test_clips_of_another_shape_are_left_out() -> None:
    long, short = make_data().batch([1, 2]), make_data(num_frames=9).batch([3])
    assert alike([long, short, make_data().batch([4])]).key == ["clip-1", "clip-2", "clip-4"]


def test_some_clips_of_a_batch() -> None:
    batch = make_data().batch([3, 4, 5])
    part = taken(batch, [0, 2])
    assert part.key == ["clip-3", "clip-5"]
    assert part.video is not None
    assert batch.video is not None
    assert np.array_equal(part.video, batch.video[[0, 2]])


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.video_grid"):
        VideoGrid(str(tmp_path), num_samples=0)
