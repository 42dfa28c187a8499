"""Finite scalar quantisation: its golden tokens, that packing is one to one, its bounds and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.encoders.fsq import FSQ
from longtake.errors import ConfigError

LEVELS = (8, 8, 8, 5, 5, 5)


@pytest.fixture
def fsq() -> FSQ:
    return FSQ(LEVELS)


@pytest.mark.parametrize(("z", "token"), [(0.0, 32036), (-math.inf, 0), (math.inf, 63999)])
def test_golden_tokens(fsq: FSQ, z: float, token: int) -> None:
    codes = fsq(torch.full((2, 3, 6), z))
    assert (fsq.tokens(codes) == token).all()


def test_zero_has_the_middle_digits_and_the_code_zero(fsq: FSQ) -> None:
    assert fsq.digits(torch.tensor(32036)).tolist() == [4, 4, 4, 2, 2, 2]
    assert not fsq.codes(torch.tensor(32036)).any()


def test_every_token_has_its_own_code(fsq: FSQ) -> None:
    tokens = torch.arange(fsq.vocab_size)
    codes = fsq.codes(tokens)
    assert fsq.vocab_size == 64000
    assert torch.equal(fsq.tokens(codes), tokens)
    assert torch.equal(fsq.tokens(codes.bfloat16()), tokens)  # multiples of 1/4 and 1/2
    assert codes[:, :3].unique().tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    assert codes[:, 3:].unique().tolist() == [-1, -0.5, 0, 0.5, 1]


def test_the_first_digit_counts_least(fsq: FSQ) -> None:
    basis = [1, 8, 64, 512, 2560, 12800]
    for channel, weight in enumerate(basis):
        assert fsq.digits(torch.tensor(weight)).tolist() == [int(channel == other) for other in range(6)]
    tokens = torch.arange(fsq.vocab_size)
    assert torch.equal(tokens % 512, (fsq.digits(tokens)[:, :3] * torch.tensor([1, 8, 64])).sum(-1))


def test_bounds(fsq: FSQ) -> None:
    low, high = fsq.bound(torch.full((6,), -100.0)), fsq.bound(torch.full((6,), 100.0))
    torch.testing.assert_close(low, torch.tensor([-4.0035] * 3 + [-2.002] * 3))
    torch.testing.assert_close(high, torch.tensor([3.0035] * 3 + [2.002] * 3))
    torch.testing.assert_close(fsq.bound(torch.zeros(6)), torch.zeros(6), rtol=0, atol=1e-6)


def test_the_gradient_passes_the_rounding(fsq: FSQ) -> None:
    z = torch.linspace(-2, 2, 11)[:, None].repeat(1, 6).requires_grad_()
    fsq(z).sum().backward()
    half = (torch.tensor(LEVELS) - 1) * 1.001 / 2
    shift = torch.tensor([math.atanh(0.5 / 3.5035)] * 3 + [0.0] * 3)
    expected = (1 - torch.tanh(z.detach() + shift).square()) * half / torch.tensor([4, 4, 4, 2, 2, 2])
    torch.testing.assert_close(z.grad, expected)
    assert shift[0] == pytest.approx(0.143695, abs=1e-6)


def test_it_computes_in_float32_whatever_it_is_given(fsq: FSQ) -> None:
    z = torch.randn(50, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        codes = fsq(z)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, fsq(z.float()))


@pytest.mark.parametrize("levels", [(), (8, 1), (2.5,)])
def test_levels_that_are_none_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected whole numbers of 2 or more"):
        FSQ(levels)
