"""Path, shift and weights: golden values."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.errors import ConfigError
from longtake.objectives.flow_matching import (
    NoiseLevels,
    logit_normal_weights,
    noised,
    pick,
    start_probabilities,
    token_count_shift,
)


@pytest.mark.parametrize(
    ("tokens", "shift"), [(4680, 2.11347), (6240, 2.1550), (10920, 2.2846), (32760, 3), (73710, 5)]
)
def test_golden_shift_of_the_token_count_line(tokens: int, shift: float) -> None:
    assert token_count_shift(tokens) == pytest.approx(shift, abs=5e-5)


def test_golden_weights() -> None:
    weights = logit_normal_weights()
    golden = {
        0: 0.0,
        10: 0.00125,
        50: 0.1124,
        100: 0.3997,
        250: 1.1655,
        500: 1.5958,
        750: 1.1618,
        900: 0.3935,
        990: 0.00087,
    }
    for index, value in golden.items():
        assert weights[index].item() == pytest.approx(value, abs=5e-5)
    assert weights.mean().item() == pytest.approx(1, abs=1e-9)


def test_the_weight_belongs_to_the_unshifted_draw() -> None:
    levels = NoiseLevels()
    u = torch.tensor([0.1005, 0.5], dtype=torch.float64)
    assert levels.weight(u).tolist() == pytest.approx([0.3997, 1.5958], abs=5e-5)
    assert levels.sigma(u, 4680)[1].item() == pytest.approx(2.11347 * 0.5 / (1 + 1.11347 * 0.5), abs=1e-5)


def test_weighting_equals_drawing_from_the_logit_normal() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    z = torch.special.ndtri(u) * 0.8 + 0.5
    drawn = torch.sigmoid(z)
    levels = NoiseLevels(weight_mean=0.5, weight_std=0.8)
    for moment in (1, 2):
        assert (levels.weight(u) * u**moment).mean().item() == pytest.approx((drawn**moment).mean().item(), abs=1e-4)


def test_the_papers_values_are_settings() -> None:
    paper = NoiseLevels(shift=3.0, shift_by_tokens=False, weight_mean=0.5)
    u = torch.tensor([0.5], dtype=torch.float64)
    assert paper.sigma(u, 4680).item() == pytest.approx(0.75)
    assert paper.weight(u).item() == pytest.approx(4 * math.exp(-0.125) / math.sqrt(2 * math.pi), abs=2e-3)
    assert NoiseLevels(weighting="none").weight(u).item() == 1


def test_the_path_is_exact_at_its_ends() -> None:
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(noised(x0, noise, torch.zeros(2, 1)), x0)
    assert torch.equal(noised(x0, noise, torch.ones(2, 1)), noise)
    x = noised(x0, noise, torch.tensor(0.3))
    assert torch.allclose(x - 0.3 * (noise - x0), x0, atol=1e-6)


def test_starts() -> None:
    assert start_probabilities({"none": 1}, 1) == [1.0]
    assert start_probabilities({"none": 0.5, "image": 0.2, "clip": 0.3}, 3) == [0.5, 0.2, 0.3]
    assert start_probabilities({"none": 0.5, "clip": 0.5}, 4) == [0.5, 0.0, 0.25, 0.25]
    u = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.999999])
    assert pick(u, [0.5, 0.0, 0.25, 0.25]).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("starts", "frames"),
    [
        ({"none": 0.5}, 3),
        ({"none": 1.5, "image": -0.5}, 3),
        ({"video": 1.0}, 3),
        ({"image": 1.0}, 1),
        ({"clip": 1.0}, 2),
    ],
)
def test_starts_that_cannot_be(starts: dict[str, float], frames: int) -> None:
    with pytest.raises(ConfigError, match="`objective.first_chunk_clean`"):
        start_probabilities(starts, frames)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"shift": 0.0}, "shift"),
        ({"weight_std": -1.0}, "weight_std"),
        ({"weight_mean": math.nan}, "weight_mean"),
        ({"weighting": "logitnormal"}, "weighting"),
    ],
)
def test_settings_that_cannot_work_name_their_key(settings: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"`objective.noise_levels.{key}`"):
        NoiseLevels(**settings)
