"""Random draws that are pure functions of a key, whatever was drawn before, on whichever rank or machine.

A draw is named by everything that it may depend on, (seed, purpose, plan position, ...), and by nothing else. So a
resumed run, another batch size or another number of processes repeats it exactly, and no generator state is saved.
"""

from __future__ import annotations

import hashlib

MASK64 = (1 << 64) - 1


def keyed_bits(*key: int | str) -> int:
    """Returns 64 random bits for a key of integers and strings. Equal keys give equal bits on every platform."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_below(bound: int, *key: int | str) -> int:
    """Returns an integer in [0, bound) for a key. The bias of the modulo is below bound / 2**64."""
    assert bound > 0, f"keyed_below needs a positive bound, got {bound} for key {key}"
    return keyed_bits(*key) % bound


def permuted(index: int, size: int, key: int) -> int:
    """Returns where `index` goes under the pseudo-random permutation of range(size) that `key` names.

    A Feistel network on the smallest even number of bits that holds `size`, walked until the value falls inside the
    range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). One value costs a few microseconds and no
    memory, so a plan over 10**9 samples can be entered at any position.

    Args:
        index: in [0, size).
        size: number of elements.
        key: 64-bit key of the permutation.
    """
    assert 0 <= index < size, f"index {index} is outside of range({size})"
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for round_number in range(8):
            left, right = right, left ^ (_mix(right ^ key ^ (round_number * 0x9E3779B97F4A7C15)) & mask)
        value = (left << half_bits) | right
        if value < size:
            return value


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit flips half of the output bits."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)
