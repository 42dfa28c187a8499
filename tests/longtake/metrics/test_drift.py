"""Drift of videos that brighten and blur at known rates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.metrics.drift import colour_distances, colour_drift, frame_sharpness, sharpness_drift, slopes

STARTS = (0, 4, 16, 28, 40, 52, 64, 76, 88)
FRAMES = 100


def still(clips: int = 4) -> Tensor:
    """Returns clips of one picture each, [b t c h w], mean brightness 0.3."""
    picture = torch.rand(clips, 1, 3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picture = 0.3 + 0.2 * (picture - picture.mean((3, 4), keepdim=True))
    return picture.repeat(1, FRAMES, 1, 1, 1)


def along() -> Tensor:
    return torch.arange(FRAMES, dtype=torch.float64)[:, None, None, None]


def test_a_line_has_its_slope() -> None:
    rows = torch.stack([3 + 0.25 * torch.arange(50.0), -2.0 * torch.arange(50.0), torch.ones(50)])
    assert slopes(rows).tolist() == pytest.approx([0.25, -2, 0], abs=1e-6)


def test_a_video_that_brightens_has_the_known_slope() -> None:
    truth = still()
    drift = colour_drift(truth + 0.002 * along(), truth, STARTS)
    assert drift.slope.mean == pytest.approx(0.2)
    assert drift.late.mean == pytest.approx(0.002 * (19 + 99) / 2)  # frames 19 to 99 are the last 81
    assert drift.per_chunk[:2] == pytest.approx((0.002 * 1.5, 0.002 * 9.5))
    assert len(drift.per_chunk) == len(STARTS)
    assert drift.slope.low == pytest.approx(drift.slope.high)
    assert colour_drift(truth - 0.001 * along(), truth, STARTS).slope.mean == pytest.approx(0.1)  # darker is as far


def test_the_worst_channel_counts_and_a_change_of_the_truth_is_no_drift() -> None:
    truth = still() + 0.001 * along()
    assert colour_drift(truth, truth, STARTS).late.mean == 0
    red = truth.clone()
    red[:, :, 0] += 0.1
    red[:, :, 2] -= 0.04
    assert colour_distances(red, truth).flatten().tolist() == pytest.approx([0.1] * 4 * FRAMES)


def test_a_video_that_loses_contrast_has_the_known_slope() -> None:
    truth = still()
    mean = truth.mean((3, 4), keepdim=True)
    drift = sharpness_drift(mean + (truth - mean) * (1 - 0.004 * along()), truth, STARTS)
    assert drift.slope.mean == pytest.approx(-0.4)
    assert drift.late.mean == pytest.approx(1 - 0.004 * 59)
    assert drift.per_chunk[0] == pytest.approx(1 - 0.004 * 1.5)
    assert sum(drift.of_clips) / 4 == pytest.approx(1 - 0.004 * 59)


def test_sharpness_that_falls_in_the_truth_as_well_is_no_drift() -> None:
    mean = still().mean((3, 4), keepdim=True)
    truth = mean + (still() - mean) * (1 - 0.004 * along())
    drift = sharpness_drift(truth, truth, STARTS)
    assert (drift.slope.mean, drift.late.mean) == pytest.approx((0, 1))
    assert frame_sharpness(truth).shape == (4, FRAMES)
    assert drift.to_json()["last_81_frames"]["mean"] == pytest.approx(1)
