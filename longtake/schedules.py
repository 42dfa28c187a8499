"""Learning-rate schedules, as factors of the optimiser's own rate."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from longtake.errors import ConfigError


def warmup_constant(optimizer: Optimizer, *, warmup_steps: int) -> LambdaLR:
    """Returns a schedule that rises linearly over `warmup_steps` optimiser steps and then stays.

    Raises:
        ConfigError: a negative number of steps.
    """
    _check(warmup_steps=warmup_steps)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int, final_factor: float = 0.1) -> LambdaLR:
    """Returns a schedule that rises linearly, then falls along a half cosine to `final_factor` at
    `total_steps`.

    Past `total_steps` it stays at `final_factor`.

    Raises:
        ConfigError: a negative number.
    """
    _check(warmup_steps=warmup_steps, total_steps=total_steps, final_factor=final_factor)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ConfigError(f"scheduler.{name} is {value}; expected 0 or more. Change `scheduler.{name}`.")
