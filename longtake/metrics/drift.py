"""How colours and sharpness of a long rollout leave those of the truth: how far at the end, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.metrics.bootstrap import Interval, bootstrap, bootstrap_of, ratio_of_means
from longtake.metrics.frames import sharpness

LATE_FRAMES = 81
"""Frames at the end of a rollout, where a collapse shows."""
SLOPE_FRAMES = 100
"""A slope is the change over this many frames, so that rollouts with chunks of different lengths compare."""


@dataclass(frozen=True)
class Drift:
    """A figure along a rollout.

    Attributes:
        late: over the last 81 frames.
        slope: its change over 100 frames, a line fitted to all predicted frames.
        per_chunk: its mean over clips in each chunk.
        of_clips: `late` of each clip by itself.
    """

    late: Interval
    slope: Interval
    per_chunk: tuple[float, ...]
    of_clips: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON."""
        return {
            "last_81_frames": self.late.to_json(),
            "slope_100_frames": self.slope.to_json(),
            "per_chunk": list(self.per_chunk),
            "of_clips": list(self.of_clips),
        }


def colour_distances(pred: Tensor, truth: Tensor) -> Tensor:
    """Returns how far the mean colour of each frame is from the true one, in its worst channel, 0 to 1, [b t].

    Args:
        pred: float in [0, 1], [b t c h w].
        truth: as `pred`.
    """
    pairs = zip(pred.unbind(1), truth.unbind(1), strict=True)
    means = [one.double().mean((2, 3)) - two.double().mean((2, 3)) for one, two in pairs]
    return torch.stack(means, dim=1).abs().amax(-1)


def frame_sharpness(frames: Tensor) -> Tensor:
    """Returns the sharpness of each frame, [b t], of frames [b t c h w]."""
    return torch.stack([sharpness(frame[:, None]) for frame in frames.unbind(1)], dim=1)


def slopes(values: Tensor) -> Tensor:
    """Returns the slope of the line fitted to each row by least squares, a step, [b], of values [b t], t > 1."""
    values = values.double()
    steps = torch.arange(values.shape[1], dtype=torch.float64) - (values.shape[1] - 1) / 2
    return (values @ steps) / steps.square().sum()


def colour_drift(pred: Tensor, truth: Tensor, starts: Sequence[int]) -> Drift:
    """Returns the distance of mean colours from the true ones (see `colour_distances`).

    Args:
        pred: predicted frames, float in [0, 1], [b t c h w].
        truth: the true ones.
        starts: numbers of the frames that chunks begin with, counted from the first predicted one, 0 first.
    """
    distances = colour_distances(pred, truth)
    late = distances[:, -LATE_FRAMES:].mean(1).numpy()
    return Drift(
        late=bootstrap(late),
        slope=bootstrap(slopes(distances).numpy() * SLOPE_FRAMES),
        per_chunk=tuple(part.mean().item() for part in _chunks(distances, starts)),
        of_clips=tuple(late.tolist()),
    )


def sharpness_drift(pred: Tensor, truth: Tensor, starts: Sequence[int]) -> Drift:
    """Returns sharpness over true sharpness. The slope is that of the difference, in units of the true sharpness.

    Arguments as for `colour_drift`.
    """
    ours, true = frame_sharpness(pred), frame_sharpness(truth)
    late, true_late = (values[:, -LATE_FRAMES:].mean(1).numpy() for values in (ours, true))
    rise = (slopes(ours) - slopes(true)).numpy() * SLOPE_FRAMES
    pairs = zip(_chunks(ours, starts), _chunks(true, starts), strict=True)
    return Drift(
        late=ratio_of_means(late, true_late),
        slope=bootstrap_of(np.stack([rise, true.mean(1).numpy()], axis=1), lambda means: means[..., 0] / means[..., 1]),
        per_chunk=tuple((one.mean() / two.mean()).item() for one, two in pairs),
        of_clips=tuple((late / true_late).tolist()),
    )


def _chunks(values: Tensor, starts: Sequence[int]) -> list[Tensor]:
    """Returns the values [b t] of each chunk."""
    assert starts[0] == 0, f"the first chunk begins at frame {starts[0]}, expected 0"
    ends = [*starts[1:], values.shape[1]]
    return [values[:, start:stop] for start, stop in zip(starts, ends, strict=True)]
