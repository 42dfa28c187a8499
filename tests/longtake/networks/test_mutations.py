"""Tests that can fail: every mistake that is easily made moves the measure of the test that should catch it.

The mistakes are those that were seen to matter when LaCT was written from its description: each is put into the code,
and the measured difference must be far above the tolerance of the property test (1e-9 in outputs, 1e-8 in gradients).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.networks import fast_weights, lact, rope
from longtake.networks.attention import MixerInput, SlotAttention, WindowAttention
from longtake.networks.block import DiTBlock
from longtake.networks.fast_weights import FastWeights
from longtake.networks.lact import LaCT, Step
from longtake.networks.layout import ChunkLayout, Slot
from longtake.networks.memory import Memory
from longtake.networks.rope import rotate
from longtake.pretrained import names
from tests.longtake.networks.test_lact import against_reference, lact_network
from tests.longtake.networks.test_leakage import bumped, moved_slots
from tests.longtake.networks.test_rollout_equals_training import targets
from tests.longtake.networks.test_video_dit import parity_with_diffusers
from tests.longtake.networks.tiny import (
    CAUSAL_MIXERS,
    difference,
    rolled_out,
    teacher_forced,
    tiny_network,
    tiny_sequence,
)

Patch = pytest.MonkeyPatch


def rate_layout(patch: Patch) -> None:
    right = LaCT.rates
    patch.setattr(LaCT, "rates", lambda self, x: right(self, x).flatten(-2).unflatten(-1, (3, self.fw_heads)).mT)


def no_rate_offset(patch: Patch) -> None:
    patch.setattr(lact, "RATE_OFFSET", 0.0)


def rescaling(patch: Patch, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Rescaled:
        apply = staticmethod(lambda weight, change, norm: function(weight + change, norm))

    patch.setattr(fast_weights, "_Rescaled", Rescaled)


def no_row_norm(patch: Patch) -> None:
    rescaling(patch, lambda weight, norm: weight)


def other_axis_norm(patch: Patch) -> None:
    def column_norm(weight: Tensor) -> Tensor:
        return weight.norm(dim=-2, keepdim=True)

    patch.setattr(lact, "row_norm", column_norm)
    rescaling(patch, lambda weight, norm: weight / (column_norm(weight) + 1e-5) * norm)


def norm_of_the_current_weights(patch: Patch) -> None:
    """The target is what the rows were before this update, not W_0: here W_0's norms are moved to tell them apart."""
    patch.setattr(lact, "row_norm", lambda weight: 1.01 * weight.norm(dim=-1, keepdim=True))


def mean_over_tokens(patch: Patch) -> None:
    right = fast_weights.gradient
    patch.setattr(fast_weights, "gradient", lambda w, k, v, r: tuple(d / k.shape[1] for d in right(w, k, v, r)))


def apply_before_update(patch: Patch) -> None:
    def steps(layout: ChunkLayout) -> list[Step]:
        found: list[tuple[int | None, list[int]]] = [(None, [])]
        for index, slot in enumerate(layout.slots):
            found[-1][1].append(index)
            if slot.seen:
                found.append((index, []))
        return [Step(writes, tuple(reads)) for writes, reads in found]

    patch.setattr(lact, "fast_weight_steps", steps)


def unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-5)


def scale_after_rope(patch: Patch) -> None:
    def fast_channels(self: LaCT, x: Tensor, table: Tensor, column: int) -> Tensor:
        scale, offset = (p[:, column].view(x.shape[-2:]) for p in (self.qk_scale, self.qk_offset))
        heads = (rotate(x, table) * scale + offset).flatten(-2).unflatten(-1, (self.fw_heads, -1))
        return self._by_head(unit(heads))

    patch.setattr(LaCT, "fast_channels", fast_channels)


