"""Speculative decoding has the distribution of plain decoding, and a wrong rule of acceptance is found out."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

from longtake.networks.token_head import FullHead
from longtake.networks.token_transformer import TokenTransformer, token_layout
from longtake.rollout.jacobi import JacobiRollout
from longtake.rollout.noise import NoiseKey
from longtake.rollout.sampling import Sampler
from longtake.rollout.tokens import TokenRollout
from longtake.types import Conditions
from tests.longtake.networks.tiny_tokens import make
from tests.longtake.rollout.test_tokens import key, rolled, start

VOCAB, GRID, DRAWS = 3, (2, 2, 3), 10_000
SEEDS = (1, 2, 3, 4, 5)
SETTINGS = [{"temperature": 1.0, "top_p": 1.0}, {"temperature": 1.3, "top_p": 0.8}]


@cache
def network() -> TokenTransformer:
    torch.manual_seed(0)
    made = TokenTransformer(
        dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=12,
        ffn_dim=32,
        vocab_size=VOCAB,
        grid_lat=GRID,
        head=FullHead,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 2.0 * parameter.shape[1] ** -0.5)
    return made


CONTEXT = torch.tensor([0, 2, 1, 1, 0, 2]).view(1, 1, 1, 2, 3)


def exact(settings: dict[str, float]) -> Tensor:
    """Probabilities of all 729 second latents: the product of the truncated steps, from full passes."""
    futures = torch.tensor(list(itertools.product(range(VOCAB), repeat=6)))
    x = torch.cat((CONTEXT.flatten().expand(len(futures), -1), futures), dim=1).view(-1, 2, 1, 1, 2, 3)
    with torch.no_grad():
        hidden, _ = network()(x, Conditions(), token_layout(2, views=1, height=2, width=3))
        truncated = Sampler(**settings).truncated(network().head.logits(hidden[:, 1]).flatten(0, 1))
    return truncated.prob_of(futures.flatten()).view(-1, 6).double().prod(dim=1)


def p_value(rollout: TokenRollout, seed: int, probs: Tensor) -> float:
    """Chi-square of 10,000 draws against exact probabilities; cells with fewer than 5 expected are one cell."""
    context = CONTEXT.expand(DRAWS, -1, -1, -1, -1).contiguous()
    frames = list(rollout(network(), context, Conditions(), 2, NoiseKey(seed, tuple(range(DRAWS)))))
    powers = VOCAB ** torch.arange(5, -1, -1)
    counts = torch.bincount((frames[1].tokens.flatten(1) * powers).sum(dim=1), minlength=len(probs)).double()
    expected = probs * DRAWS
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if float(expected[-1]) < 1e-3:  # nothing may fall where the nucleus has nothing
        assert float(counts[-1]) <= 1 or isinstance(rollout, Broken)
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


class Broken(JacobiRollout):
    """Keeps guesses a fifth too often."""

    def keeps(self, p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
        return uniform * q < 1.2 * p


@pytest.mark.parametrize(("settings", "draft"), list(zip(SETTINGS, ["previous", "above"], strict=True)))
def test_the_distribution_is_that_of_plain_decoding(settings: dict[str, float], draft: str) -> None:
    probs = exact(settings)
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    rollout = JacobiRollout(**settings, window=4, draft=draft)  # type: ignore[arg-type]
    values = [p_value(rollout, seed, probs) for seed in SEEDS]
    assert sum(value > 0.01 for value in values) >= 4, values


def test_plain_decoding_has_it_too() -> None:
    values = [p_value(TokenRollout(**SETTINGS[1]), seed, exact(SETTINGS[1])) for seed in SEEDS]
    assert sum(value > 0.01 for value in values) >= 4, values


def test_a_broken_rule_is_found_out() -> None:
    values = [p_value(Broken(**SETTINGS[0], window=4), seed, exact(SETTINGS[0])) for seed in SEEDS]
    assert all(value < 1e-6 for value in values), values


@pytest.mark.parametrize("window", [2, 5, 16, 64])
@pytest.mark.parametrize("name", ["base", "bov", "factorised"])
def test_greedy_output_is_identical(name: str, window: int) -> None:
    model = make(name)
    plain = rolled(model, TokenRollout(temperature=0.0), start(3, 1), Conditions(), 3, key(3))
    for draft in ("previous", "above"):
        rollout = JacobiRollout(temperature=0.0, window=window, draft=draft)
        assert torch.equal(rolled(model, rollout, start(3, 1), Conditions(), 3, key(3)), plain)


def test_guesses_that_come_true_save_passes() -> None:
    """A network that always copies the previous latent frame needs one pass a window."""
    model = make("base")
    with torch.no_grad():  # no block does anything: the likeliest token follows from the one before
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        model.head.output.weight[0] = 1.0
        model.norm.weight.fill_(1.0)
        model.embedding.table.weight.fill_(1.0)
    context = torch.zeros(2, 1, 1, 4, 4, dtype=torch.int64)
    stream = JacobiRollout(temperature=0.0, window=16)(model, context, Conditions(), 3, key(2))
    assert all(bool((frame.tokens == 0).all()) for frame in stream)
    assert stream.stats.tokens == 64
    assert stream.stats.passes == 4
    assert stream.stats.passes_per_token == 1 / 16
