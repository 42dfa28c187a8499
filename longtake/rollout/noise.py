"""Keyed random draws on tensors: a pure function of (seed, sample, purpose, repeat, chunk, view, latent frame).

What was drawn before, the other samples of the batch, the number of chunks, the rank and the device do not enter, so a
resumed run, another batch size or a longer rollout repeats every draw.

Bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key names seed,
sample and purpose, the counter names element, chunk, frame, view and repeat. Normals come from the inverse of the
normal distribution function, piecewise quadratic between 2,048 nodes. Only integer operations, float32 additions and
float32 multiplications are used, one kernel each, all of them exact or correctly rounded by IEEE 754. So the bits are
the same on every processor and device, which those of erfinv, log and cos are not. (In a compiled region a fused
multiply-add could change the last bit: draw outside of it.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from longtake.keyed import keyed_bits

_MASK32 = 0xFFFFFFFF
_MANTISSA_BITS = 6  # of the float32 pattern that choose a node: 64 nodes an octave
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = 126 << _MANTISSA_BITS  # the node of 0.5, the smallest magnitude
_OCTAVES = 32
_BLOCK = 1 << 16  # counters worked on at once on a CPU, so that they stay in its cache


@dataclass(frozen=True)
class NoiseKey:
    """What names the draws of a batch.

    Attributes:
        seed: the run's or the user's seed.
        samples: what tells the samples apart, one entry a sample: the position in the training plan, or a name.
    """

    seed: int
    samples: tuple[int | str, ...]

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.samples)

    @classmethod
    def of_positions(cls, seed: int, position: Tensor) -> NoiseKey:
        """Returns the key of a training batch from `Clip.position` [b]."""
        return cls(seed, tuple(int(value) for value in position.tolist()))


@dataclass(frozen=True)
class Draws:
    """Where in a sample numbers are wanted: the grid of slots (chunk, repeat), views and frames of a slot.

    Attributes:
        chunks: chunk index of each slot.
        repeats: noise repeat of each slot, 0 where there are none.
        views: number of views.
        frames: number of latent frames of a slot.
    """

    chunks: Sequence[int]
    repeats: Sequence[int]
    views: int = 1
    frames: int = 1

    def __post_init__(self) -> None:
        assert len(self.chunks) == len(self.repeats), f"{len(self.chunks)} chunks but {len(self.repeats)} repeats"
        assert self.views < 1 << 16, f"{self.views} views do not fit their 16 bits"
        assert self.frames < 1 << 16, f"{self.frames} frames of a slot do not fit their 16 bits"


def normal(
    key: NoiseKey, purpose: str, draws: Draws, size: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Returns standard normal numbers, float32 [b s v f *size], at most 6.4 in magnitude."""
    count = math.prod(size)
    numbers = _numbers(key, purpose, draws, count, device, _to_normal)
    return numbers.reshape(len(key), len(draws.chunks), draws.views, draws.frames, *size)


def uniform(key: NoiseKey, purpose: str, draws: Draws, size: Sequence[int] = ()) -> Tensor:
    """Returns uniform numbers strictly between 0 and 1, float64 [b s v f *size] on the CPU, multiples of 2**-33."""
    count = math.prod(size)
    numbers = _numbers(key, purpose, draws, count, "cpu", lambda words: (words.to(torch.float64) + 0.5) / 2**32)
    return numbers.reshape(len(key), len(draws.chunks), draws.views, draws.frames, *size)


