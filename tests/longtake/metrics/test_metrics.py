"""Measures of frames on synthetic data with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from longtake.metrics.baselines import best_blur, blurred, copy_last
from longtake.metrics.bootstrap import bootstrap
from longtake.metrics.frames import change, mean_colour, psnr, sharpness, ssim, unit_frames
from longtake.metrics.motion import horizontal_shifts, turn_agreement


def smooth(b: int, t: int, height: int = 32, width: int = 48, seed: int = 0) -> Tensor:
    noise = torch.rand(b, t, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return blurred(noise, 1.5)


def moving(shifts: list[int], seed: int = 0) -> Tensor:
    """A picture that moves to the right by these whole pixels from frame to frame."""
    wide = blurred(torch.rand(1, 1, 3, 32, 400, generator=torch.Generator().manual_seed(seed)), 1.0)
    wide = (wide - wide.min()) / (wide.max() - wide.min())
    place, frames = 200, []
    for shift in [0, *shifts]:
        place -= shift
        frames.append(wide[..., place : place + 64])
    return torch.cat(frames, dim=1)


def test_frames_become_unit_floats_with_channels_before_rows() -> None:
    frames = np.zeros((2, 5, 4, 6, 3), np.uint8)
    frames[..., 1] = 255
    unit = unit_frames(frames)
    assert unit.shape == (2, 5, 3, 4, 6)
    assert mean_colour(unit).tolist() == [[0, 1, 0], [0, 1, 0]]


def test_psnr_and_ssim_are_those_of_torchmetrics_clip_by_clip() -> None:
    truth = smooth(3, 4)
    pred = (truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for clip in range(3):
        wanted = peak_signal_noise_ratio(pred[clip], truth[clip], data_range=1.0)
        assert psnr(pred, truth)[clip].item() == pytest.approx(wanted.item(), abs=1e-4)
        wanted = structural_similarity_index_measure(pred[clip], truth[clip], data_range=1.0)
        assert ssim(pred, truth)[clip].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_equal_frames_have_a_finite_psnr_and_a_known_error_a_known_one() -> None:
    truth = smooth(1, 2)
    assert psnr(truth, truth).item() == pytest.approx(100)
    assert psnr(truth * 0 + 0.6, truth * 0 + 0.5).item() == pytest.approx(20, abs=1e-5)


def test_ssim_works_on_frames_smaller_than_its_window() -> None:
    tiny = smooth(1, 2, 8, 6)
    assert ssim(tiny, tiny).item() == pytest.approx(1)


def test_sharpness_falls_with_blur_and_is_exact_on_stripes() -> None:
    truth = smooth(2, 3)
    values = [sharpness(blurred(truth, sigma)).mean().item() for sigma in (0, 0.5, 1, 2)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.6 * values[0]
    stripes = torch.zeros(1, 1, 3, 8, 8)
    stripes[..., ::2] = 1  # every neighbour across differs by 1, none down does
    assert sharpness(stripes).item() == pytest.approx(0.5)


def test_change_is_the_mean_step_and_zero_for_a_still() -> None:
    frames = torch.tensor([0.0, 0.25, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 4, 4)
    assert change(frames).item() == pytest.approx(0.25)
    assert change(frames[:, :1]).item() == 0


def test_copy_repeats_the_last_frame() -> None:
    context = smooth(2, 3)
    copied = copy_last(context, 4)
    assert copied.shape[:2] == (2, 4)
    assert all(torch.equal(copied[:, index], context[:, -1]) for index in range(4))


def test_blur_keeps_flat_pictures_and_the_mean() -> None:
    flat = torch.full((1, 1, 3, 9, 9), 0.3)
    assert torch.allclose(blurred(flat, 2.0), flat)
    dot = torch.zeros(1, 1, 1, 41, 41)
    dot[..., 20, 20] = 1
    spread = blurred(dot, 2.0)
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    variance = (spread[0, 0, 0].sum(0) * (torch.arange(41) - 20.0).square()).sum().item()
    assert math.sqrt(variance) == pytest.approx(2.0, rel=0.02)


def test_best_blur_is_none_for_stills_and_some_for_moving_pictures() -> None:
    still = smooth(4, 1)
    assert best_blur([(still, still.expand(-1, 6, -1, -1, -1))]) == 0
    moved = moving([4] * 8)
    assert best_blur([(moved[:, :1], moved[:, 1:])]) > 0.5


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        interval = bootstrap(rng.normal(1.0, 2.0, 40), resamples=500, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_is_seeded_and_paired_differences_are_narrower() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(20, 5, 64)
    ours = difficulty + 0.5 + rng.normal(0, 0.1, 64)
    first, again = bootstrap(ours - difficulty), bootstrap(ours - difficulty)
    assert first == again
    alone = bootstrap(ours)
    assert first.high - first.low < 0.1 * (alone.high - alone.low)
    assert first.low < 0.5 < first.high


@pytest.mark.parametrize("shift", [-6, -3, -1, 0, 1, 2, 5])
def test_phase_correlation_finds_whole_shifts(shift: int) -> None:
    found = horizontal_shifts(moving([shift] * 4))
    assert found.shape == (1, 4)
    assert torch.allclose(found, torch.full_like(found, shift), atol=0.35)


def test_phase_correlation_stands_noise_and_blur() -> None:
    frames = blurred(moving([-3] * 4), 1.0)
    frames = frames + 0.02 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    assert horizontal_shifts(frames).mean().item() == pytest.approx(-3, abs=0.5)


def test_a_turn_to_the_right_agrees_with_a_picture_that_moves_left() -> None:
    frames = torch.cat([moving([-3, -2, -4]), moving([-3, -2, -4]), moving([-3, -2, -4])])
    turns = torch.tensor([[5.0, 4.0, 6.0], [-5.0, -4.0, -6.0], [0.5, 0.0, -0.4]])
    agrees = turn_agreement(frames, turns, least_turn=3.0)
    assert agrees[0] == 1
    assert agrees[1] == 0
    assert torch.isnan(agrees[2])
