"""Nothing of the future, of another repeat, sample or guidance branch reaches a prediction: bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longtake.networks.layout import ChunkLayout
from tests.longtake.networks.tiny import (
    CAUSAL_MIXERS,
    Sequence4,
    rolled_out,
    teacher_forced,
    tiny_grid,
    tiny_network,
    tiny_sequence,
)

CHUNKS, REPEATS = 4, 2


def moved_slots(network: Callable, sequence: Sequence4, changed: Sequence4) -> set[str]:
    """Returns which slots of the training pass come out different when the inputs are `changed`."""
    with torch.no_grad():
        before, layout = teacher_forced(network, sequence)  # type: ignore[arg-type]
        after, _ = teacher_forced(network, changed)  # type: ignore[arg-type]
    names = [f"{slot.role[0]}{slot.chunk}.{slot.repeat}" for slot in layout.slots]
    return {name for i, name in enumerate(names) if not torch.equal(before[:, i], after[:, i])}


def bumped(tensor: Tensor, *index: int) -> Tensor:
    tensor = tensor.clone()
    tensor[(slice(None), *index)] += 0.5
    return tensor


@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
def test_what_a_clean_chunk_moves(mixer: str) -> None:
    """Clean chunk j moves itself and targets after it, never a target i <= j."""
    network, sequence = tiny_network(CAUSAL_MIXERS[mixer]), tiny_sequence(chunks=CHUNKS, repeats=REPEATS)
    moved = moved_slots(network, sequence, dataclasses.replace(sequence, clean=bumped(sequence.clean, 1)))
    later = {f"t{i}.{r}" for i in (2, 3) for r in range(REPEATS)}
    reach_of_window_1 = {"t2.0", "t2.1", "c1.0"}
    assert moved <= later | {"c1.0", "c2.0"}
    assert reach_of_window_1 <= moved
    if mixer.startswith("lact"):
        assert moved == later | {"c1.0", "c2.0"}  # fast weights carry it on
    if mixer in ("window1", "window1_part"):
        assert moved == reach_of_window_1


@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
def test_a_noisy_chunk_moves_only_itself(mixer: str) -> None:
    """Its latents, its noise level: neither another repeat nor any other chunk."""
    network, sequence = tiny_network(CAUSAL_MIXERS[mixer]), tiny_sequence(chunks=CHUNKS, repeats=REPEATS)
    changed = dataclasses.replace(sequence, noisy=bumped(sequence.noisy, 1, 0))
    assert moved_slots(network, sequence, changed) == {"t1.0"}
    changed = dataclasses.replace(sequence, sigma=bumped(sequence.sigma, 2, 1))
    assert moved_slots(network, sequence, changed) == {"t2.1"}


@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
def test_later_chunks_do_not_move_earlier_ones_in_a_rollout(mixer: str) -> None:
    network, sequence = tiny_network(CAUSAL_MIXERS[mixer]), tiny_sequence(chunks=CHUNKS)
    with torch.no_grad():
        before = rolled_out(network, sequence)
        changed = dataclasses.replace(
            sequence,
            clean=bumped(sequence.clean, 2),
            noisy=bumped(sequence.noisy, 3),
            actions=bumped(sequence.actions, 3),
        )
        after = rolled_out(network, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


@pytest.mark.parametrize("mixer", ["full", "lact", "window2_sink1"])
def test_samples_of_a_batch_do_not_mix(mixer: str) -> None:
    from tests.longtake.networks.tiny import MIXERS

    network, sequence = tiny_network(MIXERS[mixer]), tiny_sequence(chunks=3)
    layout = ChunkLayout.teacher_forcing(3, 1, tiny_grid(sequence))
    x, sigma, conditions = sequence.slots(layout)
    with torch.no_grad():
        before, _ = network(x, sigma, conditions, layout)
        x = x.clone()
        x[1] += 1
        after, _ = network(x, sigma, conditions, layout)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("mixer", ["lact", "window2_sink1"])
def test_diffusion_forcing_sees_the_past_only(mixer: str) -> None:
    network, sequence = tiny_network(CAUSAL_MIXERS[mixer]), tiny_sequence(chunks=4)
    layout = ChunkLayout.diffusion_forcing(4, tiny_grid(sequence))
    x, sigma, conditions = sequence.slots(layout)
    with torch.no_grad():
        before, _ = network(x, sigma, conditions, layout)
        x = x.clone()
        x[:, 2] += 1
        after, _ = network(x, sigma, conditions, layout)
    assert [torch.equal(before[:, i], after[:, i]) for i in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("mixer", ["lact", "block_causal"])
def test_prompts_and_actions_of_a_chunk(mixer: str) -> None:
    """A later prompt or action does not reach back; that of a clean chunk reaches later chunks through memory."""
    network, sequence = tiny_network(CAUSAL_MIXERS[mixer]), tiny_sequence(chunks=CHUNKS, repeats=REPEATS)
    index = sequence.text_index.clone()
    index[:, 2] = 1 - index[:, 2]
    for changed in (
        dataclasses.replace(sequence, text_index=index),
        dataclasses.replace(sequence, actions=bumped(sequence.actions, 2)),
    ):
        moved = moved_slots(network, sequence, changed)
        assert moved == {"t2.0", "t2.1", "c2.0", "t3.0", "t3.1"}