def uniform_of_sample(key: NoiseKey, purpose: str) -> Tensor:
    """Returns one uniform number a sample, float64 [b] on the CPU."""
    return uniform(key, purpose, Draws([0], [0])).flatten()


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Returns the four 32-bit words of Philox4x32-10.

    Args:
        counter: four int64 tensors of 32-bit words; the first and the third of the full shape.
        key: two int64 tensors of 32-bit words that broadcast to it.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap as unsigned ones do; the mask undoes the sign that the shift drags in.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (p1 >> 32).bitwise_and_(_MASK32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_MASK32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_MASK32), p0.bitwise_and_(_MASK32)
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def _numbers(
    key: NoiseKey,
    purpose: str,
    draws: Draws,
    count: int,
    device: torch.device | str,
    convert: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns `count` numbers a row, [rows count] with rows = (b s v f), made by `convert` from 32-bit words."""
    counters, keys = _rows(key, purpose, draws, device)
    quads = -(-count // 4)
    element = torch.arange(quads, dtype=torch.int64, device=device)
    num_rows = len(counters[0])
    step = max(1, _BLOCK // quads) if element.device.type == "cpu" else num_rows
    parts = []
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        chunk, place, repeat = (column[part] for column in counters)
        words = philox(
            (element.expand(len(chunk), -1), chunk, place.expand(-1, quads), repeat), [k[part] for k in keys]
        )
        parts.append(torch.cat([convert(word) for word in words[:count]], dim=1))
    return torch.cat(parts)[:, :count]


def _rows(key: NoiseKey, purpose: str, draws: Draws, device: torch.device | str) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the counter words (chunk, view and frame, repeat) and the key words, int64 [rows 1] each."""
    shape = (len(key), len(draws.chunks), draws.views, draws.frames)

    def rows(values: Sequence[int], axis: int) -> Tensor:
        line = torch.tensor(list(values), dtype=torch.int64)
        return line.view([-1 if i == axis else 1 for i in range(4)]).expand(shape).reshape(-1, 1).to(device)

    hashed = [keyed_bits(purpose, key.seed, sample) for sample in key.samples]
    place = rows(range(draws.frames), 3) + (rows(range(draws.views), 2) << 16)
    counters = [rows(draws.chunks, 1), place, rows(draws.repeats, 1)]
    return counters, [rows([bits & _MASK32 for bits in hashed], 0), rows([bits >> 32 for bits in hashed], 0)]


def _to_normal(words: Tensor) -> Tensor:
    """Returns the normals of 32-bit words: the top bit is the sign, the rest the chance of a larger magnitude."""
    base, slope, curve = _quantiles(str(words.device))
    tail = (words & 0x7FFFFFFF).to(torch.float32) + 0.5  # times 2**-32
    bits = tail.view(torch.int32)
    node = (bits >> _SHIFT).sub_(_FIRST).flatten()
    where = (bits & ((1 << _SHIFT) - 1)).to(torch.float32).mul_(2.0**-_SHIFT).flatten()  # in [0, 1) from node to node
    magnitude = curve.index_select(0, node).mul_(where).add_(slope.index_select(0, node))
    magnitude.mul_(where).add_(base.index_select(0, node))
    sign = (words >> 31).mul_(-2).add_(1).flatten()
    return magnitude.mul_(sign).view(words.shape)


@functools.cache
def _quantiles(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns value, slope and curvature of the normal quantile from each node to the next, float32 [2049] each."""
    inverse = NormalDist().inv_cdf
    per_octave = 1 << _MANTISSA_BITS
    places = [0.5 - 0.5 * math.cos(math.pi * (2 * j + 1) / 6) for j in range(3)]  # Chebyshev nodes of a quadratic
    rows = []
    for index in range(_OCTAVES * per_octave):
        octave, part = divmod(index, per_octave)
        width = 2.0 ** (octave - 1 - 32) / per_octave
        y0, y1, y2 = (-inverse(width * (per_octave + part + place)) for place in places)
        x0, x1, x2 = places
        first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        curve = (second - first) / (x2 - x0)
        slope = first - curve * (x0 + x1)
        rows.append((y0 - x0 * (slope + curve * x0), slope, curve))
    rows.append((0.0, 0.0, 0.0))  # the tail probability 1/2, reached by rounding up
    base, slope, curve = torch.tensor(rows, dtype=torch.float64).to(torch.float32).to(device).unbind(1)
    return base.contiguous(), slope.contiguous(), curve.contiguous()
