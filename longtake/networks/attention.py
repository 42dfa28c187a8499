"""Attention over slots: one plan of dense calls for the training pass and for the rollout.

Which slot sees which is known before any tensor is, so no mask is built and nothing is computed to be thrown away:
slots that see the same number of slots are folded into the batch axis and run as one dense call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.networks.layout import ChunkLayout, Slot, grid_positions, sink_start
from longtake.networks.memory import LayerMemory
from longtake.networks.rope import rotary_table, rotate
from longtake.networks.softmax import dense_attention


@dataclass(frozen=True)
class Call:
    """One dense attention call: n query slots that see equally many slots.

    Attributes:
        queries: slots of the pass, n.
        past: for each query the slots of the window it sees, n x m; indices into memory's slots followed by the pass's.
        sinks: for each query (index into memory's sinks followed by the pass's slots, time index), n x k.
    """

    queries: tuple[int, ...]
    past: tuple[tuple[int, ...], ...]
    sinks: tuple[tuple[tuple[int, int], ...], ...]


def attention_plan(
    layout: ChunkLayout,
    slots: Sequence[Slot] = (),
    sink_slots: Sequence[Slot] = (),
    *,
    window: int | None,
    sinks: int = 0,
) -> list[Call]:
    """Returns the dense calls of one pass.

    Args:
        layout: the slots of the pass.
        slots: the slots of memory's window.
        sink_slots: the slots of memory's sinks; one may be among `slots` as well.
        window: how many of the latest visible slots are seen; None: all.
        sinks: how many of the first visible slots are seen besides, when they have left the window.
    """
    window_index = {slot: i for i, slot in enumerate(slots)}
    sink_index = {slot: i for i, slot in enumerate(sink_slots)}
    known = list(window_index | sink_index)
    groups: dict[tuple[int, int], list[tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]]] = {}
    for index, query in enumerate(layout.slots):
        past = [known[i] for i in layout.visible(index, known)]
        seen = past if window is None else past[max(0, len(past) - window) :]
        first = past[: min(sinks, len(past) - len(seen))]
        frames = layout.grid.frames
        starts = [sink_start(query, sink, rank, window or 0, sinks, frames) for rank, sink in enumerate(first)]
        row = (
            index,
            tuple(window_index[slot] for slot in seen),
            tuple((sink_index[slot], start) for slot, start in zip(first, starts, strict=True)),
        )
        groups.setdefault((len(seen), len(first)), []).append(row)
        if query.seen:
            window_index[query], sink_index[query] = len(slots) + index, len(sink_slots) + index
            known.append(query)
    return [Call(*(tuple(column) for column in zip(*rows, strict=True))) for rows in groups.values()]


@dataclass(frozen=True)
class PreparedCall:
    """A `Call` as tensors.

    Attributes:
        queries: slots of the pass [n]; None: all of them, in order.
        keys: whose keys are seen, memory's and the pass's slots [n m], the query's own slot last. With `kv_tokens`,
            which does not apply to a slot's own keys, they are left out here and None stands for no others.
        sinks: memory's sinks and the pass's slots [n k]; None: none.
        sink_table: rotary table of the sinks [n k*l hd/2 2].
    """

    queries: Tensor | None
    keys: Tensor | None
    sinks: Tensor | None
    sink_table: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """What every layer of one pass shares, so that it is made once and no layer waits for the host.

    Attributes:
        calls: the dense calls.
        order: [s] puts the calls' outputs, one after another, into slot order; None: they are.
        table: rotary table of the pass's tokens [s l hd/2 2].
        window_table: rotary table of memory's window [m l' hd/2 2]; None: memory holds no window.
    """

    calls: tuple[PreparedCall, ...]
    order: Tensor | None
    table: Tensor
    window_table: Tensor | None


@dataclass(frozen=True)
class MixerInput:
    """What a mixer works on.

    Attributes:
        x: normalised and modulated hidden state [b s l d].
        q: queries after QK-norm, not rotated, [b s l heads hd].
        k: keys, as `q`.
        v: values, as `q`.
        layout: the slots of the pass.
        plan: what the mixer's own `prepare` returned for this pass.
        key_mask: False for tokens (of every slot, and of those in memory) that nothing may see, bool [b l]; None: none.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    layout: ChunkLayout
    plan: Any
    key_mask: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """True (t, h, w) of every token, int64 [s l 3]."""
        return self.layout.positions()


