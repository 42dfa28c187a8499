"""The nucleus against a full sort, its border, and drawing from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.rollout.sampling import PREFILTER, Nucleus, Sampler, Truncated, nucleus_mask, picked


def dense(nucleus: Nucleus, vocab: int) -> Tensor:
    return nucleus.dense(vocab)


def by_sorting(logits: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """The released rule, with a full sort in float64."""
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    ordered, ids = probs.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(dim=-1) - ordered > top_p] = 0
    ordered /= ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, ids, ordered)


def test_the_token_on_the_border_is_kept() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    for top_p, count in [(1e-6, 1), (0.499, 1), (0.5, 2), (0.6, 2), (0.75, 3), (0.8, 3), (0.875, 4), (0.9, 4)]:
        kept = Sampler(top_p=top_p).cut(probs)[0]
        assert (kept > 0).tolist() == [True] * count + [False] * (4 - count), top_p
        mask, border = nucleus_mask(probs.flip(-1), top_p)
        assert int(mask.sum()) == count
        assert border.item() == probs[0, count - 1].item()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 0.99])
def test_the_prefilter_is_exact(scale: float, top_p: float) -> None:
    """Flat rows need more than the prefilter, peaked ones less; a batch may hold both."""
    torch.manual_seed(0)
    logits = torch.randn(3, 6400) * torch.tensor([[scale], [0.3], [6.0]])
    probs = dense(Sampler(top_p=top_p).truncated(logits), 6400)
    expected = by_sorting(logits, top_p)
    # in float32 the border may fall one code further or nearer
    assert ((probs > 0).sum(dim=1) - (expected > 0).sum(dim=1)).abs().max() <= 1
    assert (probs - expected).abs().sum(dim=1).max() < 1e-3
    assert torch.allclose(probs.sum(dim=1), torch.ones(3), atol=1e-5)
    if top_p == 0.8:
        assert int((probs[1] > 0).sum()) > PREFILTER > int((probs[2] > 0).sum())


@pytest.mark.parametrize("scales", [(0.1, 0.1), (1.0, 1.0), (4.0, 4.0), (0.1, 6.0), (6.0, 0.1)])
@pytest.mark.parametrize("settings", [{"top_p": 0.3}, {"top_p": 0.8}, {"top_p": 1.0}, {"top_k": 5}, {"temperature": 0}])
def test_a_product_is_cut_as_its_codes_are(scales: tuple[float, float], settings: dict) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 200) * scales[0], torch.randn(3, 90) * scales[1]
    sampler = Sampler(**settings)
    joint = (second.log_softmax(-1).unsqueeze(-1) + first.log_softmax(-1).unsqueeze(-2)).flatten(1)
    probs, expected = (dense(t, 18000) for t in (sampler.truncated_product(first, second), sampler.truncated(joint)))
    assert (probs - expected).abs().sum(dim=1).max() < 1e-3
    assert ((probs > 0).sum(dim=1) - (expected > 0).sum(dim=1)).abs().max() <= 1


def test_equally_likely_codes_are_kept_in_order() -> None:
    probs = torch.full((2, 1000), 1e-3)
    probs[1, :500], probs[1, 500:] = 5e-4, 1.5e-3
    keep, border = nucleus_mask(probs, 0.2995)
    assert keep.sum(dim=1).tolist() == [300, 200]
    assert bool(keep[0, :300].all())
    assert bool(keep[1, 500:700].all())
    assert border.tolist() == pytest.approx([1e-3, 1.5e-3])
    assert int(nucleus_mask(probs, 0.8)[0][1].sum()) == pytest.approx(500 + 100, abs=1)


def test_top_k_comes_first() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert torch.allclose(dense(Sampler(top_k=2).truncated(logits), 4), torch.tensor([[4 / 7, 3 / 7, 0, 0]]))
    both = dense(Sampler(top_k=2, top_p=0.5).truncated(logits), 4)
    assert torch.equal(both, torch.tensor([[1.0, 0, 0, 0]]))


def test_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 300)
    uniform = torch.tensor([0.2, 0.9], dtype=torch.float64)
    assert torch.equal(Sampler(0.0, 0.8)(logits, uniform), logits.argmax(dim=1))
    assert torch.equal(Sampler(0.0, 0.8).truncated(logits).pick(uniform), logits.argmax(dim=1))
    probs = dense(Sampler(2.0, 0.7).truncated(logits), 300)
    assert (probs - by_sorting(logits, 0.7, 2.0)).abs().sum(dim=1).max() < 2e-2


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, None), (0.6, None), (1.0, 3)])
def test_draws_follow_the_distribution(top_p: float, top_k: int | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 9)
    truncated = Sampler(top_p=top_p, top_k=top_k).truncated(logits)
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    rows = Truncated(
        None if truncated.ids is None else truncated.ids.expand(len(uniform), -1),
        truncated.probs.expand(len(uniform), -1),
    )
    counts = torch.bincount(rows.pick(uniform), minlength=9) / len(uniform)
    assert torch.allclose(counts, dense(truncated, 9)[0].to(counts), atol=2e-5)
    assert torch.allclose(truncated.prob_of(torch.tensor([4])), dense(truncated, 9)[:, 4])


def test_what_has_no_weight_is_never_picked() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]]).expand(3, -1)
    assert picked(weights, torch.tensor([1e-12, 1 / 3, 1 - 2**-33], dtype=torch.float64)).tolist() == [1, 3, 3]


def test_bad_settings_are_named() -> None:
    for value in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="rollout.top_p"):
            Sampler(top_p=value)
    with pytest.raises(ConfigError, match="rollout.top_k"):
        Sampler(top_k=0)
    for value in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="rollout.temperature"):
            Sampler(temperature=value)
    with pytest.raises(AssertionError, match="bfloat16"):
        Sampler().truncated(torch.zeros(1, 4, dtype=torch.bfloat16))
