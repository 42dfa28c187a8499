"""Contexts that the network draws again: where they stand, what they leave alone, whose gradient there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.flow_matching import NoiseLevels
from longtake.objectives.own_contexts import redrawn
from longtake.objectives.teacher_forcing import TeacherForcing
from longtake.rollout.noise import NoiseKey
from longtake.types import Conditions

KEY = NoiseKey(0, (0, 1, 2, 3))


class Pulling:
    """A stand-in that draws every latent towards 5, whatever it is told, and keeps what it was given."""

    def __init__(self, grid: Any) -> None:
        self._grid, self.calls = grid, []
        self.weight = torch.ones((), requires_grad=True)

    def __call__(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, layout: ChunkLayout, memory: Any = None
    ) -> Any:
        self.calls.append((x, sigma, layout, torch.is_grad_enabled()))
        level = sigma[..., None, None, None]
        return self.weight * torch.where(level > 0, (x - 5) / level.clamp(min=1e-6), 0.0), None

    def grid(self, shape: tuple[int, ...]) -> Any:
        return self._grid


def objective(**changes: Any) -> TeacherForcing:
    settings: dict[str, Any] = {
        "chunk_lat": 2,
        "noise_levels": NoiseLevels(shift=1.0, shift_by_tokens=False, weighting="none"),
        "first_chunk_clean": {"none": 1.0},
    }
    return TeacherForcing(**{**settings, **changes})


def latents() -> Tensor:
    return torch.randn(4, 1, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def network() -> Pulling:
    return Pulling(Grid(views=1, frames=2, height=1, width=1))


def contexts_of(made: TeacherForcing, network: Pulling) -> tuple[Tensor, Tensor]:
    network.calls.clear()
    made(network, latents(), Conditions(), KEY)
    x, sigma, layout, _ = network.calls[-1]
    return x[:, list(layout.contexts)], sigma[:, list(layout.contexts)]


def test_contexts_are_what_the_network_makes_of_them(network: Pulling) -> None:
    true, _ = contexts_of(objective(), network)
    own, sigma = contexts_of(objective(own_contexts=1.0, own_noise=1.0), network)
    assert len(network.calls) == 1 + 3
    assert torch.allclose(own, torch.full_like(own, 5.0))  # where this network pulls everything, from any level
    assert not torch.allclose(true, own)
    assert not sigma.any()  # they are told as clean
    for x, _, layout, _ in network.calls[:-1]:  # while it draws, the contexts are the true ones
        assert torch.equal(x[:, list(layout.contexts)], true[:, :1])
    targets = [call[0][:, list(call[2].targets)] for call in (network.calls[-1],)]
    network.calls.clear()
    objective()(network, latents(), Conditions(), KEY)
    assert torch.equal(targets[0], network.calls[-1][0][:, list(network.calls[-1][2].targets)])  # the question stays


def test_without_noise_they_are_the_true_ones(network: Pulling) -> None:
    true, _ = contexts_of(objective(), network)
    own, _ = contexts_of(objective(own_contexts=1.0, own_noise=0.0), network)
    assert torch.equal(own, true)


def test_a_share_of_clips_has_them_whatever_the_batch(network: Pulling) -> None:
    true, _ = contexts_of(objective(), network)
    own, _ = contexts_of(objective(own_contexts=0.5, own_noise=1.0), network)
    changed = (own != true).flatten(1).any(1)
    assert 0 < int(changed.sum()) < 4
    network.calls.clear()
    objective(own_contexts=0.5, own_noise=1.0)(network, latents()[2:3], Conditions(), NoiseKey(0, (2,)))
    x, _, layout, _ = network.calls[-1]
    assert torch.allclose(x[:, list(layout.contexts)], own[2:3])


def test_noise_on_contexts_stays_what_it_is(network: Pulling) -> None:
    noisy, levels = contexts_of(objective(context_noise=0.3), network)
    own, own_levels = contexts_of(objective(context_noise=0.3, own_contexts=1.0, own_noise=1.0), network)
    true, _ = contexts_of(objective(), network)
    assert torch.equal(levels, own_levels)
    kept = 1 - levels[..., None, None, None]
    assert torch.allclose(own - noisy, kept * (5.0 - true))


def test_the_drawing_has_no_gradient(network: Pulling) -> None:
    objective(own_contexts=1.0)(network, latents(), Conditions(), KEY).loss.backward()
    assert [call[3] for call in network.calls] == [False, False, False, True]
    assert network.weight.grad is not None


def test_steps_go_evenly_from_the_level_to_zero(network: Pulling) -> None:
    layout = ChunkLayout.teacher_forcing(2, 1, network.grid(()))
    chunks = latents()[:, :, :4].unflatten(2, (2, 2)).transpose(1, 2)
    redrawn(network, chunks, Conditions(), KEY, torch.tensor([[0.8, 0.4]] * 4), 4, layout)
    told = [call[1][0, list(call[2].targets), 0, 0].tolist() for call in network.calls]
    assert told == [pytest.approx([0.8 - 0.2 * i, 0.4 - 0.1 * i]) for i in range(4)]


@pytest.mark.parametrize(("name", "value"), [("own_contexts", 1.5), ("own_noise", -0.1), ("own_steps", 0)])
def test_wrong_values_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"objective.{name} is {value}"):
        objective(**{name: value})
