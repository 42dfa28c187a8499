"""Keyed noise: a known generator, a normal distribution, and nothing but the key decides."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from longtake.rollout.noise import Draws, NoiseKey, normal, philox, uniform, uniform_of_sample


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123, the authors' own implementation
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    counters, keys = ([torch.tensor([int(word, 16)]) for word in words.split()] for words in (counter, key))
    assert " ".join(f"{int(word):08x}" for word in philox(counters, keys)) == expected


def test_bits_are_the_same_for_ever() -> None:
    # A change here would silently change every rollout and the noise of every resumed run.
    noise = normal(NoiseKey(7, ("clip", 3)), "noise", Draws([0, 5], [0, 1], 2, 3), (16, 6, 8))
    digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
    assert digest[:16] == "2185cf02538d9651"
    assert uniform_of_sample(NoiseKey(7, (3,)), "sigma").item() == 0.30396595562342554


def test_numbers_are_standard_normal() -> None:
    x = (
        normal(NoiseKey(0, tuple(range(8))), "noise", Draws(list(range(4)), [0] * 4, 1, 3), (16, 12, 16))
        .double()
        .flatten()
    )
    n = len(x)
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    cdf = torch.special.ndtr(x.sort().values)
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, p = 0.001
    assert x.abs().max() > 4.2


def test_no_draw_repeats_or_follows_another() -> None:
    x = normal(NoiseKey(0, (0, 1, "0")), "noise", Draws([0, 1, 1], [0, 0, 1], 2, 2), (4, 16, 16)).double()
    rows = x.reshape(-1, 1024)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(1024)
    other = normal(NoiseKey(0, (0,)), "context", Draws([0], [0], 2, 2), (4, 16, 16)).double()
    assert abs(torch.corrcoef(torch.stack([other.flatten(), x[0, 0].flatten()]))[0, 1]) < 5 / math.sqrt(4096)
    neighbours = torch.corrcoef(torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(rows.numel())


def test_only_the_key_and_the_place_decide() -> None:
    size = (16, 5, 7)  # not a multiple of four numbers
    whole = normal(NoiseKey(1, ("a", "b", "c")), "noise", Draws(list(range(6)), [0] * 6, 3, 4), size)
    alone = normal(NoiseKey(1, ("b",)), "noise", Draws([4], [0], 3, 4), size)
    assert torch.equal(whole[1, 4], alone[0, 0])
    fewer = normal(NoiseKey(1, ("c", "a")), "noise", Draws([4, 2], [0, 0], 2, 3), size)
    assert torch.equal(fewer[0, 1], whole[2, 2, :2, :3])
    assert not torch.equal(normal(NoiseKey(2, ("b",)), "noise", Draws([4], [0], 3, 4), size), alone)
    levels = uniform(NoiseKey(1, (5, 6)), "sigma", Draws([0, 1], [0, 0]))
    assert torch.equal(levels[1:, 1:], uniform(NoiseKey(1, (6,)), "sigma", Draws([1], [0])))


def test_uniform_is_uniform_and_open() -> None:
    u = uniform(NoiseKey(3, tuple(range(2000))), "sigma", Draws([0, 1, 2], [0, 0, 0])).flatten()
    assert u.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    distance = (u.sort().values - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()
    assert distance * math.sqrt(len(u)) < 1.95


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    key, draws = NoiseKey(7, (1, 2)), Draws([0, 5], [0, 1], 2, 3)
    assert torch.equal(
        normal(key, "noise", draws, (16, 30, 52), "cuda").cpu(), normal(key, "noise", draws, (16, 30, 52))
    )