def unit_length_per_attention_head(patch: Patch) -> None:
    def fast_channels(self: LaCT, x: Tensor, table: Tensor, column: int) -> Tensor:
        scale, offset = (p[:, column].view(x.shape[-2:]) for p in (self.qk_scale, self.qk_offset))
        heads = unit(rotate(x * scale + offset, table)).flatten(-2).unflatten(-1, (self.fw_heads, -1))
        return self._by_head(heads)

    patch.setattr(LaCT, "fast_channels", fast_channels)


def scale_on_the_window_too(patch: Patch) -> None:
    right = LaCT.attend

    def attend(self: LaCT, inputs: MixerInput, plan: Any, memory: Any) -> Tensor:
        scale, offset = (parameter.view(*inputs.q.shape[-2:], 2) for parameter in (self.qk_scale, self.qk_offset))
        q, k = (x * scale[..., j] + offset[..., j] for j, x in enumerate((inputs.q, inputs.k)))
        return right(self, dataclasses.replace(inputs, q=q, k=k), plan, memory)

    patch.setattr(LaCT, "attend", attend)


def clean_sees_clean(patch: Patch) -> None:
    right = ChunkLayout.visible
    patch.setattr(
        ChunkLayout, "visible", lambda self, i, known: right(dataclasses.replace(self, context_sees="past"), i, known)
    )


def time_restarts(patch: Patch) -> None:
    right = ChunkLayout.positions
    still = lambda slot: dataclasses.replace(slot, start_lat=0)  # noqa: E731
    patch.setattr(
        ChunkLayout, "positions", lambda self: right(dataclasses.replace(self, slots=tuple(map(still, self.slots))))
    )


def axes_in_another_order(patch: Patch) -> None:
    right = rope.axis_widths
    patch.setattr(rope, "axis_widths", lambda head_dim: right(head_dim)[::-1])
    rope._frequencies.cache_clear()


