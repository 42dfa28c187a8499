"""How sure a mean over clips is: percentile bootstrap (Efron 1979), seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it with the wanted confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Returns "mean [low, high]" with two decimals."""
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, float]:
        """Returns plain numbers by name."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap(values: np.ndarray, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Returns the mean of one number a clip and its bootstrap interval.

    For a comparison give the differences clip by clip (paired): what clips have in common then cancels.

    Args:
        values: finite numbers, [clips].
        confidence: share of resampled means inside the interval.
        resamples: how often clips are drawn with replacement.
        seed: of these draws.
    """
    values = np.asarray(values, np.float64)
    assert values.ndim == 1, f"expected one number a clip, got shape {values.shape}"
    assert len(values) > 0, "there is no mean of nothing"
    assert np.isfinite(values).all(), f"expected finite numbers, got {values}"
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for first in range(0, resamples, 1000):  # a matrix of all draws would need 8 bytes x clips x resamples
        count = min(1000, resamples - first)
        means[first : first + count] = values[rng.integers(len(values), size=(count, len(values)))].mean(1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_of(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Returns a function of means over clips, such as their ratio, and its 95 % bootstrap interval.

    Clips are resampled, not ratios: one still clip would make a ratio of its own infinite.

    Args:
        values: finite numbers, some of each clip, [clips n].
        statistic: from means [... n] to the figure [...].
        resamples: how often clips are drawn with replacement.
        seed: of these draws.
    """
    values = np.asarray(values, np.float64)
    assert values.ndim == 2, f"expected some numbers a clip, got shape {values.shape}"
    assert len(values) > 0, "there is no mean of nothing"
    assert np.isfinite(values).all(), f"expected finite numbers, got {values}"
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(statistic(values[draws].mean(1)), [2.5, 97.5])
    return Interval(float(statistic(values.mean(0))), float(low), float(high))


def ratio_of_means(above: np.ndarray, below: np.ndarray) -> Interval:
    """Returns the ratio of the means of two numbers a clip, [clips] each, and its interval."""
    return bootstrap_of(np.stack([above, below], axis=1), lambda means: means[..., 0] / means[..., 1])
