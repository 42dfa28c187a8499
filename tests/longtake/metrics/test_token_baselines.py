"""The baselines are distributions, are what their formulas say, and win where they should."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.metrics.token_baselines import NAMES, TokenBaselines


def fitted(tokens: torch.Tensor, vocab_size: int, first_lat: int = 1) -> TokenBaselines:
    baselines = TokenBaselines(vocab_size, first_lat)
    for part in tokens.split(3):
        baselines.update(part)
    baselines.fit()
    return baselines


def skewed(n: int, shape: tuple[int, ...], vocab_size: int, seed: int) -> torch.Tensor:
    """Returns independent tokens, small ones more often."""
    draws = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    return (draws.square() * vocab_size).long()


@pytest.mark.parametrize("first_lat", [1, 2])
def test_every_baseline_is_a_distribution(first_lat):
    baselines = fitted(skewed(20, (1, 3, 2, 2), 7, seed=0), 7, first_lat)
    clip = skewed(1, (1, 3, 2, 2), 7, seed=1)
    totals = dict.fromkeys(NAMES, 0.0)
    for token in range(7):
        changed = clip.clone()
        changed[0, 0, -1, 1, 1] = token
        for name, nats in baselines.nats(changed).items():
            assert nats.shape == (1, 1, 3 - first_lat, 2, 2)
            totals[name] += float((-nats[0, 0, -1, 1, 1]).exp())
    assert totals == pytest.approx(dict.fromkeys(NAMES, 1.0), abs=1e-9)


def test_only_the_true_past_is_used():
    """A scored token depends on nothing after it, and on the token that its name says."""
    baselines = fitted(skewed(50, (1, 3, 2, 2), 5, seed=2), 5)
    clip = torch.zeros(1, 1, 3, 2, 2, dtype=torch.long)
    before = baselines.nats(clip)
    for place, names in {
        (1, 0, 1): {"bigram", "copy_previous"},
        (2, 0, 0): {"bigram_raster"},
        (2, 1, 0): set(),
    }.items():
        changed = clip.clone()
        changed[(0, 0, *place)] = 3
        after = baselines.nats(changed)
        differs = {name for name in NAMES if before[name][0, 0, 1, 0, 1] != after[name][0, 0, 1, 0, 1]}
        assert differs == names
    changed = clip.clone()
    changed[0, 0, 1, 1, 1] = 3  # the last of the latent before
    assert baselines.nats(changed)["bigram_raster"][0, 0, 1, 0, 0] != before["bigram_raster"][0, 0, 1, 0, 0]


def test_uniform_and_unigram_on_independent_tokens():
    truth = torch.tensor([0.5, 0.25, 0.125, 0.125])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.multinomial(truth, 40000, replacement=True, generator=generator).reshape(400, 1, 4, 5, 5)
    baselines = fitted(tokens[:300], 4)
    nats = {name: value.mean().item() for name, value in baselines.nats(tokens[300:]).items()}
    entropy = -(truth * truth.log()).sum().item()
    assert nats["uniform"] == pytest.approx(math.log(4), abs=1e-12)
    assert nats["unigram"] == pytest.approx(entropy, abs=0.01)
    for name in ("bigram", "bigram_raster", "copy_previous"):
        assert nats[name] == pytest.approx(entropy, abs=0.015), "smoothing keeps them from being fooled"


def test_copy_share_is_that_of_the_data():
    """80 % copies, otherwise a uniform draw of 1000 tokens."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 1000, (400, 1, 2, 4, 4), generator=generator)
    is_copy = torch.rand(400, 1, 4, 4, generator=generator) < 0.8
    tokens[:, :, 1] = torch.where(is_copy, tokens[:, :, 0], tokens[:, :, 1])
    baselines = TokenBaselines(1000, 1)
    baselines.update(tokens[:300])
    assert baselines.fit()["copy_share"] == pytest.approx(0.8, abs=0.02)
    nats = {name: value.mean().item() for name, value in baselines.nats(tokens[300:]).items()}
    held = (tokens[300:, :, 1] == tokens[300:, :, 0]).double().mean().item()
    best = -held * math.log(0.8 + 0.2 / 1000) - (1 - held) * math.log(0.2 / 1000)
    assert nats["copy_previous"] == pytest.approx(best, abs=0.06)
    assert nats["copy_previous"] < nats["bigram"] < nats["unigram"]


def test_bigrams_learn_what_follows():
    """At the same place every token is followed by its successor; in raster order nothing is."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(0, 50, (300, 1, 1, 3, 3), generator=generator)
    tokens = torch.cat([first, (first + 1) % 50, (first + 2) % 50], dim=2)
    nats = {name: v.mean().item() for name, v in fitted(tokens[:200], 50, 2).nats(tokens[200:]).items()}
    assert nats["bigram"] < 0.1
    assert nats["unigram"] == pytest.approx(math.log(50), abs=0.05)
    assert nats["copy_previous"] == pytest.approx(nats["unigram"], abs=0.02)
    assert nats["bigram_raster"] > 3
    row = torch.arange(18).reshape(1, 1, 2, 3, 3).expand(200, -1, -1, -1, -1)
    shifted = (row + torch.randint(0, 50, (200, 1, 1, 1, 1), generator=generator)) % 50
    raster = {name: v.mean().item() for name, v in fitted(shifted[:150], 50).nats(shifted[150:]).items()}
    assert raster["bigram_raster"] < 0.1


def test_unseen_tokens_cost_something_finite():
    baselines = fitted(torch.zeros(4, 1, 2, 2, 2, dtype=torch.long), 64000)
    nats = baselines.nats(torch.full((1, 1, 2, 2, 2), 63999))
    for name in NAMES:
        assert torch.isfinite(nats[name]).all()
    assert nats["unigram"].min() > 5
    # every training token is a copy, so all that remains for "no copy" is the one that is added to the data
    assert nats["copy_previous"].max() < 1


def test_smoothing_is_that_of_leave_one_out():
    """The constants that fit() takes are better on held-out data than ones a thousand times smaller or larger."""
    tokens = skewed(60, (1, 2, 4, 4), 300, seed=6)
    baselines = fitted(tokens[:40], 300)
    assert baselines._unigram is not None
    chosen = baselines._unigram.alpha
    scores = {}
    for factor in (1e-3, 1.0, 1e3):
        baselines._unigram.alpha = chosen * factor
        scores[factor] = baselines.nats(tokens[40:])["unigram"].mean().item()
    assert scores[1.0] < scores[1e-3]
    assert scores[1.0] < scores[1e3]


def test_misuse():
    with pytest.raises(ValueError, match="scored from 0 on"):
        TokenBaselines(10, 0)
    with pytest.raises(ValueError, match="no training tokens"):
        TokenBaselines(10, 1).fit()
