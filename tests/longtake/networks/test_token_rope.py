"""Positions of tokens: goldens of the released networks."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.networks.layout import Grid
from longtake.networks.token_rope import Yarn, absolute_embedding, rotary_frequencies, rotate_halves, token_tables


def test_the_split_is_44_42_42() -> None:
    table = rotary_frequencies(128, 500000.0, "3d")
    assert table.shape == (3, 64)
    assert [(row > 0).sum().item() for row in table] == [22, 21, 21]
    assert torch.equal((table > 0).sum(dim=0), torch.ones(64, dtype=torch.int64))
    assert table[0, 1].item() == pytest.approx(500000 ** (-2 / 44))
    assert table[1, 23].item() == pytest.approx(500000 ** (-2 / 42))


def test_yarn_factors_of_the_12b() -> None:
    yarn = Yarn(scale=2.0, original=(3, 40, 64))
    stretched = rotary_frequencies(128, 500000.0, "3d", yarn) / rotary_frequencies(128, 500000.0, "3d")
    time, rows, columns = stretched[0, :22], stretched[1, 22:43], stretched[2, 43:]
    assert torch.allclose(time, torch.full_like(time, 0.5))
    assert rows[:5].tolist() == pytest.approx([1.0, 0.901, 0.637, 0.5, 0.5], abs=1e-3)
    assert torch.equal(rows, columns)


def test_tables_of_a_small_grid() -> None:
    grid = Grid(views=1, frames=2, height=2, width=3)
    frequencies = rotary_frequencies(24, 10000.0, "3d")
    tables = token_tables(grid, frequencies, bov=True, abs_dim=96, dtype=torch.float32, device="cpu")
    assert tables.cos.shape == (13, 1, 24)
    assert torch.equal(tables.cos[0], torch.ones(1, 24))  # BOV does not turn, nor does (0, 0, 0)
    assert torch.equal(tables.cos[0], tables.cos[1])
    assert tables.added is not None
    assert bool((tables.added[0] == 0).all())
    assert bool((tables.added[1] != 0).any())
    place = 1 + 6 + 3 + 2  # (1, 1, 2)
    angles = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64) @ frequencies
    assert torch.allclose(tables.cos[place, 0, :12].double(), angles.cos(), atol=1e-7)
    assert torch.allclose(tables.sin[place, 0].double(), torch.cat((-angles.sin(), angles.sin())), atol=1e-7)


def test_moved_positions_are_other_positions() -> None:
    """A latent that is moved by whole rows and columns has the tables of where it then lies; samples on their own."""
    grid, frequencies = Grid(views=2, frames=2, height=2, width=3), rotary_frequencies(24, 100.0, "3d")
    settings = {"abs_dim": None, "dtype": torch.float32, "device": "cpu"}
    shift = torch.tensor([[[0, 0], [0, 0]], [[1, 2], [0, 5]]]).float()
    moved = token_tables(grid, frequencies, bov=True, shift=shift, **settings)
    plain = token_tables(Grid(2, 2, 3, 8), frequencies, bov=True, **settings)
    heads = token_tables(grid, frequencies, bov=True, shift=shift, moved=(False, True), **settings)
    assert moved.cos.shape == (2, 25, 1, 24)
    assert heads.cos.shape == (2, 25, 2, 24)
    assert torch.equal(heads.cos[:, :, 1:], moved.cos)
    assert torch.equal(heads.cos[1, :, :1], moved.cos[0])

    def place(frame: int, row: int, column: int, width: int, height: int) -> int:
        return 1 + ((frame * 2 + 1) * height + row) * width + column  # of view 1

    assert torch.equal(moved.cos[0], token_tables(grid, frequencies, bov=True, **settings).cos)
    for frame, (rows, columns) in enumerate(shift[1].long().tolist()):
        here, there = place(frame, 1, 2, 3, 2), place(frame, 1 + rows, 2 + columns, 8, 3)
        assert torch.allclose(moved.sin[1, here], plain.sin[there], atol=1e-6)
    assert torch.equal(moved.cos[1, 0], torch.ones(1, 24))  # BOV stays
    where = torch.tensor([[3, 4], [7, 20]])
    assert torch.equal(moved.rows(where).cos, torch.stack((moved.cos[0, [3, 4]], moved.cos[1, [7, 20]])))
    assert torch.equal(moved.rows(slice(2, 5)).sin, moved.sin[:, 2:5])


def test_halves_are_paired() -> None:
    """Channel j turns with channel j + hd/2, as a complex number."""
    tables = token_tables(
        Grid(1, 3, 1, 1), rotary_frequencies(8, 100.0, "1d"), bov=False, abs_dim=None, dtype=torch.float64, device="cpu"
    )
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    turned = rotate_halves(x, tables)
    angles = torch.arange(3)[:, None] * 100.0 ** -(torch.arange(4) / 4)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(1).double(), angles[:, None].double())
    assert torch.allclose(turned, torch.cat((expected.real, expected.imag), dim=-1), atol=1e-6)


def test_absolute_embedding_is_sine_then_cosine_for_each_axis() -> None:
    added = absolute_embedding(torch.tensor([[2, 3, 5]]), 96)[0]
    assert added.shape == (96,)
    assert added[0].item() == pytest.approx(math.sin(2))
    assert added[16].item() == pytest.approx(math.cos(2))
    assert added[32].item() == pytest.approx(math.sin(3))
    assert added[64 + 1].item() == pytest.approx(math.sin(5 * 10000 ** (-1 / 16)))
    assert added[64 + 16].item() == pytest.approx(math.cos(5))
