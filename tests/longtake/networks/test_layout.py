"""Slots, what they may see, and where they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longtake.networks.layout import ChunkLayout, Grid, Slot, sink_start

GRID = Grid(views=2, frames=3, height=2, width=4)


def names(layout: ChunkLayout) -> list[str]:
    return [f"{slot.role[0]}{slot.chunk}.{slot.repeat}" for slot in layout.slots]


def test_teacher_forcing_order() -> None:
    layout = ChunkLayout.teacher_forcing(3, 2, GRID, first_lat=5)
    assert names(layout) == ["t0.0", "t0.1", "c0.0", "t1.0", "t1.1", "c1.0", "t2.0", "t2.1"]
    assert [slot.start_lat for slot in layout.slots] == [5, 5, 5, 8, 8, 8, 11, 11]
    assert [slot.seen for slot in layout.slots] == [slot.role == "context" for slot in layout.slots]
    assert layout.contexts == (2, 5)
    assert layout.targets == (0, 1, 3, 4, 6, 7)
    assert layout.end_lat == 14


@pytest.mark.parametrize(("frames", "repeats", "slots"), [(21, 1, 13), (21, 2, 20), (36, 1, 23), (42, 1, 27)])
def test_slot_counts_of_the_release(frames: int, repeats: int, slots: int) -> None:
    assert len(ChunkLayout.teacher_forcing(frames // 3, repeats, GRID).slots) == slots


def test_what_slots_see() -> None:
    layout = ChunkLayout.teacher_forcing(3, 2, GRID)
    seen = [[names(layout)[i] for i in layout.visible(index, layout.slots[:index])] for index in range(8)]
    assert seen == [[], [], [], ["c0.0"], ["c0.0"], [], ["c0.0", "c1.0"], ["c0.0", "c1.0"]]
    past = dataclasses.replace(layout, context_sees="past")
    assert past.visible(5, past.slots[:5]) == [2]
    forcing = ChunkLayout.diffusion_forcing(3, GRID)
    assert [forcing.visible(i, forcing.slots[:i]) for i in range(3)] == [[], [0], [0, 1]]


def test_a_pass_never_sees_its_own_or_later_chunks_in_memory() -> None:
    memory = [Slot(chunk=i, role="context", start_lat=3 * i, seen=True) for i in (3, 0, 1, 2)]
    layout = ChunkLayout.stream(2, GRID, commit=False)
    assert [memory[i].chunk for i in layout.visible(0, memory)] == [0, 1]


def test_stream_is_a_piece_of_teacher_forcing() -> None:
    whole = ChunkLayout.teacher_forcing(4, 1, GRID, first_lat=2)
    assert ChunkLayout.stream(0, GRID, commit=False, first_lat=2).slots == whole.slots[:1]
    for chunk in (1, 2, 3):
        step = ChunkLayout.stream(chunk, GRID, commit=True, first_lat=2)
        assert step.slots == whole.slots[2 * chunk - 1 : 2 * chunk + 1]
        assert ChunkLayout.commit_only(chunk - 1, GRID, first_lat=2).slots == step.slots[:1]


def test_positions_are_true_and_shared_by_views() -> None:
    layout = ChunkLayout.teacher_forcing(2, 1, GRID, first_lat=7)
    positions = layout.positions().view(3, 2, 3, 2, 4, 3)
    assert torch.equal(positions[:, 0], positions[:, 1])
    assert positions[:, 0, :, 0, 0, 0].tolist() == [[7, 8, 9], [7, 8, 9], [10, 11, 12]]
    assert positions[0, 0, 1, 1, 2].tolist() == [8, 1, 2]


def test_sinks_come_no_further_than_right_before_the_window() -> None:
    slots = [Slot(chunk=i, role="context", start_lat=3 * i, seen=True) for i in range(9)]

    def start(query: int, rank: int) -> int:
        return sink_start(slots[query], slots[rank], rank, window=2, sinks=2, frames=3)

    assert [start(query, 0) for query in (3, 4, 5, 8)] == [0, 0, 3, 12]
    assert [start(query, 1) for query in (3, 4, 5, 8)] == [3, 3, 6, 15]  # the window of chunk 8 begins at 18


def test_layout_is_hashable_and_comparable() -> None:
    assert hash(ChunkLayout.one_shot(GRID)) == hash(ChunkLayout.one_shot(GRID))
    assert ChunkLayout.one_shot(GRID) != ChunkLayout.one_shot(GRID, first_lat=1)


def test_seen_slots_in_falling_order_are_refused() -> None:
    slots = ChunkLayout.teacher_forcing(3, 1, GRID).slots
    with pytest.raises(AssertionError, match="rising chunk order"):
        ChunkLayout(slots[::-1], GRID)
