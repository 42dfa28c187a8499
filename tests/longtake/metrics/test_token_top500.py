"""Cross entropy from the best k tokens, in both readings, and the best k of a product."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.metrics.token_nll import token_nats
from longtake.metrics.token_top500 import (
    ce_top500_logits,
    ce_top500_logprobs,
    hits,
    top_of_product,
    top_tokens,
)


@pytest.mark.parametrize(("a", "c", "k"), [(512, 125, 500), (8, 5, 40), (3, 100, 20), (100, 3, 20), (4, 4, 1)])
def test_best_of_a_product_equals_brute_force(a, c, k):
    generator = torch.Generator().manual_seed(a + c + k)
    low = (3 * torch.randn(6, 2, a, generator=generator)).log_softmax(-1)
    high = (3 * torch.randn(6, 2, c, generator=generator)).log_softmax(-1)
    joint = (low[..., None, :] + high[..., :, None]).flatten(-2)
    expected = joint.topk(k, dim=-1)
    indices, values = top_of_product(low, high, k)
    assert indices.dtype == torch.int32
    assert torch.equal(values, expected.values)
    assert torch.equal(joint.gather(-1, indices.long()), values)
    assert torch.equal(indices.sort(-1).values, expected.indices.sort(-1).values)


def test_too_few_pairs():
    with pytest.raises(AssertionError, match="no best 500"):
        top_of_product(torch.zeros(8), torch.zeros(5))


def test_with_all_tokens_both_readings_are_the_full_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 40, generator=generator) * 3
    targets = torch.randint(0, 40, (2, 5), generator=generator)
    indices, values = top_tokens(logits, 40, rows=3)
    full = token_nats(logits, targets)
    for score in (ce_top500_logits, ce_top500_logprobs):
        assert torch.allclose(score(indices, values, targets, vocab_size=40), full, atol=1e-5)
    assert hits(indices, targets).all()


def test_values_by_hand():
    indices = torch.tensor([[3, 7], [3, 7], [3, 7]], dtype=torch.int32)
    values = torch.tensor([0.5, 0.25]).log().expand(3, 2)
    targets = torch.tensor([3, 7, 0])
    as_logits = ce_top500_logits(indices, values, targets, vocab_size=10)
    assert as_logits.tolist() == pytest.approx([-math.log(2 / 3), -math.log(1 / 3), math.log(10)], rel=1e-5)
    as_log_probs = ce_top500_logprobs(indices, values, targets, vocab_size=10)
    assert as_log_probs.tolist() == pytest.approx([-math.log(0.5), -math.log(0.25), -math.log(0.25 / 8)], rel=1e-5)
    for score in (ce_top500_logits, ce_top500_logprobs):
        assert score(indices, values, targets, vocab_size=10, floor=20.0)[2].item() == 20.0
    assert hits(indices, targets).tolist() == [True, True, False]


def test_the_second_reading_is_a_distribution():
    """Over all tokens the probabilities of the second reading add up to 1."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    indices, values = top_tokens(logits, 5)
    every = torch.arange(30)
    nats = ce_top500_logprobs(indices.expand(30, -1), values.expand(30, -1), every, vocab_size=30)
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-5)
