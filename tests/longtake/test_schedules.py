"""Learning-rate schedules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from longtake.schedules import warmup_constant, warmup_cosine


def rates(schedule: partial[LambdaLR], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_rises_then_stays() -> None:
    assert rates(partial(warmup_constant, warmup_steps=3), 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(partial(warmup_constant, warmup_steps=0), 2) == [2.0, 2.0]


def test_cosine_rises_falls_and_stays_at_its_floor() -> None:
    found = rates(partial(warmup_cosine, warmup_steps=2, total_steps=10, final_factor=0.25), 14)
    assert found[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert found[6] == pytest.approx((2.0 + 0.5) / 2)  # half-way down
    assert found[2:11] == sorted(found[2:11], reverse=True)
    assert found[10:] == pytest.approx([0.5] * 4)
