"""How far the picture moved to the side from frame to frame, by phase correlation (Kuglin and Hines 1975)."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.metrics.frames import luma

_ROWS = 2  # largest vertical shift that is looked at, in pixels
_BAND = 0.25  # standard deviation of the weight over frequencies, in cycles a pixel: fine noise counts less


def horizontal_shifts(frames: Tensor) -> Tensor:
    """Returns by how many pixels the picture moved to the right from each frame to the next, [b t-1].

    A turn of the camera to the right moves the picture to the left, so it gives negative numbers.

    Args:
        frames: float in [0, 1], [b t c h w].
    """
    bright = luma(frames.double())
    height, width = bright.shape[-2:]
    # Without a window the borders, which stay where they are, win over what moved.
    window = torch.hann_window(height, periodic=False, dtype=torch.float64)[:, None] * torch.hann_window(
        width, periodic=False, dtype=torch.float64
    )
    centred = (bright - bright.mean(dim=(-2, -1), keepdim=True)) * window.to(bright.device)
    spectrum = torch.fft.rfft2(centred)
    cross = spectrum[:, 1:] * spectrum[:, :-1].conj()
    cross = cross / cross.abs().clamp(min=1e-12)
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    across = torch.fft.rfftfreq(width, dtype=torch.float64)
    weight = torch.exp(-(down.square() + across.square()) / (2 * _BAND**2)).to(bright.device)
    surface = torch.fft.irfft2(cross * weight, s=(height, width))
    rows = torch.arange(-_ROWS, _ROWS + 1, device=surface.device) % height
    line = surface.index_select(-2, rows).amax(-2)
    return _peak(line)


def _peak(line: Tensor) -> Tensor:
    """Returns where the maximum of the cyclic lines [... w] lies, in [-w/2, w/2], between pixels by a parabola."""
    width = line.shape[-1]
    index = line.argmax(-1, keepdim=True)
    left, here, right = (line.gather(-1, (index + offset) % width) for offset in (-1, 0, 1))
    curve = left - 2 * here + right
    part = torch.where(curve < 0, (left - right) / (2 * curve.clamp(max=-1e-12)), torch.zeros_like(curve))
    place = index + part.clamp(-0.5, 0.5)
    return torch.where(place > width / 2, place - width, place).squeeze(-1)


def turn_agreement(frames: Tensor, turns: Tensor, least_turn: float) -> Tensor:
    """Returns for each clip whether the picture moved against the commanded turn: 1 yes, 0 no, NaN where none was.

    Args:
        frames: [b t c h w], the last frame before the turns first.
        turns: what was commanded for each of the later frames, positive to the right, [b t-1].
        least_turn: clips whose turns sum to less than this in magnitude do not count.
    """
    total, moved = turns.double().sum(1), horizontal_shifts(frames).sum(1)
    agrees = (torch.sign(moved) == -torch.sign(total)).double()
    return torch.where(total.abs() >= least_turn, agrees, torch.full_like(agrees, float("nan")))
