"""The nucleus of a product against a full sort of all its codes, its border, and drawing from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.rollout.product import product_nucleus

SIZES = (60, 25)


def factors(scales: tuple[float, float], rows: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    spread = torch.linspace(0.3, 1.0, rows)[:, None]
    return tuple((torch.randn(rows, n) * s * spread).softmax(-1) for n, s in zip(SIZES, scales, strict=True))


def by_sorting(first: Tensor, second: Tensor, top_p: float) -> Tensor:
    joint = (second.double().unsqueeze(2) * first.double().unsqueeze(1)).flatten(1)
    ordered, ids = joint.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(dim=-1) - ordered > top_p] = 0
    return torch.zeros_like(joint).scatter_(1, ids, ordered / ordered.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("top_p", [1e-4, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("scales", [(0.1, 0.1), (1.0, 1.0), (4.0, 4.0), (0.1, 6.0), (6.0, 0.1), (40.0, 40.0)])
def test_the_same_codes_are_kept(scales: tuple[float, float], top_p: float) -> None:
    first, second = factors(scales)
    expected = by_sorting(first, second, top_p)
    found = product_nucleus(first, second, top_p)
    probs = found.dense(60 * 25)
    assert torch.equal(probs > 0, expected > 0)
    assert torch.allclose(probs.double(), expected, atol=1e-6)
    assert torch.equal(found.counts.sum(dim=1), (expected > 0).sum(dim=1))


def test_the_code_on_the_border_is_kept() -> None:
    first, second = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.5, 0.5]])
    for top_p, count in [(1e-6, 1), (0.2499, 1), (0.25, 2), (0.49, 2), (0.5, 3), (0.62, 3), (0.63, 4), (0.9, 6)]:
        assert int(product_nucleus(first, second, top_p).counts.sum()) == count, top_p


def test_equally_likely_codes_are_kept_up_to_the_mass() -> None:
    first, second = torch.full((2, 50), 1 / 50), torch.full((2, 20), 1 / 20)
    kept = product_nucleus(first, second, 0.2995)
    assert kept.counts.sum(dim=1).tolist() == [300, 300]
    assert kept.counts[0].tolist() == [50] * 6 + [0] * 14


def test_everything_is_kept_at_one() -> None:
    first, second = factors((3.0, 3.0))
    probs = product_nucleus(first, second, 1.0).dense(60 * 25)
    assert torch.allclose(probs, (second.unsqueeze(2) * first.unsqueeze(1)).flatten(1), atol=1e-7)


@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_draws_follow_the_distribution(top_p: float) -> None:
    first, second = factors((2.0, 2.0))
    nucleus = product_nucleus(first, second, top_p)
    uniform = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    drawn = nucleus.pick(uniform.expand(4, -1))
    probs = nucleus.dense(60 * 25)
    for row in range(4):
        shares = torch.bincount(drawn[row], minlength=60 * 25) / len(uniform)
        assert torch.allclose(shares, probs[row], atol=4e-5)
    assert torch.equal(nucleus.pick(uniform[:4]), nucleus.pick(uniform[:4, None])[:, 0])
    assert torch.allclose(nucleus.prob_of(drawn[:, :100]), probs.gather(1, drawn[:, :100]))


def test_some_rows() -> None:
    first, second = factors((2.0, 2.0))
    nucleus = product_nucleus(first, second, 0.8)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(nucleus.rows(index).dense(60 * 25), nucleus.dense(60 * 25)[index])
