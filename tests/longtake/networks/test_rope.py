"""Three-axis rotary positions."""

from __future__ import annotations

import pytest
import torch

from longtake.networks.layout import Grid, grid_positions
from longtake.networks.rope import axis_widths, rotary_table, rotate
from tests.longtake.networks.tiny import difference


@pytest.mark.parametrize(
    ("head_dim", "widths"), [(128, (44, 42, 42)), (20, (8, 6, 6)), (64, (24, 20, 20)), (4, (4, 0, 0))]
)
def test_split_of_the_head(head_dim: int, widths: tuple[int, int, int]) -> None:
    assert axis_widths(head_dim) == widths


def test_table_is_that_of_diffusers() -> None:
    embedding = pytest.importorskip("diffusers.models.transformers.transformer_wan").WanRotaryPosEmbed(
        20, (1, 1, 1), 64
    )
    cos, sin = embedding(torch.empty(1, 1, 5, 3, 4))
    positions = grid_positions(torch.tensor([0]), Grid(1, 5, 3, 4))[0]
    table = rotary_table(positions, 20, dtype=torch.float32)
    assert difference(table[..., 0], cos[0, :, 0, 0::2]) < 1e-6
    assert difference(table[..., 1], sin[0, :, 0, 1::2]) < 1e-6


def test_a_later_start_is_a_slice_of_the_whole() -> None:
    whole = rotary_table(grid_positions(torch.tensor([0]), Grid(1, 9, 2, 2))[0], 20, dtype=torch.float64)
    late = rotary_table(grid_positions(torch.tensor([6]), Grid(1, 3, 2, 2))[0], 20, dtype=torch.float64)
    assert torch.equal(whole[6 * 4 :], late)


def test_only_distances_matter_at_any_time() -> None:
    """Angles are float64: after a million latent frames scores are those at the beginning."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 12, 3, 20)
    scores = []
    for start in (0, 1_000_000):
        near = rotary_table(grid_positions(torch.tensor([start]), Grid(1, 3, 2, 2))[0], 20, dtype=torch.float32)
        far = rotary_table(grid_positions(torch.tensor([start + 3]), Grid(1, 3, 2, 2))[0], 20, dtype=torch.float32)
        scores.append(torch.einsum("lhd,mhd->hlm", rotate(q, far), rotate(k, near)))
    assert difference(scores[1], scores[0]) < 1e-6


def test_float32_is_near_float64_and_keeps_dtype() -> None:
    x = torch.randn(12, 2, 20, dtype=torch.float64)
    positions = grid_positions(torch.tensor([1000]), Grid(1, 3, 2, 2))[0]
    exact = rotate(x, rotary_table(positions, 20, dtype=torch.float64))
    single = rotate(x.float(), rotary_table(positions, 20, dtype=torch.float32))
    assert single.dtype == torch.float32
    assert rotate(x.bfloat16(), rotary_table(positions, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert difference(single.double(), exact) < 1e-6


def test_without_time() -> None:
    positions = grid_positions(torch.tensor([0, 500]), Grid(1, 2, 2, 2))
    table = rotary_table(positions, 20, dtype=torch.float64, with_time=False)
    assert torch.equal(table[0], table[1])
    assert torch.equal(table[..., :4, 0], torch.ones(2, 8, 4, dtype=torch.float64))
    assert (table[0, 1, 4:, 0] != 1).any()


def test_real_and_complex_arithmetic_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 12, 2, 20)
    table = rotary_table(grid_positions(torch.arange(3) * 7, Grid(1, 3, 2, 2)), 20, dtype=torch.float32)
    eager = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert difference(rotate(x, table), eager) < 1e-6
