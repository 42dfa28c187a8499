"""Whether a video made chunk after chunk jumps at the borders between chunks.

    change    .1 .1 .1 .1 | .3  .1 .1 .1 | .3  .1 .1 .1        at borders .3, inside .1: three times as much
    truth     .1 .1 .2 .1 | .1  .1 .1 .1 | .1  .1 .1 .1        about as much at the same places

The ratio is taken relative to that of the truth at the same places: a clip may happen to turn faster just there. 1 = no
seam.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longtake.metrics.bootstrap import Interval, bootstrap_of


def frame_changes(frames: Tensor) -> Tensor:
    """Returns the mean difference of each frame but the first to the one before, [b t-1], of frames [b t c h w]."""
    return torch.stack([(one - two).abs().flatten(1).mean(1) for one, two in _pairs(frames)], dim=1)


def border_and_inside(frames: Tensor, borders: Sequence[int], first: int) -> Tensor:
    """Returns the mean frame difference of each clip across borders and inside of chunks, [b 2].

    Args:
        frames: float in [0, 1], [b t c h w].
        borders: numbers of the frames that a chunk begins with, all after `first`.
        first: number of the first predicted frame. Its difference to a given one is neither: it says how good the
            encoder is.

    Raises:
        ValueError: there is no border, or nothing inside of chunks.
    """
    changes = frame_changes(frames)
    across = torch.zeros(frames.shape[1], dtype=torch.bool)
    across[list(borders)] = True
    inside = ~across
    inside[: first + 1] = False
    if not borders or min(borders) <= first or not inside.any():
        raise ValueError(
            f"borders {list(borders)} of {frames.shape[1]} frames, predicted from {first} on; expected borders after "
            "that, and frames between them"
        )
    return torch.stack([changes[:, where[1:]].mean(1) for where in (across, inside)], dim=1)


def seam_parts(pred: Tensor, truth: Tensor, borders: Sequence[int], first: int) -> np.ndarray:
    """Returns what `seam` is made of, [b 4]: of the prediction at borders and inside, and of the truth.

    Arguments as for `border_and_inside`; `truth` has the shape of `pred`.

    Raises:
        ValueError: see `border_and_inside`; or a clip is still inside of chunks, so that there is nothing to compare
            its borders with.
    """
    parts = torch.cat([border_and_inside(frames, borders, first) for frames in (pred, truth)], dim=1).numpy()
    still = np.flatnonzero((parts[:, [1, 2, 3]] == 0).any(axis=1))
    if len(still):
        raise ValueError(f"clips {still.tolist()} do not change from frame to frame; expected video that moves")
    return parts


def seam(parts: np.ndarray) -> Interval:
    """Returns the seam of some clips, 1 = none, with its interval over clips, from `seam_parts` [b 4]."""
    return bootstrap_of(parts, seam_of_means)


def seam_of_means(parts: np.ndarray) -> np.ndarray:
    """Returns (border / inside) over (border / inside) of the truth, [...] from [... 4]."""
    border, inside, true_border, true_inside = np.moveaxis(parts, -1, 0)
    return (border / inside) / (true_border / true_inside)


def _pairs(frames: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns neighbouring frames in float64, two at a time: a long video is not copied as a whole."""
    return [(frames[:, t].double(), frames[:, t - 1].double()) for t in range(1, frames.shape[1])]