def wrong_output_norm_eps(patch: Patch) -> None:
    right = LaCT.__init__

    def init(self: LaCT, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self.output_norm.eps = 1e-3

    patch.setattr(LaCT, "__init__", init)


def first_kv_tokens(patch: Patch) -> None:
    patch.setattr(
        SlotAttention, "_last_tokens", lambda self, x: x if self.kv_tokens is None else x[:, :, : self.kv_tokens]
    )


def momentum_left_out_of_training(patch: Patch) -> None:
    right = fast_weights.update
    patch.setattr(lact, "update", lambda *args, **kwargs: right(*args, **{**kwargs, "momentum": None}))


OUTPUT_MISTAKES: dict[str, tuple[Callable[[Patch], None], dict[str, Any], float]] = {
    "learning-rate layout": (rate_layout, {}, 1e-2),
    "no softplus offset": (no_rate_offset, {}, 1e-2),
    "no row renormalisation": (no_row_norm, {}, 1e-2),
    "renormalising the other axis": (other_axis_norm, {}, 1e-2),
    "another target of the renormalisation": (norm_of_the_current_weights, {}, 1e-6),
    "mean instead of sum over tokens": (mean_over_tokens, {}, 1e-2),
    "apply before update": (apply_before_update, {}, 1e-2),
    "scale and offset after rope": (scale_after_rope, {}, 1e-2),
    "scale and offset on the window branch too": (scale_on_the_window_too, {}, 1e-2),
    "unit length per attention head": (unit_length_per_attention_head, {}, 1e-2),
    "clean chunk sees the clean chunk before": (clean_sees_clean, {}, 1e-2),
    "time index restarts": (time_restarts, {}, 1e-2),
    "rotary axes in another order": (axes_in_another_order, {}, 1e-2),
    "epsilon of the output norm": (wrong_output_norm_eps, {}, 1e-6),
    "first instead of last tokens of a chunk": (first_kv_tokens, {"kv_tokens": 5}, 1e-2),
    "momentum only in the rollout": (momentum_left_out_of_training, {"momentum": True}, 1e-2),
}


@pytest.fixture(autouse=True)
def _clean_tables() -> Iterator[None]:
    """Cached frequencies of a mistake must not reach other tests."""
    yield
    rope._frequencies.cache_clear()


@pytest.mark.parametrize("mistake", OUTPUT_MISTAKES)
def test_reference_catches(mistake: str, monkeypatch: Patch) -> None:
    make, settings, at_least = OUTPUT_MISTAKES[mistake]
    make(monkeypatch)
    outputs, _ = against_reference(lact_network(**settings), 2, **settings)
    assert outputs > at_least


def test_reference_catches_a_detached_target(monkeypatch: Patch) -> None:
    """Outputs are the same; the gradients of the initial fast weights are not."""
    right = fast_weights.row_norm
    monkeypatch.setattr(lact, "row_norm", lambda weight: right(weight).detach())
    outputs, gradients = against_reference(lact_network(), 2)
    assert outputs < 1e-9
    for name in ("w0", "w1", "w2"):
        assert gradients[f"blocks.0.self_attn.mixer.{name}"] > 1e-3


def streamed_difference(mixer: str, at_chunk: Callable[[int, Memory], Memory] | None = None) -> float:
    network, sequence = tiny_network(CAUSAL_MIXERS[mixer]), tiny_sequence(chunks=5)
    with torch.no_grad():
        trained, layout = teacher_forced(network, sequence)
        return difference(rolled_out(network, sequence, at_chunk=at_chunk, is_right=False), targets(trained, layout))


@pytest.mark.parametrize("mixer", ["lact_momentum", "window2_sink1"])
def test_rollout_catches_exchanged_branches(mixer: str) -> None:
    """State that is not keyed by the row of the batch: the two branches of guidance change places once."""

    def exchanged(chunk: int, memory: Memory) -> Memory:
        return memory.map(lambda tensor: tensor.flip(0)) if chunk == 2 else memory

    assert streamed_difference(mixer, exchanged) > 1e-3


def test_rollout_catches_momentum_in_one_of_the_two_passes(monkeypatch: Patch) -> None:
    """The defect of the release: here the rollout forgets it between chunks."""

    def without_sums(chunk: int, memory: Memory) -> Memory:
        layers = [
            dataclasses.replace(layer, fast={name: w for name, w in layer.fast.items() if "sum" not in name})
            for layer in memory.layers
        ]
        return Memory(tuple(layers), memory.committed)

    assert streamed_difference("lact_momentum", without_sums) > 1e-3
    assert streamed_difference("lact", without_sums) < 1e-9


def test_rollout_catches_a_sink_that_is_not_clamped(monkeypatch: Patch) -> None:
    """Clamped only in training: the rollout sees its sink where it truly is."""
    network, sequence = tiny_network(CAUSAL_MIXERS["window2_sink1"]), tiny_sequence(chunks=5)
    with torch.no_grad():
        trained, layout = teacher_forced(network, sequence)
        monkeypatch.setattr("longtake.networks.attention.sink_start", lambda query, sink, *rest: sink.start_lat)
        assert difference(rolled_out(network, sequence, is_right=False), targets(trained, layout)) > 1e-3


def test_rollout_catches_a_lost_window(monkeypatch: Patch) -> None:
    right = WindowAttention.remember

    def remember(self: WindowAttention, inputs: MixerInput, memory: Any) -> Any:
        kept = right(self, inputs, memory)
        return kept if kept is memory else dataclasses.replace(kept, keys=kept.keys.roll(1, dims=2))

    monkeypatch.setattr(WindowAttention, "remember", remember)
    assert streamed_difference("window1") > 1e-3


def sees(rule: Callable[[Slot, Slot], bool]) -> Callable[[ChunkLayout, int, Any], list[int]]:
    return lambda self, index, known: [i for i, other in enumerate(known) if rule(self.slots[index], other)]


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (lambda slot, other: other.seen and other.chunk <= slot.chunk, "own chunk clean"),
        (
            lambda slot, other: other.role == "context" and slot.role == "target" and other.chunk < slot.chunk + 1,
            "t = c",
        ),
    ],
    ids=["own chunk", "the same chunk's clean copy"],
)
def test_leakage_test_catches_a_wrong_rule(rule: Any, what: str, monkeypatch: Patch) -> None:
    """Targets of chunk i must not see clean chunk i. Put first in the sequence, so that it could be seen."""
    network, sequence = tiny_network(CAUSAL_MIXERS["block_causal"]), tiny_sequence(chunks=4, repeats=2)
    right = ChunkLayout.teacher_forcing

    def clean_first(*args: Any, **kwargs: Any) -> ChunkLayout:
        layout = right(*args, **kwargs)
        return dataclasses.replace(layout, slots=tuple(sorted(layout.slots, key=lambda slot: slot.role)))

    monkeypatch.setattr(ChunkLayout, "teacher_forcing", clean_first)
    changed = dataclasses.replace(sequence, clean=bumped(sequence.clean, 1))
    assert "t1.0" not in moved_slots(network, sequence, changed), what
    monkeypatch.setattr(ChunkLayout, "visible", sees(rule))
    network = tiny_network(CAUSAL_MIXERS["block_causal"])  # without the plans of the right rule
    assert "t1.0" in moved_slots(network, sequence, changed), what


