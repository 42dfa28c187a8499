"""The wavelet: its constants and channel order against plain convolutions, and that it is undone exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.encoders.haar import patch, unpatch


def convolved(x: Tensor) -> Tensor:
    """Returns one level as the released code states it: strided correlations on [n c t h w], axis after axis."""
    low, high = torch.tensor([0.5, 0.5]).sqrt(), torch.tensor([0.5, 0.5]).sqrt() * torch.tensor([1, -1])
    for axis in (2, 3, 4):
        kernel_shape = [1, 1, 1, 1, 1]
        kernel_shape[axis] = 2
        stride = [2 if axis == other else 1 for other in (2, 3, 4)]
        width = x.shape[1]
        halves = [
            F.conv3d(x, kernel.reshape(kernel_shape).repeat(width, 1, 1, 1, 1), stride=stride, groups=width)
            for kernel in (low, high)
        ]
        # letters of later axes count less, channels of the input least
        if axis == 2:
            parts = halves
        else:
            groups = 2 if axis == 3 else 4
            split = [half.chunk(groups, dim=1) for half in halves]
            parts = [split[letter][group] for group in range(groups) for letter in (0, 1)]
        x = torch.cat(parts, dim=1)
    return x / (2 * 2**0.5)


def random_clips(frames: int, size: int = 16) -> Tensor:
    return torch.randn(2, frames, 3, size, size + 8, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("levels", [1, 2])
def test_it_is_the_released_packet_transform(levels: int) -> None:
    video, size = random_clips(17), 2**levels
    grouped = torch.cat([video[:, :1].repeat(1, size, 1, 1, 1), video[:, 1:]], dim=1).transpose(1, 2)
    expected = grouped
    for _ in range(levels):
        expected = convolved(expected)
    found = patch(video, levels)
    assert found.shape[-1] == 3 * 8**levels
    torch.testing.assert_close(found.permute(0, 4, 1, 2, 3), expected, rtol=1e-5, atol=1e-6)


def test_the_first_channels_are_means_of_blocks() -> None:
    video = random_clips(17)
    found = patch(video, 2)
    assert found.shape == (2, 5, 4, 6, 192)
    torch.testing.assert_close(found[:, 0, 0, 0, :3], video[:, 0, :, :4, :4].mean((2, 3)))
    torch.testing.assert_close(found[:, 1, 0, 0, :3], video[:, 1:5, :, :4, :4].mean((1, 3, 4)))


@pytest.mark.parametrize(("axis", "letter"), [("time", 4), ("height", 2), ("width", 1)])
def test_a_step_along_one_axis_is_in_the_channel_of_that_axis(axis: str, letter: int) -> None:
    video = torch.zeros(1, 5, 3, 4, 4)
    index = {
        "time": (slice(None), slice(3, None)),
        "height": (..., slice(2, None), slice(None)),
        "width": (..., slice(2, None)),
    }
    video[index[axis]] = 1.0
    last = patch(video, 2)[0, 1, 0, 0].reshape(8, 8, 3)  # letters of level 2, letters of level 1, colour
    expected = torch.zeros(8, 8, 3)
    expected[0, 0], expected[letter, 0] = 0.5, -0.5  # first minus second half
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_it_is_undone(levels: int, frames: int) -> None:
    video = random_clips(frames)
    coefficients = patch(video, levels)
    assert coefficients.shape[1] == 1 + (frames - 1) // 2**levels
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing
        again = unpatch(patch(video, levels), levels)
    torch.testing.assert_close(again, video, rtol=0, atol=5e-6)


def test_pieces_are_transformed_alike() -> None:
    video = random_clips(17)
    whole = patch(video, 2)
    pieces = [patch(video[:, :1], 2), patch(video[:, 1:9], 2, is_start=False), patch(video[:, 9:], 2, is_start=False)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    frames = [unpatch(whole[:, :2], 2), unpatch(whole[:, 2:], 2, is_start=False)]
    torch.testing.assert_close(torch.cat(frames, dim=1), video, rtol=0, atol=5e-6)