class SlotAttention(nn.Module):
    """Softmax attention over slots. The mixers below say which of the visible slots are seen.

    A mixer is called with `MixerInput` and the layer's memory, and returns what it mixed, [b s l d], and memory: the
    one given, or (when a memory was given and the pass holds a slot that is `seen`) a new one.

    Args:
        dim: width.
        num_heads: heads.
        window: how many of the latest visible slots are seen; None: all.
        sinks: how many of the first slots are seen besides.
        kv_tokens: how many of the last tokens of each slot of the window are seen; None: all.
        theta: base of the rotary frequencies.
    """

    streams: ClassVar[bool] = True
    constant_memory: ClassVar[bool] = True
    new_parameters: ClassVar[tuple[str, ...]] = ()  # what a pretrained Wan does not have

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | None = None,
        sinks: int = 0,
        kv_tokens: int | None = None,
        theta: float = 10000.0,
    ) -> None:
        super().__init__()
        for key, value, least in (("window", window, 0), ("sinks", sinks, 0), ("kv_tokens", kv_tokens, 1)):
            if value is not None and value < least:
                raise ConfigError(f"mixer.{key} is {value}; expected {least} or more. Change `network.mixer.{key}`.")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window, self.sinks, self.kv_tokens, self.theta = window, sinks, kv_tokens, theta

    def prepare(
        self, layout: ChunkLayout, memory: LayerMemory | None, *, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """Returns what the layers of one pass share: calls, indices and rotary tables."""
        return self._attention_plan(layout, memory or LayerMemory(), device, dtype)

    def reset_parameters(self) -> None:
        """Draws the mixer's own parameters; attention has none."""

    def forward(self, inputs: MixerInput, memory: LayerMemory | None) -> tuple[Tensor, LayerMemory | None]:
        out = self.attend(inputs, inputs.plan, memory)
        return out, self.remember(inputs, memory)

    def num_flops(self, layout: ChunkLayout) -> int:
        """Returns the multiply-adds x 2 of one forward pass of one sample without memory, projections left out."""
        calls = attention_plan(layout, window=self.window, sinks=self.sinks)
        return self.dim * sum(self._call_flops(call, layout.grid.tokens) for call in calls)

    def attend(self, inputs: MixerInput, plan: AttentionPlan, memory: LayerMemory | None) -> Tensor:
        """Returns softmax attention [b s l d] of every slot to what the plan lets it see."""
        q, k_own = rotate(inputs.q, plan.table), rotate(inputs.k, plan.table)
        memory = memory or LayerMemory()
        keys, values = self._last_tokens(k_own), self._last_tokens(inputs.v)
        if memory.keys is not None and memory.values is not None and plan.window_table is not None:
            keys = torch.cat((rotate(memory.keys, plan.window_table).to(keys.dtype), keys), dim=1)
            values = torch.cat((memory.values.to(values.dtype), values), dim=1)
        outs = []
        for call in plan.calls:
            blocks = [] if call.keys is None else [(_take(keys, call.keys), _take(values, call.keys))]
            if call.sinks is not None:
                blocks.insert(0, self._take_sinks(inputs, memory, call))
            if self.kv_tokens is not None or call.keys is None:
                blocks.append((_take(k_own, call.queries), _take(inputs.v, call.queries)))
            is_causal = inputs.layout.intra == "causal"
            outs.append(_attend(_take(q, call.queries), blocks, causal=is_causal, key_mask=inputs.key_mask))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return (out if plan.order is None else out.index_select(1, plan.order)).flatten(-2)

    def remember(self, inputs: MixerInput, memory: LayerMemory | None) -> LayerMemory | None:
        """Returns the memory with the window and sinks moved on over the `seen` slots of the pass."""
        layout = inputs.layout
        new = [index for index, slot in enumerate(layout.slots) if slot.seen]
        if memory is None or not new:
            return memory
        slots = (*memory.slots, *(layout.slots[index] for index in new))
        sink_slots = (*memory.sink_slots, *(layout.slots[index] for index in new))[: self.sinks]
        keep = len(slots) if self.window is None else min(self.window, len(slots))
        news = torch.tensor(new, device=inputs.k.device)
        k, v = (self._last_tokens(x).index_select(1, news) for x in (inputs.k, inputs.v))
        moved = dataclasses.replace(
            memory,
            slots=slots[len(slots) - keep :],
            keys=_joined(memory.keys, k, last=keep),
            values=_joined(memory.values, v, last=keep),
        )
        if len(memory.sink_slots) == self.sinks:
            return moved
        k, v = (x.index_select(1, news) for x in (inputs.k, inputs.v))
        return dataclasses.replace(
            moved,
            sink_slots=sink_slots,
            sink_keys=_joined(memory.sink_keys, k, first=len(sink_slots)),
            sink_values=_joined(memory.sink_values, v, first=len(sink_slots)),
        )

    def _attention_plan(
        self, layout: ChunkLayout, memory: LayerMemory, device: torch.device, dtype: torch.dtype
    ) -> AttentionPlan:
        if self.kv_tokens is not None and layout.grid.views > 1:
            raise ConfigError(
                f"mixer.kv_tokens is {self.kv_tokens} with {layout.grid.views} views, of which it would keep only the "
                "last; expected one view or kv_tokens null. Change `network.mixer.kv_tokens`."
            )
        calls = attention_plan(layout, memory.slots, memory.sink_slots, window=self.window, sinks=self.sinks)
        positions = layout.positions()
        order = [index for call in calls for index in call.queries]
        in_order = order == list(range(len(order)))
        inverse = torch.tensor(order).argsort().to(device)
        window = None
        if memory.slots and memory.keys is not None:
            starts = torch.tensor([slot.start_lat for slot in memory.slots])
            window = grid_positions(starts, layout.grid)[:, -memory.keys.shape[2] :]
        return AttentionPlan(
            calls=tuple(
                self._prepared(call, layout, memory, device, dtype, all_slots=in_order and len(calls) == 1)
                for call in calls
            ),
            order=None if in_order else inverse,
            table=self._table(positions, device, dtype),
            window_table=None if window is None else self._table(window, device, dtype),
        )

    def _prepared(
        self,
        call: Call,
        layout: ChunkLayout,
        memory: LayerMemory,
        device: torch.device,
        dtype: torch.dtype,
        all_slots: bool,
    ) -> PreparedCall:
        own = len(memory.slots) + torch.tensor(call.queries)[:, None]
        keys = torch.tensor(call.past, dtype=torch.int64).view(len(call.queries), -1)
        if self.kv_tokens is None and keys.numel():
            keys = torch.cat((keys, own), dim=1)
        sinks = torch.tensor(call.sinks, dtype=torch.int64)  # [n k 2]
        table = None
        if sinks.numel():
            positions = grid_positions(sinks[..., 1].flatten(), layout.grid)
            table = self._table(positions.view(len(call.queries), -1, 3), device, dtype)
        return PreparedCall(
            queries=None if all_slots else torch.tensor(call.queries, device=device),
            keys=keys.to(device) if keys.numel() else None,
            sinks=sinks[..., 0].to(device) if sinks.numel() else None,
            sink_table=table,
        )

    def _table(self, positions: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        return rotary_table(positions, self.head_dim, dtype=dtype, device=device, theta=self.theta)

    def _take_sinks(self, inputs: MixerInput, memory: LayerMemory, call: PreparedCall) -> tuple[Tensor, Tensor]:
        assert call.sinks is not None
        assert call.sink_table is not None
        k, v = _joined(memory.sink_keys, inputs.k), _joined(memory.sink_values, inputs.v)
        return rotate(_take(k, call.sinks), call.sink_table), _take(v, call.sinks)

    def _last_tokens(self, x: Tensor) -> Tensor:
        return x if self.kv_tokens is None else x[:, :, -self.kv_tokens :]

    def _call_flops(self, call: Call, tokens: int) -> int:
        window = tokens if self.kv_tokens is None else min(tokens, self.kv_tokens)
        keys = tokens + window * len(call.past[0]) + tokens * len(call.sinks[0])
        return 4 * len(call.queries) * tokens * keys


class FullAttention(SlotAttention):
    """Every slot sees all that the layout lets it see; made for one slot (bidirectional). It cannot stream."""

    streams = False

    def __init__(self, dim: int, num_heads: int, *, theta: float = 10000.0) -> None:
        super().__init__(dim, num_heads, theta=theta)

    def prepare(
        self, layout: ChunkLayout, memory: LayerMemory | None, *, device: torch.device, dtype: torch.dtype
    ) -> Any:
        if memory is not None:
            raise ConfigError(
                "the network attends in both directions and keeps no memory; expected rollout=one_shot, or weights "
                "with a causal mixer (lact, window, block_causal). Change `rollout`."
            )
        return super().prepare(layout, memory, device=device, dtype=dtype)


class BlockCausalAttention(SlotAttention):
    """Every slot sees all earlier `seen` slots. Memory and time a chunk grow with the length of the video."""

    constant_memory = False

    def __init__(self, dim: int, num_heads: int, *, theta: float = 10000.0) -> None:
        super().__init__(dim, num_heads, theta=theta)


class WindowAttention(SlotAttention):
    """Every slot sees the last `window` earlier ones and the first `sinks`: memory of constant size."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 1,
        sinks: int = 0,
        kv_tokens: int | None = None,
        theta: float = 10000.0,
    ) -> None:
        super().__init__(dim, num_heads, window=window, sinks=sinks, kv_tokens=kv_tokens, theta=theta)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    """[b s l heads hd] and [n] or [n m] to [b n (m l) heads hd]; None takes all of it."""
    if index is None:
        return x
    taken = x.index_select(1, index.flatten())
    return taken if index.dim() == 1 else taken.unflatten(1, tuple(index.shape)).flatten(2, 3)


def _joined(old: Tensor | None, new: Tensor, *, first: int | None = None, last: int | None = None) -> Tensor:
    """Old and new slots on axis 1; the first or last so many of them, without keeping hold of the others."""
    both = new if old is None else torch.cat((old.to(new.dtype), new), dim=1)
    kept = both[:, :first] if last is None else both[:, both.shape[1] - last :]
    return both if kept.shape == both.shape else kept.clone()


def _attend(
    query: Tensor, blocks: list[tuple[Tensor, Tensor]], *, causal: bool, key_mask: Tensor | None = None
) -> Tensor:
    """Dense attention of `query` [b n l heads hd] to blocks of keys and values, those of its own slot last.

    `key_mask` [b l] holds for every slot that is seen: all slots have the same views.
    """
    key, value = blocks[0] if len(blocks) == 1 else (torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True))
    mask = None
    if key_mask is not None:
        slots = key.shape[2] // key_mask.shape[1]
        mask = key_mask.repeat(1, slots).repeat_interleave(query.shape[1], dim=0)[:, None, None, :]
    out = dense_attention(*(x.flatten(0, 1) for x in (query, key, value)), mask=mask, causal=causal)
    return out.unflatten(0, query.shape[:2])
