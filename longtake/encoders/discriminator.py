"""Tells real pictures from decoded ones, patch by patch, so that a decoder learns what real detail looks like.

A patch discriminator (Isola et al. 2017) on pictures of four frames in a row: it sees how detail moves, not only what
it looks like. What a squared error leaves out is faint and fine, a hundredth of the contrast; beside the frames the
discriminator is therefore given what a small blur takes from them, made larger. Without that it told nothing apart in
300 steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.encoders.video_vae import RATIO_TIME

_CHANNELS = 3 * RATIO_TIME


class PatchDiscriminator(nn.Module):
    """Scores of patches: high for real ones.

    Args:
        width: channels at half the pixels; twice as many at a quarter.
        detail: factor on what a 3x3 blur takes away, which stands beside the frames.
    """

    def __init__(self, width: int = 64, detail: float = 4.0) -> None:
        super().__init__()
        self.detail = detail
        self.layers = nn.ModuleList(
            (
                nn.Conv2d(2 * 4 * _CHANNELS, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            )
        )
        self.score = nn.Conv2d(2 * width, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns scores [m 1 h/4 w/4] of pictures of four frames [m 12 h w] in [-1, 1]."""
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = torch.cat([pictures, self.detail * (pictures - blurred)], dim=1)
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.score(x)


def pictures_of(video: Tensor, first: int) -> Tensor:
    """Returns the frames of clips [n t c h w] from `first` on, four by four, as pictures [m 12 h w]."""
    whole = (video.shape[1] - first) // RATIO_TIME
    assert whole > 0, f"clips of {video.shape[1]} frames have no {RATIO_TIME} frames from {first} on"
    groups = video[:, first : first + whole * RATIO_TIME].unflatten(1, (whole, RATIO_TIME))
    return groups.flatten(0, 1).flatten(1, 2)


def discriminator_loss(real: Tensor, decoded: Tensor) -> Tensor:
    """Returns the hinge loss of scores (Lim and Ye 2017): 2 where nothing is told apart, 0 at best."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + decoded.float()).mean()


def slope_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Returns the mean squared slope of a patch's score at real pictures [m 12 h w] (R1, Mescheder et al. 2018).

    It keeps the discriminator from running away from the decoder: scores that grow without bound teach nothing.
    """
    with torch.autocast(real.device.type, enabled=False):  # a slope of slopes needs the digits
        pictures = real.detach().float().requires_grad_(True)
        scores = discriminator(pictures)
        (slopes,) = torch.autograd.grad(scores.sum(), pictures, create_graph=True)
    return slopes.square().sum() / scores.numel()


def decoder_loss(decoded: Tensor) -> Tensor:
    """Returns what a decoder lowers by making its pictures look real to the discriminator."""
    return -decoded.float().mean()
