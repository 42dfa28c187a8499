"""Scores and joint distributions of the output heads."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from longtake.errors import ConfigError
from longtake.networks import token_head
from longtake.networks.token_head import ChainHead, FactorisedHead, FullHead, digits_of

DIM, VOCAB = 12, 60
HEADS = {
    "full": FullHead,
    "factorised": partial(FactorisedHead, factors=(12, 5)),
    "chain": partial(ChainHead, factors=(3, 4, 5), width=8),
}


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_the_joint_distribution(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name](DIM, VOCAB)
    hidden = torch.randn(2, 3, DIM)
    joint = head.logits(hidden).log_softmax(dim=-1)
    assert joint.shape == (2, 3, VOCAB)
    for code in range(VOCAB):
        scores = head.log_probs_of(hidden, torch.full((2, 3), code))
        assert torch.allclose(scores, joint[..., code], atol=1e-5)
    if name != "full":  # factors are normalised
        assert torch.allclose(head.logits(hidden).logsumexp(dim=-1), torch.zeros(2, 3), atol=1e-5)


def test_digits_have_the_order_of_fsq() -> None:
    codes = torch.arange(64000)
    digits = digits_of(codes, (8, 8, 8, 5, 5, 5))
    assert [int(digit[32036]) for digit in digits] == [4, 4, 4, 2, 2, 2]
    low, high = digits_of(codes, (512, 125))
    assert torch.equal(low, codes % 512)
    assert torch.equal(high, codes // 512)


def test_the_independent_head_is_the_sum_of_its_factors() -> None:
    torch.manual_seed(0)
    head = FactorisedHead(DIM, VOCAB, factors=(12, 5))
    hidden, codes = torch.randn(7, DIM), torch.randint(0, VOCAB, (7,))
    low, high = head.output(hidden).split((12, 5), dim=-1)
    expected = F.cross_entropy(low, codes % 12, reduction="none") + F.cross_entropy(high, codes // 12, reduction="none")
    scores = head.score(hidden, codes)
    assert torch.allclose(-scores.log_probs, expected, atol=1e-5)
    assert torch.allclose(scores.z, low.logsumexp(-1).square() + high.logsumexp(-1).square(), atol=1e-4)


@pytest.mark.parametrize(("factors", "nats"), [((512, 125), 11.066638), ((8, 8, 8, 5, 5, 5), 11.066638)])
def test_uniform_costs_the_logarithm_of_the_vocabulary(factors: tuple[int, ...], nats: float) -> None:
    for kind in (FactorisedHead, ChainHead):
        head = kind(DIM, 64000, factors=factors)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        loss = -head.log_probs_of(torch.randn(3, DIM), torch.tensor([0, 32036, 63999]))
        assert loss.tolist() == pytest.approx([nats] * 3, abs=1e-5)
    assert math.log(64000) == pytest.approx(nats, abs=1e-6)


def test_the_chain_learns_dependence_that_independent_factors_cannot() -> None:
    """Codes whose two digits always agree: log 5 nats jointly, 2 log 5 for independent factors."""
    torch.manual_seed(0)
    codes = 6 * torch.randint(0, 5, (512,))
    hidden = torch.zeros(512, DIM)
    losses = {}
    for kind in (FactorisedHead, ChainHead):
        head = kind(DIM, 25, factors=(5, 5))
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        for _ in range(150):
            loss = -head.log_probs_of(hidden, codes).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = float(loss.detach())
    assert losses[ChainHead] == pytest.approx(math.log(5), abs=0.02)
    assert losses[FactorisedHead] == pytest.approx(2 * math.log(5), abs=0.02)


@pytest.mark.parametrize("name", HEADS)
def test_scoring_in_chunks_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = HEADS[name](DIM, VOCAB)
    hidden, codes = torch.randn(5, 9, DIM), torch.randint(0, VOCAB, (5, 9))
    results = []
    for held in (1 << 24, 200):
        monkeypatch.setattr(token_head, "CHUNK_LOGITS", held)
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        scores = head.score(leaf, codes)
        (scores.log_probs.sum() + scores.z.sum()).backward()
        results.append((scores.log_probs.detach(), leaf.grad, head.logits(hidden).detach()))
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_scores_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = FullHead(DIM, VOCAB)
    hidden, codes = torch.randn(4, DIM), torch.randint(0, VOCAB, (4,))
    expected = F.cross_entropy(F.linear(hidden, head.output.weight), codes, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        scores = head.log_probs_of(hidden, codes)
    assert scores.dtype == torch.float32
    assert torch.allclose(-scores, expected, atol=1e-6)
    low = FullHead(DIM, VOCAB).bfloat16()
    assert low.logits(hidden.bfloat16()).dtype == torch.float32


def test_factors_must_make_the_vocabulary() -> None:
    for kind in (FactorisedHead, ChainHead):
        with pytest.raises(ConfigError, match="network.head.factors"):
            kind(DIM, 64000, factors=(512, 124))
