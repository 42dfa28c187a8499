"""Differences between trainings are paired by seed and clip."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.curriculum import difference, run
from longtake.errors import ConfigError


def test_what_seeds_and_clips_have_in_common_cancels() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(3, 1)) * 10 + rng.normal(size=(1, 32)) * 10
    found = difference(common + 0.5 + rng.normal(size=(3, 32)) * 0.01, common)
    assert found.mean == pytest.approx(0.5, abs=0.01)
    assert found.low == pytest.approx(0.5, abs=0.01)
    assert found.high == pytest.approx(0.5, abs=0.01)


def test_one_seed_that_differs_widens_the_interval() -> None:
    ours = np.zeros((3, 32))
    ours[0] = 3.0
    found = difference(ours, np.zeros((3, 32)))
    assert found.mean == 1.0
    assert found.low == 0.0  # a resample may leave that seed out
    assert found.high > 2


def test_runs_are_compared_seed_by_seed() -> None:
    with pytest.raises(ConfigError, match="2 runs are compared with 1"):
        run(["--runs", "a", "b", "--against", "c"])
