"""Positions of video tokens: three-axis or plain rotary turns (with YaRN), and the absolute embedding, as in Cosmos AR.

A sequence is [BOV,] then the tokens of latent 0, 1, ..., each (v h w). Channel j of a head turns with channel
j + head_dim/2 (the "two halves" form of Llama). Angles are float64. BOV has angle zero, like token (0, 0, 0); with
three axes views share their positions, with one axis the position is the place in the sequence.

Two slips of the released code are not repeated: nothing is turned in adjacent pairs, and YaRN's magnitude factor,
which the released video networks never apply, is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.layout import Grid, grid_positions
from longtake.networks.rope import axis_widths

RopeKind = Literal["3d", "1d"]


@dataclass(frozen=True)
class Yarn:
    """Stretched rotary frequencies for a grid longer than the one trained first (Peng et al. 2023).

    Attributes:
        scale: how many times longer.
        original: latent frames, rows and columns of the first grid. Rows and columns both use the rows, as released.
        beta_fast: turns over the first grid above which a frequency stays as it is.
        beta_slow: turns below which it is divided by `scale`.
    """

    scale: float
    original: tuple[int, int, int]
    beta_fast: float = 4.0
    beta_slow: float = 1.0

    def factors(self, frequencies: Tensor, length: int) -> Tensor:
        """Returns what to multiply frequencies with, for an axis that was `length` long."""
        high, low = (2 * math.pi * beta / length for beta in (self.beta_fast, self.beta_slow))
        keep = ((frequencies - low) / (high - low)).clamp(0, 1)
        return (1 - keep) / self.scale + keep


def rotary_frequencies(head_dim: int, theta: float, kind: RopeKind, yarn: Yarn | None = None) -> Tensor:
    """Returns turns per unit of position, float64: "3d" [3 hd/2], zero outside of a row's own axis, "1d" [1 hd/2].

    Args:
        head_dim: channels of a head; 128 is split into 44 for time, 42 for rows and 42 for columns.
        theta: base of the frequencies.
        kind: "3d" or "1d".
        yarn: how they are stretched; for "3d" only.
    """
    if kind == "1d":
        return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)[None]
    table = torch.zeros(3, head_dim // 2, dtype=torch.float64)
    start = 0
    for axis, width in enumerate(axis_widths(head_dim)):
        frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        if yarn is not None:
            frequencies = frequencies * yarn.factors(frequencies, yarn.original[min(axis, 1)])
        table[axis, start : start + width // 2] = frequencies
        start += width // 2
    return table


@dataclass(frozen=True)
class TokenTables:
    """What every place of a sequence adds and how far it turns; row 0 is BOV where there is one.

    Attributes:
        cos: [n 1 hd], the halves alike; [b n heads hd] where samples and heads have positions of their own.
        sin: as `cos`, the first half negative.
        added: absolute embedding [n d]; None: none.
    """

    cos: Tensor
    sin: Tensor
    added: Tensor | None

    def rows(self, where: slice | Tensor) -> TokenTables:
        """Returns the tables of some places: a slice, or indices [b n]."""
        added = None if self.added is None else self.added[where]
        if self.cos.ndim == 3:
            return TokenTables(self.cos[where], self.sin[where], added)
        if isinstance(where, slice):
            return TokenTables(self.cos[:, where], self.sin[:, where], added)
        sample = torch.arange(len(where), device=where.device)[:, None]
        cos, sin = (table.expand(len(where), -1, -1, -1)[sample, where] for table in (self.cos, self.sin))
        return TokenTables(cos, sin, added)

    @property
    def places(self) -> int:
        """Places of the sequence."""
        return self.cos.shape[-3]


def token_tables(
    grid: Grid,
    frequencies: Tensor,
    *,
    bov: bool,
    abs_dim: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    shift: Tensor | None = None,
    moved: Sequence[bool] = (True,),
) -> TokenTables:
    """Returns the tables of a whole sequence.

    Args:
        grid: views, latent frames, rows and columns of the sequence.
        frequencies: from `rotary_frequencies`.
        bov: whether BOV comes first.
        abs_dim: width of the absolute embedding; None: none.
        dtype: of the activations.
        device: where the tables go.
        shift: how far rows and columns of each latent frame are moved, [b t 2]; three axes only. BOV stays.
        moved: which heads (of queries, then of keys) that holds for.
    """
    frame = Grid(grid.views, 1, grid.height, grid.width)
    positions = grid_positions(torch.arange(grid.frames), frame).flatten(0, 1)  # [n 3]
    offset = torch.zeros(int(bov), 3, dtype=torch.int64)
    places = torch.cat((offset, positions)).double()
    if len(frequencies) == 1:
        angles = torch.arange(len(places), dtype=torch.float64)[:, None] * frequencies
    elif shift is None:
        angles = places @ frequencies
    else:
        own = shift.double()[:, : grid.frames].repeat_interleave(grid.tokens // grid.frames, dim=1)
        own = F.pad(own, (1, 0, int(bov), 0)).unsqueeze(2) * torch.tensor(moved, device=device)[:, None]
        angles = (places.to(device).unsqueeze(1) + own) @ frequencies.to(device)  # [b n heads hd/2]
    cos, sin = angles.cos(), angles.sin()
    added = None
    if abs_dim is not None:
        added = absolute_embedding(positions, abs_dim)
        added = torch.cat((added.new_zeros(int(bov), abs_dim), added)).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    turns, signed = (table.unsqueeze(-2) if shift is None else table for table in both)
    return TokenTables(turns.to(device, wide), signed.to(device, wide), added)


def absolute_embedding(positions: Tensor, dim: int) -> Tensor:
    """Returns [n d] float64: for time, rows and columns each [sin | cos] of position x 10000^(-i / half width)."""
    parts = []
    for axis, width in enumerate(axis_widths(dim)):
        half = width // 2
        turns = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = positions[:, axis, None].double() * turns
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1)


def rotate_halves(x: Tensor, tables: TokenTables) -> Tensor:
    """Returns `x` [b n heads hd] turned, in its own dtype."""
    turned = torch.addcmul(x * tables.cos, x.roll(x.shape[-1] // 2, -1), tables.sin)
    return turned.to(x.dtype)


def checked_yarn(yarn: Yarn | dict | None, kind: RopeKind) -> Yarn | None:
    """Returns the stretching that a config asks for.

    Raises:
        ConfigError: with one axis, or with values that cannot be.
    """
    if yarn is None:
        return None
    made = yarn if isinstance(yarn, Yarn) else Yarn(**{**yarn, "original": _three(yarn["original"])})
    if kind != "3d" or made.scale <= 0 or made.beta_fast <= made.beta_slow:
        raise ConfigError(
            f"network.yarn is {made} with network.rope={kind}; expected rope 3d, a positive scale and beta_fast above "
            "beta_slow. Change `network.yarn` or `network.rope`."
        )
    return made


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    time, rows, columns = values
    return int(time), int(rows), int(columns)
