"""ODE solvers for the path x_sigma = (1 - sigma) x0 + sigma noise, from sigma near 1 down to 0.

Euler follows the velocity. UniPC (Zhao et al. 2023, "UniPC: a unified predictor-corrector framework", arXiv
2302.04867) is the multistep solver of Wan 2.1 and LaCT: B2 coefficients, data prediction, corrector from the second
step on, lower order at both ends. All of its scalars are worked out in float64 once; a step is one sum of tensors.

The network is told the noise level that `Schedule.told` holds, which for UniPC is the timestep truncated to an integer,
as Wan does; the solver itself goes on with the exact sigma.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from longtake.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """The noise levels of one chunk.

    Attributes:
        sigmas: exact noise levels, falling, the last one 0; one more than there are network evaluations.
        told: what the network is told at each evaluation, in the units of sigma.
    """

    sigmas: tuple[float, ...]
    told: tuple[float, ...]

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told, times 1000."""
        return tuple(1000 * sigma for sigma in self.told)


class SolverRun(Protocol):
    """The denoising of one chunk; it keeps the history of a multistep solver."""

    schedule: Schedule

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        """Returns x at the next noise level from x at this one and the velocity that the network saw there."""
        ...


class Solver(Protocol):
    """Makes a fresh run for each chunk."""

    def begin(self, num_steps: int | None) -> SolverRun:
        """Returns a run of `num_steps` network evaluations; None: as many as the solver's own list has."""
        ...


