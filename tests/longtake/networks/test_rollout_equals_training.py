"""The parallel training pass and the streaming rollout are the same code; here they are the same numbers."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from longtake.networks.layout import ChunkLayout
from longtake.networks.memory import Memory
from tests.longtake.networks.tiny import (
    CAUSAL_MIXERS,
    difference,
    rolled_out,
    teacher_forced,
    tiny_grid,
    tiny_network,
    tiny_sequence,
)


def targets(velocity: Tensor, layout: ChunkLayout, repeat: int = 0) -> Tensor:
    """The velocities of one repeat of every chunk."""
    return velocity[:, [i for i in layout.targets if layout.slots[i].repeat == repeat]]


def saved_and_restored(memory: Memory) -> Memory:
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    return Memory.from_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
def test_stepwise_equals_teacher_forced(mixer: str, dtype: torch.dtype) -> None:
    """Five chunks, two repeats, two branches of guidance (rows with other texts), the state saved and restored."""
    network = tiny_network(CAUSAL_MIXERS[mixer], dtype=dtype)
    sequence = tiny_sequence(chunks=5, repeats=2, dtype=dtype)
    with torch.no_grad():
        trained, layout = teacher_forced(network, sequence)
        for repeat in (0, 1):
            streamed = rolled_out(
                network,
                sequence,
                repeat=repeat,
                at_chunk=lambda chunk, memory: saved_and_restored(memory) if chunk == 2 else memory,
            )
            assert difference(streamed, targets(trained, layout, repeat)) < (1e-9 if dtype == torch.float64 else 1e-4)
            assert streamed.isfinite().all()


@pytest.mark.parametrize("mixer", ["window2_sink1", "lact_momentum"])
def test_several_views_and_context_committed_slot_by_slot(mixer: str) -> None:
    network = tiny_network(CAUSAL_MIXERS[mixer])
    sequence = tiny_sequence(views=2, chunks=4)
    grid, memory = tiny_grid(sequence), network.empty_memory()
    with torch.no_grad():
        trained, layout = teacher_forced(network, sequence)
        for chunk in range(3):
            step = ChunkLayout.commit_only(chunk, grid)
            _, memory = network(*sequence.slots(step), step, memory)
            assert memory.committed == chunk + 1
        step = ChunkLayout.stream(3, grid, commit=False)
        out, _ = network(*sequence.slots(step), step, memory)
    assert difference(out[:, 0], targets(trained, layout)[:, 3]) < 1e-9


@pytest.mark.parametrize("mixer", ["block_causal", "window2_sink1", "lact_momentum"])
def test_diffusion_forcing_rolls_out_as_it_was_trained(mixer: str) -> None:
    """Every slot a target that later slots see: in a rollout they are committed in the role they had."""
    network = tiny_network(CAUSAL_MIXERS[mixer])
    sequence = tiny_sequence(chunks=4)
    grid, memory, outs = tiny_grid(sequence), network.empty_memory(), []
    with torch.no_grad():
        layout = ChunkLayout.diffusion_forcing(4, grid)
        trained, _ = network(*sequence.slots(layout), layout)
        for chunk in range(4):
            step = ChunkLayout.stream(chunk, grid, commit=chunk > 0, context_sees="past", commit_role="target")
            out, memory = network(*sequence.slots(step), step, memory)
            outs.append(out[:, -1])
    assert difference(torch.stack(outs, 1), trained) < 1e-9


@pytest.mark.parametrize("mixer", ["block_causal", "window2_sink1"])
def test_contexts_that_see_the_past(mixer: str) -> None:
    network = tiny_network(CAUSAL_MIXERS[mixer])
    sequence = tiny_sequence(chunks=5)
    grid, memory, outs = tiny_grid(sequence), network.empty_memory(), []
    with torch.no_grad():
        layout = ChunkLayout.teacher_forcing(5, 1, grid, context_sees="past")
        trained, _ = network(*sequence.slots(layout), layout)
        blind, _ = teacher_forced(network, sequence)
        assert difference(blind, trained) > 1e-3
        for chunk in range(5):
            step = ChunkLayout.stream(chunk, grid, commit=chunk > 0, context_sees="past")
            out, memory = network(*sequence.slots(step), step, memory)
            outs.append(out[:, -1])
    assert difference(torch.stack(outs, 1), targets(trained, layout)) < 1e-9


def test_branches_of_guidance_do_not_mix() -> None:
    """Each row of the batch has its own state: a branch alone gives what it gives beside another."""
    network = tiny_network(CAUSAL_MIXERS["lact_momentum"])
    both = tiny_sequence(batch=2, chunks=4)
    with torch.no_grad():
        together = rolled_out(network, both)
        for row in (0, 1):
            alone = type(both)(*(value[row : row + 1] for value in vars(both).values()))
            assert difference(rolled_out(network, alone), together[row : row + 1]) < 1e-9
