"""Cross entropy of tokens: goldens, factors, curves, seeds."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.metrics.token_nll import (
    TokenScores,
    bits,
    bits_per_pixel,
    factored_nats,
    over_seeds,
    split_factors,
    token_nats,
)


def test_uniform_goldens():
    """ln 64000 and 2 ln 512, as published."""
    targets = torch.tensor([0, 32036, 63999])
    assert token_nats(torch.zeros(3, 64000), targets).tolist() == pytest.approx([11.066638] * 3, abs=1e-5)
    factors = [torch.full((3, 512), 2.5), torch.zeros(3, 512)]
    assert factored_nats(factors, torch.tensor([0, 5000, 2**18 - 1])).tolist() == pytest.approx(
        [12.476649] * 3, abs=1e-5
    )
    assert bits(11.066638) == pytest.approx(15.966, abs=1e-3)
    assert bits_per_pixel(11.066638, 3072, 17, 256, 256) == pytest.approx(0.0440, abs=1e-4)


def test_bfloat16_logits_are_scored_in_float32():
    """On bfloat16 itself values from 8 to 16 lie 0.0625 apart: 12.03 came out as 12.0625."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 64000, generator=generator).bfloat16()
    targets = torch.randint(0, 64000, (50,), generator=generator)
    nats = token_nats(logits, targets)
    assert nats.dtype == torch.float32
    exact = -logits.double().log_softmax(-1)[torch.arange(50), targets]
    assert torch.allclose(nats.double(), exact, atol=1e-5)
    on_grid = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
    assert (on_grid - exact).abs().max() > 1e-2


def test_rows_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 7, 30, generator=generator)
    targets = torch.randint(0, 30, (2, 7), generator=generator)
    whole = token_nats(logits, targets)
    assert whole.shape == (2, 7)
    assert torch.equal(whole, token_nats(logits, targets, rows=3))


def test_independent_factors_add_up():
    generator = torch.Generator().manual_seed(2)
    low, high = torch.randn(9, 8, generator=generator), torch.randn(9, 5, generator=generator)
    targets = torch.randint(0, 40, (9,), generator=generator)
    joint = (low.log_softmax(-1)[:, None, :] + high.log_softmax(-1)[:, :, None]).flatten(1)  # low factor fastest
    assert torch.allclose(factored_nats([low, high], targets), token_nats(joint, targets), atol=1e-5)
    swapped = factored_nats([high, low], targets)
    assert not torch.allclose(factored_nats([low, high], targets), swapped, atol=1e-2)


def test_factors_are_low_first():
    tokens = torch.tensor([32036])
    assert [int(each) for each in split_factors(tokens, [512, 125])] == [32036 % 512, 32036 // 512]
    assert [int(each) for each in split_factors(tokens, [8, 8, 8, 5, 5, 5])] == [4, 4, 4, 2, 2, 2]


def test_a_chain_of_factors_beats_independent_ones_on_dependent_data():
    """Token = (a, a): independent factors pay ln 4 twice, a chain once."""
    a = torch.arange(4).repeat(25)
    tokens = a + 4 * a
    counts = torch.bincount(a, minlength=4).float()
    independent = factored_nats([counts.log().expand(100, 4)] * 2, tokens).mean()
    second_given_first = torch.eye(4)[a].log().clamp(min=-1e4)
    chained = factored_nats([counts.log().expand(100, 4), second_given_first], tokens).mean()
    assert independent.item() == pytest.approx(2 * math.log(4), abs=1e-5)
    assert chained.item() == pytest.approx(math.log(4), abs=1e-4)


def test_scores_over_batches():
    nats = torch.rand(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    hits = nats < 0.3
    scores = TokenScores("nll_full_tf", first_lat=2)
    for part in (slice(0, 4), slice(4, 5)):
        scores.update(nats[part], hits[part])
    found = scores.metrics()
    assert found["nll_full_tf"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert found["nll_full_tf_bits_per_token"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-6)
    assert found["nll_full_tf_perplexity"] == pytest.approx(math.exp(nats.mean().item()), rel=1e-6)
    assert found["nll_full_tf_bits_per_latent"] == pytest.approx(16 * nats.mean().item() / math.log(2), rel=1e-6)
    assert found["nll_full_tf_accuracy"] == pytest.approx(hits.double().mean().item(), rel=1e-6)
    assert scores.per_latent() == pytest.approx({2 + t: nats[:, :, t].mean().item() for t in range(3)}, rel=1e-5)
    assert scores.per_position() == pytest.approx(nats.mean(dim=(0, 1, 2)).flatten().tolist(), rel=1e-5)
    without = TokenScores("nll_unigram")
    without.update(nats)
    assert "nll_unigram_accuracy" not in without.metrics()


def test_reference_figures():
    """6.64 nats are 9.58 bits and a perplexity of 764; 8.79 nats are 12.68 bits."""
    scores = TokenScores("x")
    scores.update(torch.full((1, 1, 1, 32, 32), 6.64))
    found = scores.metrics()
    assert found["x_bits_per_token"] == pytest.approx(9.58, abs=5e-3)
    assert found["x_perplexity"] == pytest.approx(764, abs=2)
    assert found["x_bits_per_latent"] == pytest.approx(1024 * 6.64 / math.log(2), rel=1e-6)
    assert bits(8.79) == pytest.approx(12.68, abs=5e-3)


def test_seeds():
    found = over_seeds("ce_sampled_prefix", [10.0, 11.0, 12.0])
    assert found == {"ce_sampled_prefix_mean": 11.0, "ce_sampled_prefix_std": 1.0, "ce_sampled_prefix_seeds": 3.0}
    with pytest.raises(ValueError, match="2 seeds"):
        over_seeds("ce_sampled_prefix", [10.0, 11.0])
