"""Measures of video frames, one number a clip.

Frames are float in [0, 1], [b t c h w], RGB; a number of a clip is the mean over its frames unless said otherwise.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

_LUMA = (0.299, 0.587, 0.114)
_LEAST_ERROR = 1e-10  # 100 dB: equal frames have a finite PSNR, so that it can be averaged and written as JSON
_SSIM_WINDOW = 11


def unit_frames(frames: np.ndarray | Tensor) -> Tensor:
    """Returns uint8 frames [... h w c] as float in [0, 1], [... c h w]."""
    return torch.as_tensor(frames).movedim(-1, -3).float() / 255


def psnr(pred: Tensor, truth: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each clip in dB, from the squared error over all of its frames, [b]."""
    error = (pred.double() - truth.double()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=_LEAST_ERROR).log10()


def ssim(pred: Tensor, truth: Tensor) -> Tensor:
    """Returns the structural similarity of each clip, [b]; the window shrinks with frames below 11 pixels."""
    b, t = pred.shape[:2]
    window = min(_SSIM_WINDOW, *pred.shape[-2:])
    values = structural_similarity_index_measure(
        pred.flatten(0, 1).float(),
        truth.flatten(0, 1).float(),
        gaussian_kernel=window == _SSIM_WINDOW,
        kernel_size=window - (window + 1) % 2,
        data_range=1.0,
        reduction="none",
    )
    assert isinstance(values, Tensor), type(values)
    return values.reshape(b, t).double().mean(1)


def luma(frames: Tensor) -> Tensor:
    """Returns the brightness of every pixel, [b t h w]."""
    return (frames * frames.new_tensor(_LUMA)[:, None, None]).sum(-3)


def sharpness(frames: Tensor) -> Tensor:
    """Returns the mean difference in brightness between neighbouring pixels of each clip, [b]."""
    bright = luma(frames.double())
    across = bright.diff(dim=-1).abs().flatten(1).mean(1)
    down = bright.diff(dim=-2).abs().flatten(1).mean(1)
    return (across + down) / 2


def change(frames: Tensor) -> Tensor:
    """Returns the mean difference between a frame and the next one of each clip, [b]; 0 for one frame."""
    if frames.shape[1] < 2:
        return frames.new_zeros(len(frames), dtype=torch.float64)
    return frames.double().diff(dim=1).abs().flatten(1).mean(1)


def mean_colour(frames: Tensor) -> Tensor:
    """Returns the mean colour of each clip, [b c]."""
    return frames.double().mean(dim=(1, 3, 4))
