"""A basis of latents in which the same error costs about the same number of pixels in every direction.

A first stage that begins as principal components codes the brightness of a block and its faintest texture as channels
of equal variance, and a diffusion model would spend as much on one as on the other. Here each channel is scaled by what
a change of it does to the pixels; a rotation then spreads the large and the small directions evenly over the channels,
so that the usual division by each channel's deviation does not undo it. Reconstructions stay what they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.encoders.video_vae import VideoVAENetwork

_STEP = 0.3  # of a channel's deviation: the change whose effect on the pixels is measured


@dataclass(frozen=True)
class LatentBasis:
    """New raw latents are `matrix` @ old raw latents.

    Attributes:
        matrix: float64 [c c].
        mean: of the new latents [c].
        std: of the new latents [c], the same for all channels.
    """

    matrix: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def measured_basis(network: VideoVAENetwork, video: Tensor) -> LatentBasis:
    """Returns the basis for a network, measured on clips [n t c h w] in [-1, 1]."""
    raw = network.encode(video).float()
    cells = raw.movedim(2, -1).flatten(0, -2).double()
    mean, covariance = cells.mean(0), cells.T.cov()
    plain, _ = network.decode(raw)
    cost = torch.empty(network.channels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for channel in range(network.channels):
        step = _STEP * covariance[channel, channel].sqrt()
        noise = torch.randn(raw[:, :, channel].shape, generator=generator).to(raw)
        changed = raw.clone()
        changed[:, :, channel] += noise * step.to(raw)
        moved, _ = network.decode(changed)
        cost[channel] = ((moved - plain).double().square().mean() / step.square()).cpu()
    return balanced_basis(mean.cpu(), covariance.cpu(), cost)


def balanced_basis(mean: Tensor, covariance: Tensor, cost: Tensor) -> LatentBasis:
    """Returns the basis for latents of a mean [c] and covariance [c c], where a change of 1 in a channel costs `cost`
    [c] (mean square of pixels)."""
    scale = cost.double().clamp(min=1e-12).sqrt()
    scaled = scale[:, None] * covariance.double() * scale
    scale = scale / (scaled.trace() / len(cost)).sqrt()
    matrix = equalising_rotation(scale[:, None] * covariance.double() * scale) * scale
    return LatentBasis(matrix, matrix @ mean.double(), torch.ones(len(cost), dtype=torch.float64))


def equalising_rotation(covariance: Tensor) -> Tensor:
    """Returns the rotation R [c c] for which all diagonal entries of R @ covariance @ R^T are equal.

    Each step turns the channels of most and least variance until the first has the mean (Bendel and Mickey 1978).
    """
    count = len(covariance)
    rotation, turned = torch.eye(count, dtype=torch.float64), covariance.double().clone()
    mean = float(turned.trace()) / count
    for _ in range(count - 1):
        variances = turned.diagonal()
        high, low = int(variances.argmax()), int(variances.argmin())
        most, least, shared = float(turned[high, high]), float(turned[low, low]), float(turned[high, low])
        if most - least < 1e-9 * mean:
            break
        # tangent t of the angle: most - 2 t shared + t^2 least = mean (1 + t^2)
        a, b, c = least - mean, -shared, most - mean
        tangent = (-b + math.copysign(math.sqrt(max(0.0, b * b - a * c)), -b or 1.0)) / a if a else -c / (2 * b)
        cosine = 1 / math.hypot(1.0, tangent)
        step = torch.eye(count, dtype=torch.float64)
        step[high, high] = step[low, low] = cosine
        step[high, low], step[low, high] = -tangent * cosine, tangent * cosine
        rotation, turned = step @ rotation, step @ turned @ step.T
    return rotation


@torch.no_grad()
def change_basis(network: VideoVAENetwork, basis: LatentBasis) -> None:
    """Puts a basis into the first and last layers of a network; what it makes of clips stays the same."""
    inverse = torch.linalg.inv(basis.matrix)
    for layer in (network.encoder.linear, network.encoder.last):
        layer.weight.copy_(torch.einsum("ij,j...->i...", basis.matrix, layer.weight.double()))
        layer.bias.copy_(basis.matrix @ layer.bias.double())  # type: ignore[union-attr]
    for layer in (network.decoder.linear, network.decoder.first):
        layer.weight.copy_(torch.einsum("oi...,ij->oj...", layer.weight.double(), inverse))
    network.mean.copy_(basis.mean)
    network.std.copy_(basis.std)
