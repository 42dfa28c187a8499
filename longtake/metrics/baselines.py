"""What a prediction has to beat: repeating the last frame, as it is or blurred.

A blurred copy is the better guess wherever things move, because it is wrong by less: a model whose mean prediction does
not beat it has learned nothing about motion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.metrics.frames import psnr

BLURS = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def copy_last(context: Tensor, num_frames: int) -> Tensor:
    """Returns the last frame of `context` [b t c h w] repeated, [b num_frames c h w]."""
    return context[:, -1:].expand(-1, num_frames, -1, -1, -1)


def blurred(frames: Tensor, sigma: float) -> Tensor:
    """Returns frames [b t c h w] under a Gaussian blur of `sigma` pixels; borders repeat the edge."""
    if sigma == 0:
        return frames
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=frames.dtype, device=frames.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = frames.flatten(0, -3)[:, None]  # every channel is an image of its own
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None, :])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None])
    return flat.reshape(frames.shape)


def best_blur(pairs: Iterable[tuple[Tensor, Tensor]], sigmas: Sequence[float] = BLURS) -> float:
    """Returns the blur under which a copied last frame has the highest mean PSNR.

    Args:
        pairs: (context, truth) of clips that are not measured later, each [b t c h w].
        sigmas: blurs to try, in pixels.
    """
    totals = dict.fromkeys(sigmas, 0.0)
    for context, truth in pairs:
        for sigma in sigmas:
            last = blurred(context[:, -1:], sigma)
            totals[sigma] += float(psnr(copy_last(last, truth.shape[1]), truth).sum())
    return max(totals, key=lambda sigma: totals[sigma])
