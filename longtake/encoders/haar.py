"""The 3-D Haar wavelet as patches: blocks of pixels <-> channels, exactly invertible.

A level turns 2x2x2 blocks (time, height, width) into 8 numbers: mean, and differences along each set of axes (first
minus second), divided by 8. Letters LLL, LLH, LHL, ... name them, L for mean and H for difference, in the order time,
height, width. The next level does the same to all channels of the one before (a full packet). Channels of the result
count [letters of the last level, ..., letters of the first level, colour]. All levels together are one matrix.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patch(video: Tensor, levels: int, *, is_start: bool = True) -> Tensor:
    """Returns the wavelet coefficients of clips, float32 [n f h w c] with 8**levels channels a colour.

    Args:
        video: [n t c h w]; height and width are multiples of 2**levels. At a start t is 1 + k * 2**levels, and the
            first frame stands for a block of equal frames; else t is a multiple of 2**levels.
        levels: of the transform, 1 or more.
        is_start: whether the first frame begins a clip.
    """
    size, video = 2**levels, video.float()
    if is_start:
        video = torch.cat([video[:, :1].expand(-1, size - 1, -1, -1, -1), video], dim=1)
    blocks = rearrange(video, "n (f a) c (h b) (w d) -> n f h w c (a b d)", a=size, b=size, d=size)
    coefficients = _times(blocks, _matrix(levels).T)
    return rearrange(coefficients, "n f h w c k -> n f h w (k c)")


def unpatch(coefficients: Tensor, levels: int, *, is_start: bool = True) -> Tensor:
    """Returns the clips of wavelet coefficients, float32 [n t c h w]: what `patch` was given.

    Args:
        coefficients: [n f h w c].
        levels: of the transform.
        is_start: whether they begin a clip; then the first block gives one frame, its last.
    """
    size = 2**levels
    blocks = rearrange(coefficients.float(), "n f h w (k c) -> n f h w c k", k=8**levels)
    blocks = _times(blocks, 8**levels * _matrix(levels))
    video = rearrange(blocks, "n f h w c (a b d) -> n (f a) c (h b) (w d)", a=size, b=size, d=size)
    return video[:, size - 1 :] if is_start else video


def _times(blocks: Tensor, matrix: Tensor) -> Tensor:
    with torch.autocast(blocks.device.type, enabled=False):  # the transform is exact, whatever the network computes in
        return F.linear(blocks.contiguous(), matrix.T.to(blocks.device))


@cache
def _matrix(levels: int) -> Tensor:
    """Returns what turns a block of pixels into coefficients, [8**levels 8**levels], on the CPU.

    A pixel of a block is numbered by time, row, column; a coefficient by the letters of the last level first.
    """
    with torch.device("cpu"):  # whatever device is the default where it is first needed
        size, steps = 2**levels, torch.arange(2**levels)
        axis = torch.ones(size, size)  # [letters of one axis, last level first; place of a pixel]
        for level in range(levels):  # level 0 tells neighbours apart, and its letter counts least
            bit = (steps >> level) & 1
            axis = axis * torch.where(bit[:, None] * bit[None, :] > 0, -1.0, 1.0)
        joint = torch.einsum("xa,yb,zd->xyzabd", axis, axis, axis) / 8**levels
        # letters: one triple (time, height, width) for each level instead of all levels of an axis together
        joint = joint.reshape(*([2] * (3 * levels)), -1)
        order = [axis_index * levels + level for level in range(levels) for axis_index in range(3)]
        return joint.permute(*order, 3 * levels).reshape(8**levels, 8**levels).contiguous()
