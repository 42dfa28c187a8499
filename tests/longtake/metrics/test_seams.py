"""Seams of videos that are made to jump by known amounts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.metrics.seams import border_and_inside, frame_changes, seam, seam_parts

BORDERS = (9, 17, 25)
FIRST = 5


def stepping(steps: dict[int, float], usual: float, clips: int = 3, frames: int = 30) -> Tensor:
    """Returns clips that change by `usual` from frame to frame, up and down in turn, and by `steps[t]` into frame t."""
    value, rows = 0.5, []
    for t in range(frames):
        value += (steps.get(t, usual) if t else 0.0) * (1 if t % 2 else -1)
        rows.append(torch.full((clips, 3, 4, 6), value, dtype=torch.float64))
    return torch.stack(rows, dim=1)


def measured(pred: Tensor, truth: Tensor) -> float:
    return seam(seam_parts(pred, truth, BORDERS, FIRST)).mean


def test_changes_from_frame_to_frame() -> None:
    changes = frame_changes(stepping({9: 0.2}, 0.05))
    assert changes.shape == (3, 29)
    assert torch.allclose(changes[:, 8], torch.tensor(0.2, dtype=torch.float64))
    assert torch.allclose(changes[:, 9:], torch.tensor(0.05, dtype=torch.float64))


def test_a_jump_at_every_border_has_the_known_ratio() -> None:
    truth = stepping({}, 0.02)
    assert measured(stepping({}, 0.01), truth) == pytest.approx(1)
    assert measured(stepping(dict.fromkeys(BORDERS, 0.03), 0.01), truth) == pytest.approx(3)
    assert measured(stepping({9: 0.03}, 0.01), truth) == pytest.approx(5 / 3)  # at one of three borders
    assert measured(stepping(dict.fromkeys(BORDERS, 0.005), 0.01), truth) == pytest.approx(0.5)  # it halts


def test_where_the_truth_jumps_as_well_it_is_no_seam() -> None:
    jumps = dict.fromkeys(BORDERS, 0.04)
    assert measured(stepping(jumps, 0.01), stepping(jumps, 0.01)) == pytest.approx(1)
    assert measured(stepping(jumps, 0.01), stepping(jumps, 0.02)) == pytest.approx(2)


def test_neither_given_frames_nor_the_step_from_them_count() -> None:
    pred = stepping({2: 0.3, FIRST: 0.3}, 0.01)
    assert border_and_inside(pred, BORDERS, FIRST)[0].tolist() == pytest.approx([0.01, 0.01])


def test_a_clip_that_hardly_moves_does_not_decide() -> None:
    """Means first, then the ratio: one slow clip with a large ratio of its own moves the figure a little."""
    truth = torch.cat([stepping({}, 0.02), stepping({}, 0.02)])
    slow = stepping(dict.fromkeys(BORDERS, 0.001), 0.0001, clips=1)
    figure = seam(seam_parts(torch.cat([stepping({}, 0.02, clips=5), slow]), truth, BORDERS, FIRST))
    assert figure.mean == pytest.approx(1, abs=0.02)
    assert figure.low <= figure.mean <= figure.high


def test_the_interval_is_wide_where_clips_differ() -> None:
    truth = stepping({}, 0.02, clips=8)
    jumps = [stepping(dict.fromkeys(BORDERS, 0.01 * (1 + n)), 0.01, clips=1) for n in range(8)]
    figure = seam(seam_parts(torch.cat(jumps), truth, BORDERS, FIRST))
    assert figure.mean == pytest.approx(4.5)
    assert figure.low < 3.2
    assert figure.high > 5.8


@pytest.mark.parametrize("borders", [(), (5, 9), tuple(range(6, 30))])
def test_borders_that_leave_nothing_to_compare_are_refused(borders: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="borders .* of 30 frames"):
        border_and_inside(stepping({}, 0.01), borders, FIRST)


def test_a_still_clip_is_named() -> None:
    pred = stepping({}, 0.01)
    pred[1] = 0.5
    with pytest.raises(ValueError, match=r"clips \[1\] do not change"):
        seam_parts(pred, stepping({}, 0.01), BORDERS, FIRST)
    assert np.isfinite(seam_parts(stepping({}, 0.01), stepping({}, 0.01), BORDERS, FIRST)).all()
