"""Speculative decoding has the distribution of plain decoding, and a wrong rule of acceptance is found out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from longtake.networks.token_head import FactorisedHead, FullHead
from longtake.networks.token_transformer import TokenTransformer, token_layout
from longtake.rollout.jacobi import CANDIDATES, Before, JacobiRollout, residual_draw
from longtake.rollout.noise import NoiseKey
from longtake.rollout.sampling import Sampler, Truncated
from longtake.rollout.tokens import TokenRollout
from longtake.types import Conditions
from tests.longtake.networks.tiny_tokens import make
from tests.longtake.rollout.test_tokens import key, rolled, start

DRAWS = 10_000
SEEDS = (1, 2, 3, 4, 5)
SETTINGS = [{"temperature": 1.0, "top_p": 1.0}, {"temperature": 1.3, "top_p": 0.8}]


@dataclass(frozen=True)
class Case:
    """A network small enough that all its second latents can be listed."""

    network: TokenTransformer
    context: Tensor

    @property
    def tokens(self) -> int:
        return self.context.numel()


@cache
def case(head: str) -> Case:
    """729 futures of 6 tokens with one logit a code, 1,296 of 4 tokens with two factors."""
    vocab, grid = (3, (2, 2, 3)) if head == "full" else (6, (2, 2, 2))
    torch.manual_seed(0)
    made = TokenTransformer(
        dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=12,
        ffn_dim=32,
        vocab_size=vocab,
        grid_lat=grid,
        head=FullHead if head == "full" else partial(FactorisedHead, factors=(3, 2)),
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 2.0 * parameter.shape[1] ** -0.5)
    rows, columns = grid[1:]
    return Case(made, torch.tensor([0, 2, 1, 1, 0, 2][: rows * columns]).view(1, 1, 1, rows, columns))


def exact(case: Case, settings: dict[str, float]) -> Tensor:
    """Probabilities of all second latents: the product of the truncated steps, from full passes."""
    n, (_, _, _, rows, columns) = case.tokens, case.context.shape
    futures = torch.tensor(list(itertools.product(range(case.network.vocab_size), repeat=n)))
    x = torch.cat((case.context.flatten().expand(len(futures), -1), futures), dim=1)
    with torch.no_grad():
        layout = token_layout(2, views=1, height=rows, width=columns)
        hidden, _ = case.network(x.view(-1, 2, 1, 1, rows, columns), Conditions(), layout)
        truncated = Sampler(**settings).truncated(case.network.head.logits(hidden[:, 1]).flatten(0, 1))
    return truncated.prob_of(futures.flatten()).view(-1, n).double().prod(dim=1)


def p_value(case: Case, rollout: TokenRollout, seed: int, probs: Tensor) -> float:
    """Chi-square of 10,000 draws against exact probabilities; cells with fewer than 5 expected are one cell."""
    context = case.context.expand(DRAWS, -1, -1, -1, -1).contiguous()
    frames = list(rollout(case.network, context, Conditions(), 2, NoiseKey(seed, tuple(range(DRAWS)))))
    powers = case.network.vocab_size ** torch.arange(case.tokens - 1, -1, -1)
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


@pytest.mark.parametrize("head", ["full", "factorised"])
@pytest.mark.parametrize(("settings", "draft"), list(zip(SETTINGS, ["previous", "above"], strict=True)))
def test_the_distribution_is_that_of_plain_decoding(settings: dict[str, float], draft: str, head: str) -> None:
    probs = exact(case(head), settings)
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    rollout = JacobiRollout(**settings, window=4, draft=draft)  # type: ignore[arg-type]
    values = [p_value(case(head), rollout, seed, probs) for seed in SEEDS]
    assert sum(value > 0.01 for value in values) >= 4, values


@pytest.mark.parametrize("head", ["full", "factorised"])
def test_plain_decoding_has_it_too(head: str) -> None:
    rollout, probs = TokenRollout(**SETTINGS[1]), exact(case(head), SETTINGS[1])
    values = [p_value(case(head), rollout, seed, probs) for seed in SEEDS]
    assert sum(value > 0.01 for value in values) >= 4, values


@pytest.mark.parametrize("head", ["full", "factorised"])
def test_a_broken_rule_is_found_out(head: str) -> None:
    rollout, probs = Broken(**SETTINGS[0], window=4), exact(case(head), SETTINGS[0])
    values = [p_value(case(head), rollout, seed, probs) for seed in SEEDS]
    assert all(value < 1e-6 for value in values), values


@pytest.mark.parametrize("distance", [0.5, 0.02])
@pytest.mark.parametrize("copied", [False, True])
def test_what_replaces_a_rejected_guess(distance: float, copied: bool) -> None:
    """Draws have the probabilities max(p - q, 0), whether one of the first candidates will do or none."""
    count, vocab = 200_000, 5
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    q = p + distance * torch.tensor([-0.7, -0.3, 0.5, 0.2, 0.3])
    numbers = torch.rand(count, 2 * CANDIDATES + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = Before(Truncated(None, q.expand(count, -1)), torch.full((count,), copied), torch.ones(count).long())
    drawn = residual_draw(Truncated(None, p.expand(count, -1)), before, numbers, vocab)
    expected = p * (torch.arange(vocab) != 1) if copied else (p - q).clamp(min=0)
    shares = torch.bincount(drawn, minlength=vocab) / count
    assert torch.allclose(shares, expected / expected.sum(), atol=5e-3)


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