def shifted(sigma: float, shift: float) -> float:
    """Returns the timestep shift map shift * sigma / (1 + (shift - 1) * sigma); 0 and 1 stay."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class Euler:
    """The first-order solver, on an even grid from 1 or on a given list.

    Args:
        shift: timestep shift; above 1 it spends more steps at high noise.
        timesteps: unshifted timesteps in (0, 1000] to use instead of the even grid, falling (few-step models).
    """

    def __init__(self, *, shift: float = 3.0, timesteps: Sequence[float] | None = None) -> None:
        _check_shift(shift)
        if timesteps is not None:
            falls = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
            if not timesteps or not falls or timesteps[0] > 1000 or timesteps[-1] <= 0:
                raise ConfigError(
                    f"solver.timesteps is {list(timesteps)}; expected falling values in (0, 1000], for example "
                    "[1000, 750, 500, 250]. Change `solver.timesteps`."
                )
        self.shift = shift
        self.timesteps = None if timesteps is None else tuple(timesteps)

    def begin(self, num_steps: int | None) -> _EulerRun:
        """Returns a run.

        Raises:
            ConfigError: not one step, or another number of them than `timesteps` has.
        """
        if self.timesteps is not None:
            if num_steps not in (None, len(self.timesteps)):
                raise ConfigError(
                    f"rollout.num_steps is {num_steps} but solver.timesteps lists {len(self.timesteps)}; "
                    "set `rollout.num_steps` to null or to that number."
                )
            base = [timestep / 1000 for timestep in self.timesteps]
        else:
            count = _check_steps(num_steps)
            base = [1 - index / count for index in range(count)]
        sigmas = tuple(shifted(sigma, self.shift) for sigma in base)
        return _EulerRun(Schedule((*sigmas, 0.0), sigmas))


class _EulerRun:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._index = 0

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        here, after = self.schedule.sigmas[self._index : self._index + 2]
        self._index += 1
        return x + velocity * (after - here)


class UniPC:
    """The multistep predictor-corrector of Wan 2.1.

    Args:
        shift: timestep shift.
        order: 1 to 3; 2 is Wan's.
        double_shift: shift the largest sigma a second time, as the released LaCT code does (0.999889 instead of
            0.999666 at shift 3).
        use_corrector: correct each step once the network has been evaluated at its end; costs no evaluation.
    """

    def __init__(
        self,
        *,
        shift: float = 3.0,
        order: int = 2,
        double_shift: bool = False,
        use_corrector: bool = True,
    ) -> None:
        _check_shift(shift)
        if order not in (1, 2, 3):
            raise ConfigError(f"solver.order is {order}; expected 1, 2 or 3. Change `solver.order`.")
        self.shift, self.order = shift, order
        self.double_shift, self.use_corrector = double_shift, use_corrector

    def begin(self, num_steps: int | None) -> UniPCRun:
        """Returns a run.

        Raises:
            ConfigError: not one step.
        """
        count = _check_steps(num_steps)
        top = 0.999
        if self.double_shift:  # in float32, as there
            sigma, shift = np.float32(top), np.float32(self.shift)
            top = float(shift * sigma / (1 + (shift - 1) * sigma))
        grid = np.linspace(top, 0, count + 1)  # to the last bit as elsewhere: 666 and 665.99 are told apart below
        sigmas = [shifted(sigma, self.shift) for sigma in grid.tolist()[:-1]]
        told = tuple(math.floor(sigma * 1000) / 1000 for sigma in sigmas)
        schedule = Schedule((*sigmas, 0.0), told)
        return UniPCRun(schedule, self.order, self.use_corrector)


class UniPCRun:
    """UniPC on any falling list of noise levels that ends in 0.

    The data prediction of a step uses the uncorrected x that the network saw; the corrected x then replaces it. The
    corrector has the order of the predictor before it.
    """

    def __init__(self, schedule: Schedule, order: int = 2, use_corrector: bool = True) -> None:
        self.schedule = schedule
        self._plan = _unipc_plan(schedule.sigmas, order, use_corrector)
        self._index = 0
        self._data: list[Tensor] = []  # predictions of x0, the newest first
        self._before: Tensor | None = None  # x at the step before

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        terms = self._plan[self._index]
        data = x - velocity * self.schedule.sigmas[self._index]
        history = [data, *self._data]
        if terms.correct is not None:
            assert self._before is not None, "the corrector needs the step before"
            x = _weighted_sum(terms.correct, [self._before, *history])
        self._before = x
        self._data = history[: terms.keep]
        self._index += 1
        return _weighted_sum(terms.predict, [x, *history])


@dataclass(frozen=True)
class _Terms:
    """Weights of one step: of x at the step before, then of the data predictions, newest first; `keep` of them stay."""

    correct: tuple[float, ...] | None
    predict: tuple[float, ...]
    keep: int


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=False):
        total = total + tensor * weight
    return total


@functools.lru_cache(maxsize=32)
def _unipc_plan(sigmas: tuple[float, ...], order: int, use_corrector: bool) -> tuple[_Terms, ...]:
    steps = len(sigmas) - 1
    plan, last_order = [], 0
    for index in range(steps):
        correct = _corrector(sigmas, index, last_order) if use_corrector and index > 0 else None
        last_order = min(order, steps - index, index + 1)
        plan.append(_Terms(correct, _predictor(sigmas, index, last_order), order))
    return tuple(plan)


def _predictor(sigmas: Sequence[float], index: int, order: int) -> tuple[float, ...]:
    """Returns the weights of x and of the data predictions at `index`, `index - 1`, ..."""
    ratios = [_ratio(sigmas, index, index + 1, index - k) for k in range(1, order)]
    phi, matrix, rhs = _coefficients(sigmas[index], sigmas[index + 1], [*ratios, 1.0])
    rhos: list[float] = np.linalg.solve(matrix[:-1, :-1], rhs[:-1]).tolist() if order > 2 else [0.5][: order - 1]
    alpha = 1 - sigmas[index + 1]
    old = [-alpha * phi * rho / ratio for rho, ratio in zip(rhos, ratios, strict=True)]
    return (sigmas[index + 1] / sigmas[index], -alpha * phi - sum(old), *old)


def _corrector(sigmas: Sequence[float], index: int, order: int) -> tuple[float, ...]:
    """Returns the weights of x at `index - 1` and of the data predictions at `index`, `index - 1`, ..."""
    ratios = [_ratio(sigmas, index - 1, index, index - 1 - k) for k in range(1, order)]
    phi, matrix, rhs = _coefficients(sigmas[index - 1], sigmas[index], [*ratios, 1.0])
    rhos = [0.5] if order == 1 else np.linalg.solve(matrix, rhs).tolist()
    alpha = 1 - sigmas[index]
    new = -alpha * phi * rhos[-1]
    old = [-alpha * phi * rho / ratio for rho, ratio in zip(rhos, ratios, strict=False)]
    return (sigmas[index] / sigmas[index - 1], new, -alpha * phi - new - sum(old), *old)


def _coefficients(start: float, end: float, ratios: Sequence[float]) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns B2 = expm1(-h) and the linear system of the weights, for a step of h in log signal-to-noise ratio."""
    hh = -(_half_log_snr(end) - _half_log_snr(start))
    phi = math.expm1(hh)
    term, factorial, rhs = phi / hh - 1, 1, []
    for power in range(1, len(ratios) + 1):
        rhs.append(term * factorial / phi)
        factorial *= power + 1
        term = term / hh - 1 / factorial
    matrix = np.array([[ratio ** (power - 1) for ratio in ratios] for power in range(1, len(ratios) + 1)])
    return phi, matrix, np.array(rhs)


def _ratio(sigmas: Sequence[float], start: int, end: int, old: int) -> float:
    here = _half_log_snr(sigmas[start])
    return (_half_log_snr(sigmas[old]) - here) / (_half_log_snr(sigmas[end]) - here)


def _half_log_snr(sigma: float) -> float:
    """Returns log((1 - sigma) / sigma), infinite at the ends."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log(1 - sigma) - math.log(sigma)


def _check_shift(shift: float) -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ConfigError(
            f"solver.shift is {shift}; expected a positive number (1 leaves the grid even). Change `solver.shift`."
        )


def _check_steps(num_steps: int | None) -> int:
    if num_steps is None or num_steps < 1:
        raise ConfigError(f"rollout.num_steps is {num_steps}; expected 1 or more. Change `rollout.num_steps`.")
    return num_steps
