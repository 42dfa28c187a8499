"""What is written of a rollout, on videos made by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.generate import Generation, Request
from longtake.media.read import probe_video, read_video
from longtake.media.view_files import ViewLayout
from longtake.rollout.plan import TrainedFor, plan_rollout
from longtake.rollout_report import SampleReport, summary, write_rollout
from longtake.streaming import VideoChunk
from longtake.truth import truth_of
from tests.block_code import BlockCode

TRAINED = TrainedFor(rollouts=("memory",), chunk_lat=3, starts_lat=(0, 1))


def made(video: np.ndarray, context_px: int = 9) -> Generation:
    """Returns a generation that gives these frames, uint8 [samples v t h w c], chunk by chunk."""
    plan = plan_rollout("memory", num_frames_px=video.shape[2], context_px=context_px, trained=TRAINED)
    names = tuple(str(sample) for sample in range(len(video)))
    request = Request(plan, video[0, :, :context_px], None, None, None, names, 0, ())

    def chunks():  # noqa: ANN202
        for index in range(plan.num_chunks):
            start, stop = plan.frames_of(index)
            given = min(max(plan.start_px - start, 0), stop - start)
            yield VideoChunk(index, start, video[:, :, start:stop], given)

    return Generation(request, chunks())


def grey(values: list[float], views: int = 1) -> np.ndarray:
    """Returns flat frames of these brightnesses, uint8 [1 v t 16 16 3]."""
    frames = np.round(np.array(values) * 255).astype(np.uint8)
    return np.broadcast_to(frames[None, None, :, None, None, None], (1, views, len(values), 16, 16, 3)).copy()


def write(video: np.ndarray, truth: np.ndarray | None, folder: Path, **settings: object) -> list[SampleReport]:
    generation = made(video)
    told = None if truth is None else truth_of(truth, BlockCode(), generation.request.plan, torch.device("cpu"))
    folders = [folder / f"s{index}" for index in range(len(video))]
    return write_rollout(generation, folders, fps=Fraction(10), truth=told, **settings)  # type: ignore[arg-type]


def test_figures_of_known_videos(tmp_path: Path) -> None:
    truth = grey([0.5] * 33)
    video = grey([0.5] * 9 + [0.6] * 12 + [0.7] * 12)  # errors of 0.1 and 0.2 in chunks 1 and 2
    (report,) = write(video, truth[0], tmp_path)
    assert report.chunks == [1, 2]
    assert report.per_chunk["psnr_db"] == pytest.approx([20, 13.98], abs=0.2)  # in steps of 1/255
    assert report.per_chunk["copy_last_psnr_db"] == pytest.approx([100, 100])
    assert report.per_chunk["vae_ceiling_psnr_db"][0] > 40
    assert report.per_chunk["mean_colour_distance"] == pytest.approx([0.1, 0.2], abs=0.005)
    # a jump of 0.1 at the beginning of each chunk of 12 frames, nothing else changes
    assert report.per_chunk["frame_change"] == pytest.approx([0.1 / 12] * 2, rel=0.05)
    assert report.per_chunk["true_frame_change"] == [0, 0]
    assert json.loads((tmp_path / "s0" / "metrics.json").read_text())["per_chunk"]["chunk"] == [1, 2]
    assert np.abs(read_video(tmp_path / "s0" / "output.mp4")[20].astype(int) - 153).max() < 4


def test_the_looks_of_a_long_video_are_told_of_its_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (1, 1, 141, 16, 16, 3), np.uint8)
    video = truth.copy()
    video[:, :, 45:] = video[:, :, 45:46]  # a still from there on
    (report,) = write(video, truth[0], tmp_path, only_eval=True)
    metrics = report.metrics()
    assert metrics["late_frame_change_ratio"] == pytest.approx(0, abs=0.001)
    assert metrics["frame_change_ratio"] > 0.2
    assert metrics["late_sharpness_ratio"] == pytest.approx(1, abs=0.1)
    assert not list(tmp_path.rglob("*.mp4"))
    (short,) = write(truth[:, :, :33], truth[0, :, :33], tmp_path / "short", only_eval=True)
    assert "late_frame_change_ratio" not in short.metrics()


def test_drift_is_of_the_mean_colour_of_the_whole_end(tmp_path: Path) -> None:
    """Chunks that are off by turns, up and down, are 0.2 away each, and do not drift."""
    levels = [0.5] * 9 + [0.7 if chunk % 2 else 0.3 for chunk in range(10) for _ in range(12)]
    (report,) = write(grey(levels), grey([0.5] * 129)[0], tmp_path, only_eval=True)
    metrics = report.metrics()
    assert metrics["late_mean_colour_distance"] == pytest.approx(0.2, abs=0.005)
    assert metrics["late_colour_drift"] == pytest.approx(0.2 / 7, abs=0.005)  # 4 of the last 7 chunks against 3


def test_ratios_of_a_run_are_of_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 255, (1, 1, 21, 16, 16, 3), np.uint8)
    flat = (127 + (sharp.astype(int) - 127) // 20).astype(np.uint8)
    reports = [
        write(video, truth[0], tmp_path / name, only_eval=True)[0]
        for name, video, truth in (("a", sharp, sharp), ("b", sharp, flat))
    ]
    assert summary(reports, {})["metrics"]["sharpness_ratio"] == pytest.approx(2 / 1.05, abs=0.05)  # not (1 + 20) / 2


def test_truth_may_be_shorter_than_the_video(tmp_path: Path) -> None:
    (report,) = write(grey([0.5] * 45), grey([0.5] * 26)[0], tmp_path, only_eval=True)
    assert report.chunks == [1, 2, 3]
    assert len(report.per_chunk["psnr_db"]) == 2
    assert len(report.per_chunk["vae_ceiling_psnr_db"]) == 1  # of chunk 2 only a part can be encoded
    assert "sharpness_ratio" not in report.metrics()


def test_views_stand_side_by_side_and_samples_apart(tmp_path: Path) -> None:
    video = np.concatenate([grey([0.2] * 21, views=3), grey([0.8] * 21, views=3)])
    reports = write(video, None, tmp_path)
    info = probe_video(tmp_path / "s1" / "output.mp4")
    assert (info.height, info.width, info.num_frames) == (16, 3 * 16 + 2 * 4, 21)
    result = summary(reports, {"seed": 0})
    assert result["metrics"]["num_videos"] == 2
    assert result["per_chunk"]["chunk"] == [1]
    assert result["provenance"] == {"seed": 0}


def test_actions_are_drawn_below_the_frames_that_they_produced(tmp_path: Path) -> None:
    actions = np.zeros((21, 2), np.float32)
    actions[12:, 0] = 1  # a button that is pressed from frame 12 on, in the middle of the second chunk
    plain = made(grey([0.5] * 21))
    request = dataclasses.replace(plain.request, actions=actions)
    (report,) = write_rollout(
        Generation(request, plain), [tmp_path / "s0"], fps=Fraction(10), action_names=("forward", "turn")
    )
    assert report.chunks == [1]
    shown = read_video(tmp_path / "s0" / "output_actions.mp4").astype(int)
    top = 160  # the tile is enlarged to 160 pixels, the panel stands below
    assert shown.shape[0] == 21
    assert shown.shape[1] > top
    panel = shown[:, top:]
    assert np.abs(panel[:12] - panel[0]).mean() < 3
    assert np.abs(panel[12:] - panel[12]).mean() < 3
    assert np.abs(panel[12] - panel[11]).max() > 100
    write(grey([0.5] * 21), None, tmp_path / "plain")
    assert not (tmp_path / "plain" / "s0" / "output_actions.mp4").exists()


def test_views_have_figures_of_their_own_and_memory_is_noted(tmp_path: Path) -> None:
    video = grey([0.5] * 201, views=2)
    truth = video[0].copy()
    truth[1] += 25
    (report,) = write(video, truth, tmp_path, layout=ViewLayout(("front", "rear")))
    metrics = report.metrics()
    assert metrics["psnr_db@front"] == 100
    assert metrics["psnr_db@rear"] == pytest.approx(-20 * np.log10(25 / 255))
    assert not (tmp_path / "s0" / "comparison.gif").exists()  # too wide
    held = json.loads((tmp_path / "s0" / "metrics.json").read_text())["per_chunk"]["resident_mib"]
    assert len(held) == len(report.chunks)
    assert all(50 < value < 100_000 for value in held)
    assert re.fullmatch(r"resident memory \d+ MiB at chunk 5, \d+ at 16", report.memory_line() or "")
    assert SampleReport("short").memory_line() is None


def test_a_run_is_the_mean_of_its_videos() -> None:
    first, second = SampleReport("a"), SampleReport("b")
    first.add(1, 12, {"psnr_db": 20.0})
    first.add(2, 12, {"psnr_db": 10.0})
    second.add(1, 12, {"psnr_db": 30.0})
    result = summary([first, second], {})
    assert result["per_chunk"] == {"chunk": [1, 2], "psnr_db": [25.0, 10.0]}
    assert result["metrics"]["psnr_db"] == pytest.approx((15 + 30) / 2)


def test_an_error_in_the_middle_leaves_no_half_video(tmp_path: Path) -> None:
    generation = made(grey([0.5] * 33))

    def broken():  # noqa: ANN202
        yield next(generation)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_rollout(Generation(generation.request, broken()), [tmp_path / "s0"], fps=Fraction(10))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
