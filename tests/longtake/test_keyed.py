"""Keyed draws: pure, well spread, and permutations that are permutations."""

from __future__ import annotations

from collections import Counter

import pytest

from longtake.keyed import keyed_below, keyed_bits, permuted


def chi_square(counts: Counter, cells: int) -> float:
    """Returns the chi-square statistic of counts against equal shares."""
    expected = sum(counts.values()) / cells
    missing = cells - len(counts)
    return sum((count - expected) ** 2 / expected for count in counts.values()) + missing * expected


def test_equal_keys_give_equal_bits_for_ever() -> None:
    # Golden values: a change here would silently change the data order and the noise of every resumed run.
    assert keyed_bits(0, "order", "a", 3) == 5159709120086697554
    assert keyed_bits() == 13020603013274838756
    assert [permuted(i, 10, 42) for i in range(10)] == [6, 7, 0, 8, 9, 4, 1, 2, 5, 3]


def test_types_and_borders_of_the_parts_matter() -> None:
    assert keyed_bits(1, "2") != keyed_bits("1", 2)
    assert keyed_bits("ab", "c") != keyed_bits("a", "bc")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 1000])
def test_permuted_is_a_permutation(size: int) -> None:
    assert sorted(permuted(index, size, 99) for index in range(size)) == list(range(size))


def test_all_permutations_of_four_are_equally_likely() -> None:
    counts = Counter(tuple(permuted(i, 4, keyed_bits("epoch", e)) for i in range(4)) for e in range(12_000))
    assert chi_square(counts, 24) < 49.7  # p = 0.001 at 23 degrees of freedom


@pytest.mark.parametrize("index", [0, 499, 999])
def test_where_an_element_goes_is_uniform(index: int) -> None:
    counts = Counter(permuted(index, 1000, keyed_bits(7, epoch)) // 50 for epoch in range(10_000))
    assert chi_square(counts, 20) < 43.8  # p = 0.001 at 19 degrees of freedom


def test_neighbours_do_not_stay_neighbours() -> None:
    steps = Counter(
        (permuted(i + 1, 1000, keyed_bits(3, e)) - permuted(i, 1000, keyed_bits(3, e))) % 1000
        for e in range(20)
        for i in range(500)
    )
    assert max(steps.values()) < 40  # 10 expected


def test_keyed_below_is_uniform() -> None:
    assert chi_square(Counter(keyed_below(7, "x", i) for i in range(7000)), 7) < 22.5  # p = 0.001
