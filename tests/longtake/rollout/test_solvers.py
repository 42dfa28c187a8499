"""Solvers: golden timesteps, diffusers as the oracle, order of convergence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.rollout.solvers import Euler, SolverRun, UniPC


def timesteps(solver: UniPC | Euler, num_steps: int | None) -> list[float]:
    return [round(value, 2) for value in solver.begin(num_steps).schedule.timesteps]


@pytest.mark.parametrize(
    ("solver", "first", "last"),
    [
        (UniPC(shift=5), [999, 995, 991, 987, 982, 978], [302, 241, 172, 92]),
        (UniPC(shift=8), [999, 997, 994, 991, 989, 986], [409, 337, 249, 140]),
        (UniPC(shift=3), [999, 992, 985, 978, 971, 963], [206, 160, 111, 57]),
        (UniPC(shift=3, double_shift=True), [999, 993, 986, 979, 971, 964], [206, 160, 111, 57]),
    ],
)
def test_golden_timesteps_of_unipc(solver: UniPC, first: list[int], last: list[int]) -> None:
    values = timesteps(solver, 50)
    assert values[:6] == first
    assert values[-4:] == last


def test_the_doubled_shift_is_truncated_as_in_the_released_code() -> None:
    """The largest sigma is a float32 there: of 115 steps the 33rd falls just below 886."""
    assert timesteps(UniPC(shift=3, double_shift=True), 115)[32] == 885
    assert timesteps(UniPC(shift=1, double_shift=True), 3) == [999, 666, 333]


def test_the_largest_sigma_of_the_released_code_is_shifted_twice() -> None:
    assert UniPC(shift=3).begin(50).schedule.sigmas[0] == pytest.approx(0.999666, abs=1e-6)
    assert UniPC(shift=3, double_shift=True).begin(50).schedule.sigmas[0] == pytest.approx(0.999889, abs=1e-6)


@pytest.mark.parametrize(
    ("shift", "steps", "expected"),
    [
        (5, [1000, 750, 500, 250], [1000, 937.5, 833.33, 625]),
        (5, [1000, 800, 600, 400, 200], [1000, 952.38, 882.35, 769.23, 555.56]),
        (8, [1000, 750, 500, 250], [1000, 960, 888.89, 727.27]),
    ],
)
def test_golden_warped_lists(shift: float, steps: list[float], expected: list[float]) -> None:
    assert timesteps(Euler(shift=shift, timesteps=steps), None) == expected


def test_golden_grid_of_euler() -> None:
    values = Euler(shift=5).begin(1000).schedule.timesteps
    assert values[:2] == pytest.approx((1000, 999.800), abs=1e-3)
    assert values[-1] == pytest.approx(4.980, abs=1e-3)
    assert Euler(shift=8).begin(1000).schedule.timesteps[-1] == pytest.approx(7.944, abs=1e-3)


def velocity(x: Tensor, sigma: float) -> Tensor:
    return torch.tanh(1.3 * x) * (0.5 + sigma) + 0.3 * x.roll(1, -1)


def of_diffusers(shift: float, steps: int, **settings: object) -> Any:
    """Returns diffusers' solver on its exact grid: its own is another one."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **settings
    )
    theirs.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    return theirs


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_unipc_equals_diffusers(order: int, shift: float, steps: int) -> None:
    theirs = of_diffusers(shift, steps, solver_order=order)
    ours = UniPC(shift=shift, order=order).begin(steps)
    assert [int(t) for t in theirs.timesteps] == [round(t) for t in ours.schedule.timesteps]
    x = y = torch.randn(2, 4, 60, generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps:
        x = theirs.step(velocity(x, float(t) / 1000), t, x).prev_sample
        y = ours.step(y, velocity(y, float(t) / 1000))
    assert (x - y).abs().max() / x.abs().max() < 2e-6


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0, 7.0])
def test_timesteps_of_unipc_are_truncated_as_by_diffusers(shift: float) -> None:
    """Unshifted, a third of 0.999 is 665.99... or 666 by how the grid is written down."""
    for steps in (*range(1, 41), 333, 999):
        ours = [round(t) for t in UniPC(shift=shift).begin(steps).schedule.timesteps]
        assert ours == of_diffusers(shift, steps).timesteps.tolist(), steps


def error_on_gaussian_data(run: SolverRun) -> float:
    """Returns how far a solver ends from the exact flow of data N(0.3, 0.5**2), whose velocity is linear in x."""
    mean, std = 0.3, 0.5

    def exact(sigma: float) -> float:
        return math.sqrt(((1 - sigma) * std) ** 2 + sigma**2)

    sigmas = run.schedule.sigmas
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    x = (1 - sigmas[0]) * mean + exact(sigmas[0]) * z
    for sigma in sigmas[:-1]:
        x0 = mean + (1 - sigma) * std**2 / exact(sigma) ** 2 * (x - (1 - sigma) * mean)
        x = run.step(x, (x - x0) / sigma)
    return (x - (mean + std * z)).abs().max().item()


@pytest.mark.parametrize(
    ("solver", "order"),
    [(Euler(shift=1), 1), (UniPC(shift=1, order=1, use_corrector=False), 1), (UniPC(shift=1), 2)],
)
def test_order_on_a_linear_ode(solver: Euler | UniPC, order: int) -> None:
    coarse, fine = (error_on_gaussian_data(solver.begin(steps)) for steps in (80, 320))
    assert math.log(coarse / fine, 4) > order - 0.25
    assert fine < 0.02


def test_unipc_is_more_accurate_than_euler_and_its_corrector_helps() -> None:
    euler, plain, corrected = (
        error_on_gaussian_data(solver.begin(20)) for solver in (Euler(), UniPC(use_corrector=False), UniPC())
    )
    assert corrected < plain < euler


def test_a_run_starts_afresh() -> None:
    solver = UniPC()
    first = error_on_gaussian_data(solver.begin(10))
    assert error_on_gaussian_data(solver.begin(10)) == first


def test_one_step_jumps_to_the_data_prediction() -> None:
    x, v = torch.tensor([2.0]), torch.tensor([0.5])
    for solver in (Euler(shift=3), UniPC(shift=3)):
        run = solver.begin(1)
        assert run.step(x, v).item() == pytest.approx(2.0 - run.schedule.sigmas[0] * 0.5)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: UniPC(order=4), "solver.order"),
        (lambda: UniPC(shift=0), "solver.shift"),
        (lambda: Euler(shift=-1), "solver.shift"),
        (lambda: Euler(timesteps=[250, 500]), "solver.timesteps"),
        (lambda: Euler(timesteps=[1000, 500]).begin(3), "rollout.num_steps"),
        (lambda: Euler().begin(None), "rollout.num_steps"),
        (lambda: UniPC().begin(0), "rollout.num_steps"),
    ],
)
def test_settings_that_cannot_work_name_their_key(make: object, key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        make()  # type: ignore[operator]