def test_leakage_test_catches_repeats_that_see_each_other(monkeypatch: Patch) -> None:
    network, sequence = tiny_network(CAUSAL_MIXERS["block_causal"]), tiny_sequence(chunks=4, repeats=2)
    changed = dataclasses.replace(sequence, noisy=bumped(sequence.noisy, 1, 0))
    right = ChunkLayout.teacher_forcing

    def all_seen(*args: Any, **kwargs: Any) -> ChunkLayout:
        layout = right(*args, **kwargs)
        slots = [dataclasses.replace(slot, seen=slot.repeat == 0 and slot.role == "target") for slot in layout.slots]
        return dataclasses.replace(layout, slots=tuple(slots))

    monkeypatch.setattr(ChunkLayout, "teacher_forcing", all_seen)
    monkeypatch.setattr(ChunkLayout, "visible", sees(lambda slot, other: other.chunk <= slot.chunk and slot != other))
    assert {"t1.1"} < moved_slots(network, sequence, changed)


def test_parity_catches_the_swapped_norms(monkeypatch: Patch) -> None:
    """diffusers' norm2 is Wan's norm3: taken by name, the cross-attention norm would be left out of the map."""
    monkeypatch.setitem(names._BLOCK, "norm3", ("norm3", "norm3"))
    with pytest.raises(ValueError, match="norm2"):
        parity_with_diffusers(80, 4)


def test_parity_catches_another_order_of_the_modulation(monkeypatch: Patch) -> None:
    right = DiTBlock.forward

    def forward(self: DiTBlock, x: Tensor, context: Any, memory: Any) -> Any:
        swapped = dataclasses.replace(context, modulation=context.modulation[..., [1, 0, 2, 4, 3, 5], :])
        return right(self, x, swapped, memory)

    monkeypatch.setattr(DiTBlock, "forward", forward)
    assert parity_with_diffusers(80, 4) > 1e-3


def test_kernel_test_catches_an_update_that_undoes_itself() -> None:
    """A known defect elsewhere: the orthogonalised gradient replaces the weights; no rate must mean no change."""
    weights = FastWeights(*(torch.randn(1, *shape).double() for shape in ((8, 4), (4, 8), (8, 4))))
    k, v, rates = torch.randn(1, 5, 4).double(), torch.randn(1, 5, 4).double(), torch.zeros(1, 5, 3).double()
    replaced = [fast_weights.orthogonalised(d + 1e-9, 5) for d in fast_weights.gradient(weights, k, v, rates)]
    assert difference(replaced[0], weights.w0) > 1e-4
