"""The discriminator of decoded pictures."""

from __future__ import annotations

import pytest
import torch

from longtake.encoders.discriminator import (
    PatchDiscriminator,
    decoder_loss,
    discriminator_loss,
    pictures_of,
    slope_penalty,
)


def test_pictures_are_four_frames_in_a_row() -> None:
    video = torch.arange(9.0)[None, :, None, None, None].expand(2, 9, 3, 4, 4)
    pictures = pictures_of(video, 3)
    assert pictures.shape == (2, 12, 4, 4)
    assert pictures[0, :, 0, 0].tolist() == [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert pictures_of(video, 1)[1, ::3, 0, 0].tolist() == [5, 6, 7, 8]  # the second picture of the first clip
    with pytest.raises(AssertionError, match="no 4 frames from 6 on"):
        pictures_of(video, 6)


def test_a_score_a_patch_of_4_pixels() -> None:
    assert PatchDiscriminator(8)(torch.randn(3, 12, 16, 24)).shape == (3, 1, 4, 6)


def test_detail_is_what_a_blur_takes_away() -> None:
    torch.manual_seed(0)
    network, flat = PatchDiscriminator(8, detail=100.0), torch.full((1, 12, 8, 8), 0.3)
    plain = PatchDiscriminator(8, detail=0.0)
    plain.load_state_dict(network.state_dict())
    assert torch.allclose(network(flat), plain(flat), atol=1e-4)  # a flat picture has none
    ripple = flat + 0.01 * (torch.arange(8) % 2)
    assert (network(ripple) - network(flat)).abs().max() > 10 * (plain(ripple) - plain(flat)).abs().max()


def test_the_losses_are_hinges() -> None:
    unsure = torch.zeros(4)
    assert discriminator_loss(unsure, unsure) == 2
    assert discriminator_loss(torch.full((4,), 3.0), torch.full((4,), -3.0)) == 0
    assert discriminator_loss(torch.full((4,), -1.0), torch.full((4,), 1.0)) == 4
    assert decoder_loss(torch.tensor([1.0, 3.0])) == -2


class Line(torch.nn.Module):
    """A score a pixel: `slope` times its first channel."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.slope * pictures[:, :1]


def test_the_slope_of_a_line_is_its_slope() -> None:
    line = Line(3.0)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = slope_penalty(line, torch.randn(2, 12, 8, 8))
    assert float(penalty) == pytest.approx(9.0)
    penalty.backward()
    assert float(line.slope.grad) == pytest.approx(6.0)
