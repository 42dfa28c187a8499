"""The plan of dense calls against a dense mask; kernels, sinks, memory of the mixers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks import softmax
from longtake.networks.attention import (
    BlockCausalAttention,
    FullAttention,
    MixerInput,
    SlotAttention,
    WindowAttention,
    attention_plan,
)
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.memory import LayerMemory
from longtake.networks.softmax import dense_attention
from tests.longtake.networks.tiny import difference

GRID = Grid(views=1, frames=2, height=2, width=3)
HEADS, HEAD_DIM = 2, 20


def inputs_of(layout: ChunkLayout, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = (3, batch, len(layout.slots), layout.grid.tokens, HEADS, HEAD_DIM)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).unbind(0)  # type: ignore[return-value]


def mixed(mixer: SlotAttention, layout: ChunkLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    plan = mixer.prepare(layout, None, device=q.device, dtype=q.dtype)
    return mixer(MixerInput(q.flatten(-2), q, k, v, layout, plan), None)[0]


def rotated_literally(x: Tensor, times: Tensor, grid: Grid) -> Tensor:
    """[l heads hd] of one slot turned by (time, row, column), channel by channel; times [f]."""
    out = torch.empty_like(x)
    widths = (8, 6, 6)
    for token in range(x.shape[0]):
        frame, rest = divmod(token, grid.height * grid.width)
        where = (float(times[frame]), *divmod(rest, grid.width))
        start = 0
        for axis, width in enumerate(widths):
            for i in range(width // 2):
                angle = where[axis] * 10000 ** (-2 * i / width)
                even, odd = x[token, :, start + 2 * i], x[token, :, start + 2 * i + 1]
                out[token, :, start + 2 * i] = even * math.cos(angle) - odd * math.sin(angle)
                out[token, :, start + 2 * i + 1] = even * math.sin(angle) + odd * math.cos(angle)
            start += width
    return out


def dense_reference(
    layout: ChunkLayout, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, sinks: int = 0, kv_tokens: int = 0
) -> Tensor:
    """Every slot against an explicit list of the keys that the rules let it see, one sample and head at a time."""
    grid, slots = layout.grid, layout.slots
    frames = torch.arange(grid.frames)
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for i, query in enumerate(slots):
            past = [j for j in range(i) if slots[j].seen and slots[j].chunk < query.chunk]
            if query.role == "context" and layout.context_sees == "self":
                past = []
            near = past if window is None else past[len(past) - min(window, len(past)) :]
            far = [j for j in past[:sinks] if j not in near]
            keys, values = [], []
            for rank, j in enumerate(far):
                moved = query.start_lat - (window + sinks - rank) * grid.frames  # type: ignore[operator]
                keys.append(rotated_literally(k[b, j], max(slots[j].start_lat, moved) + frames, grid))
                values.append(v[b, j])
            for j in near:
                turned = rotated_literally(k[b, j], slots[j].start_lat + frames, grid)
                keys.append(turned[-kv_tokens:])
                values.append(v[b, j, -kv_tokens:])
            keys.append(rotated_literally(k[b, i], query.start_lat + frames, grid))
            values.append(v[b, i])
            turned = rotated_literally(q[b, i], query.start_lat + frames, grid)
            scores = torch.einsum("lhd,mhd->hlm", turned, torch.cat(keys)) / math.sqrt(HEAD_DIM)
            out[b, i] = torch.einsum("hlm,mhd->lhd", scores.softmax(-1), torch.cat(values))
    return out.flatten(-2)


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize(
    ("mixer", "rule"),
    [
        (BlockCausalAttention, {"window": None}),
        (partial(WindowAttention, window=1), {"window": 1}),
        (partial(WindowAttention, window=2), {"window": 2}),
        (partial(WindowAttention, window=0), {"window": 0}),
        (partial(WindowAttention, window=1, kv_tokens=5), {"window": 1, "kv_tokens": 5}),
        (partial(WindowAttention, window=2, kv_tokens=5, sinks=1), {"window": 2, "kv_tokens": 5, "sinks": 1}),
        (partial(WindowAttention, window=1, sinks=2), {"window": 1, "sinks": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("context_sees", ["self", "past"])
def test_plan_equals_an_explicit_list_of_keys(mixer, rule, repeats, context_sees) -> None:  # noqa: ANN001
    layout = ChunkLayout.teacher_forcing(5, repeats, GRID, first_lat=3, context_sees=context_sees)
    q, k, v = inputs_of(layout, batch=1)
    ours = mixed(mixer(HEADS * HEAD_DIM, HEADS), layout, q, k, v)
    assert difference(ours, dense_reference(layout, q, k, v, **rule)) < 1e-12


def test_full_over_one_slot_sees_everything() -> None:
    layout = ChunkLayout.one_shot(GRID)
    q, k, v = inputs_of(layout)
    ours = mixed(FullAttention(HEADS * HEAD_DIM, HEADS), layout, q, k, v)
    assert difference(ours, dense_reference(layout, q, k, v, window=None)) < 1e-12


def test_number_and_size_of_calls() -> None:
    """A window makes two kinds of slots, however many chunks and repeats; the work is linear in the chunks."""
    mixer = WindowAttention(HEADS * HEAD_DIM, HEADS, window=1)
    for chunks in (5, 50):
        assert len(attention_plan(ChunkLayout.teacher_forcing(chunks, 2, GRID), window=1)) == 2
    flops = [mixer.num_flops(ChunkLayout.teacher_forcing(chunks, 1, GRID)) for chunks in (10, 20, 40)]
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])
    one_slot = 4 * HEADS * HEAD_DIM * GRID.tokens**2
    assert flops[0] == one_slot * (1 + 9 * 3)  # t0; then for each chunk c sees 1 slot and t sees 2
    dense = BlockCausalAttention(HEADS * HEAD_DIM, HEADS)
    assert dense.num_flops(ChunkLayout.teacher_forcing(3, 1, GRID)) == one_slot * (1 + 1 + 2 + 1 + 3)


def test_causal_inside_a_slot() -> None:
    """Discrete tokens: earlier slots whole, the own slot up to the token itself."""
    layout = ChunkLayout(ChunkLayout.diffusion_forcing(3, GRID).slots, GRID, "past", "causal")
    q, k, v = inputs_of(layout)
    ours = mixed(BlockCausalAttention(HEADS * HEAD_DIM, HEADS), layout, q, k, v)
    mixer = BlockCausalAttention(HEADS * HEAD_DIM, HEADS)
    k2, v2 = k.clone(), v.clone()
    k2[:, 1, 4:] += 1
    v2[:, 1, 4:] += 1
    again = mixed(mixer, layout, q, k2, v2)
    assert torch.equal(again[:, 0], ours[:, 0])
    assert torch.equal(again[:, 1, :4], ours[:, 1, :4])
    assert (again[:, 1, 4:] != ours[:, 1, 4:]).all(dim=-1).all()
    assert difference(ours[:, 0, 0], v[:, 0, 0].flatten(-2)) < 1e-12  # the very first token sees itself only


def test_a_view_keeps_what_kv_tokens_would_cut() -> None:
    layout = ChunkLayout.one_shot(Grid(views=2, frames=1, height=2, width=2))
    with pytest.raises(ConfigError, match=r"network\.mixer\.kv_tokens"):
        WindowAttention(40, 2, kv_tokens=4).prepare(layout, None, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(("key", "value"), [("window", -1), ("sinks", -1), ("kv_tokens", 0)])
def test_impossible_windows_are_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"network\.mixer\.{key}"):
        WindowAttention(40, 2, **{key: value})


def test_full_attention_refuses_memory() -> None:
    with pytest.raises(ConfigError, match="rollout"):
        FullAttention(40, 2).prepare(
            ChunkLayout.one_shot(GRID), LayerMemory(), device=torch.device("cpu"), dtype=torch.float32
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [6, 11])
def test_dense_attention_by_matmuls_equals_the_kernel(keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 2, 8), torch.randn(3, keys, 2, 8), torch.randn(3, keys, 2, 8)
    mask = None if causal else torch.rand(3, 1, 1, keys) > 0.3
    exact = dense_attention(q.double(), k.double(), v.double(), mask=mask, causal=causal)
    assert difference(dense_attention(q, k, v, mask=mask, causal=causal).double(), exact) < 1e-6
    low = [x.bfloat16() for x in (q, k, v)]
    few = dense_attention(*low, mask=mask, causal=causal)
    monkeypatch.setattr(softmax, "FEW_SCORES", 0)
    many = dense_attention(*low, mask=mask, causal=causal)
    assert few.dtype == many.dtype == torch.bfloat16
    assert difference(few.double(), exact) < 3e-2
    assert difference(many.double(), exact) < 3e-2


def test_memory_holds_only_what_is_needed() -> None:
    """Window and sinks keep their size and their own storage, not the pass's."""
    mixer, memory = WindowAttention(HEADS * HEAD_DIM, HEADS, window=2, sinks=1, kv_tokens=5), LayerMemory()
    for chunk in range(6):
        layout = ChunkLayout.commit_only(chunk, GRID)
        q, k, v = inputs_of(layout)
        plan = mixer.prepare(layout, memory, device=q.device, dtype=q.dtype)
        _, memory = mixer(MixerInput(q.flatten(-2), q, k, v, layout, plan), memory)
    assert [slot.chunk for slot in memory.slots] == [4, 5]
    assert [slot.chunk for slot in memory.sink_slots] == [0]
    sizes = {name: tuple(tensor.shape) for name, tensor in memory.tensors().items()}
    assert sizes["keys"] == sizes["values"] == (2, 2, 5, HEADS, HEAD_DIM)
    assert sizes["sink_keys"] == sizes["sink_values"] == (2, 1, GRID.tokens, HEADS, HEAD_DIM)
    for tensor in memory.tensors().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
