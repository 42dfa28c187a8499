"""Slots: what one pass of a network holds, and what may see what.

A sequence is a list of slots; a slot is one chunk of latent frames, all views of it, either clean (context) or being
predicted (target). Token tensors are [b s l d] with l = (v f h w). Teacher forcing of 3 chunks with 2 repeats:

    slot      0     1     2     3     4     5     6     7        repeats of a target never see each other,
              t0.0  t0.1  c0    t1.0  t1.1  c1    t2.0  t2.1     and nothing ever sees a target
    sees      -     -     -     c0    c0    -     c0 c1 c0 c1    (and itself; with `context_sees = past` c1 sees c0)

A rollout runs the same slots in pieces: [t0], [t0], ..., [c0 t1], [t1], ..., with memory of what was `seen`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["context", "target"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One chunk of latent frames in one role.

    Attributes:
        chunk: index of the chunk in the video.
        role: "context" (given, clean) or "target" (being predicted). With fast weights a context is written before it
            is read, a target that is seen is read first: its own prediction must not come from its own write.
        start_lat: index of its first latent frame in the video.
        repeat: which noisy copy of the chunk this is; copies are blind to each other.
        seen: whether slots of later chunks may see it and memory keeps it.
    """

    chunk: int
    role: Role
    start_lat: int
    repeat: int = 0
    seen: bool = False


@dataclass(frozen=True)
class Grid:
    """The tokens of a slot: views, latent frames, and height and width in tokens (after patching)."""

    views: int
    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.views * self.frames * self.height * self.width


@dataclass(frozen=True)
class ChunkLayout:
    """The slots of one pass and the most that each of them may see. A mixer may see less, never more.

    Attributes:
        slots: in the order of the slot axis of every tensor of the pass.
        grid: the same for every slot.
        context_sees: whether a context slot attends to itself only or to earlier slots too.
        intra: inside a slot every token sees every token (full) or only earlier ones (causal, discrete tokens).
    """

    slots: tuple[Slot, ...]
    grid: Grid
    context_sees: Literal["self", "past"] = "self"
    intra: Literal["full", "causal"] = "full"

    def __post_init__(self) -> None:
        assert self.slots, "a layout needs a slot"
        top = -1
        for slot in self.slots:  # memory and fast weights are written in this order
            assert not slot.seen or slot.chunk > top, f"seen slots must come in rising chunk order, got {self.slots}"
            top = slot.chunk if slot.seen else top

    @classmethod
    def one_shot(cls, grid: Grid, first_lat: int = 0) -> ChunkLayout:
        """Returns one target slot: bidirectional and frame-conditioned diffusion."""
        return cls((Slot(chunk=0, role="target", start_lat=first_lat),), grid)

    @classmethod
    def teacher_forcing(
        cls,
        num_chunks: int,
        repeats: int,
        grid: Grid,
        first_lat: int = 0,
        context_sees: Literal["self", "past"] = "self",
    ) -> ChunkLayout:
        """Returns target_0 x repeats, then for every later chunk i: context_{i-1}, target_i x repeats."""
        slots: list[Slot] = []
        for chunk in range(num_chunks):
            start = first_lat + chunk * grid.frames
            if chunk > 0:
                slots.append(Slot(chunk=chunk - 1, role="context", start_lat=start - grid.frames, seen=True))
            slots += [Slot(chunk=chunk, role="target", start_lat=start, repeat=repeat) for repeat in range(repeats)]
        return cls(tuple(slots), grid, context_sees)

    @classmethod
    def diffusion_forcing(cls, num_chunks: int, grid: Grid, first_lat: int = 0) -> ChunkLayout:
        """Returns one target slot a chunk, each seeing the earlier ones at whatever noise they have."""
        starts = [first_lat + chunk * grid.frames for chunk in range(num_chunks)]
        slots = [Slot(chunk=chunk, role="target", start_lat=start, seen=True) for chunk, start in enumerate(starts)]
        return cls(tuple(slots), grid, "past")

    @classmethod
    def stream(
        cls,
        chunk: int,
        grid: Grid,
        commit: bool,
        first_lat: int = 0,
        context_sees: Literal["self", "past"] = "self",
        commit_role: Role = "context",
    ) -> ChunkLayout:
        """Returns a rollout's pass: target_i, with `commit` preceded by the clean chunk i-1 that goes into memory.

        Args:
            commit_role: "context" for weights trained by teacher forcing; "target" for diffusion forcing, where
                every slot that is seen was a target in training.
        """
        start = first_lat + chunk * grid.frames
        slots = [Slot(chunk=chunk, role="target", start_lat=start)]
        if commit:
            assert chunk > 0, "chunk 0 has no chunk before it to commit"
            slots.insert(0, Slot(chunk=chunk - 1, role=commit_role, start_lat=start - grid.frames, seen=True))
        return cls(tuple(slots), grid, context_sees)

    @classmethod
    def commit_only(
        cls,
        chunk: int,
        grid: Grid,
        first_lat: int = 0,
        context_sees: Literal["self", "past"] = "self",
        commit_role: Role = "context",
    ) -> ChunkLayout:
        """Returns the pass that only puts the clean chunk into memory (a context longer than one chunk)."""
        slot = Slot(chunk=chunk, role=commit_role, start_lat=first_lat + chunk * grid.frames, seen=True)
        return cls((slot,), grid, context_sees)

    @property
    def targets(self) -> tuple[int, ...]:
        """Indices of the target slots."""
        return tuple(index for index, slot in enumerate(self.slots) if slot.role == "target")

    @property
    def contexts(self) -> tuple[int, ...]:
        """Indices of the context slots."""
        return tuple(index for index, slot in enumerate(self.slots) if slot.role == "context")

    @property
    def end_lat(self) -> int:
        """One past the last latent frame of any slot."""
        return max(slot.start_lat for slot in self.slots) + self.grid.frames

    def visible(self, index: int, available: Sequence[Slot]) -> list[int]:
        """Returns which of the `available` slots (of memory, and earlier in this pass) slot `index` may see.

        Those are the `seen` ones of smaller chunks, in chunk order. A slot always sees itself as well.
        """
        slot = self.slots[index]
        if slot.role == "context" and self.context_sees == "self":
            return []
        past = [i for i, other in enumerate(available) if other.seen and other.chunk < slot.chunk]
        return sorted(past, key=lambda i: available[i].chunk)

    def positions(self) -> Tensor:
        """Returns the true (t, h, w) of every token, int64 [s l 3]; views share them."""
        starts = torch.tensor([slot.start_lat for slot in self.slots])
        return grid_positions(starts, self.grid)


def grid_positions(starts: Tensor, grid: Grid) -> Tensor:
    """Returns (t, h, w) int64 [s l 3] of the tokens of slots whose first latent frames are `starts` [s]."""
    axes = torch.meshgrid(
        torch.zeros(grid.views, dtype=torch.int64),
        torch.arange(grid.frames),
        torch.arange(grid.height),
        torch.arange(grid.width),
        indexing="ij",
    )
    inside = torch.stack(axes[1:], dim=-1).reshape(-1, 3)
    offset = torch.zeros(len(starts), 1, 3, dtype=torch.int64)
    offset[:, 0, 0] = starts
    return inside + offset


def sink_start(query: Slot, sink: Slot, rank: int, window: int, sinks: int, frames: int) -> int:
    """Returns the time index at which `query` sees a sink: its true one, or right before the window if that is nearer.

    So distances never exceed (window + sinks) slots, however long the video: the same in training and in a rollout.

    Args:
        query: the slot that looks.
        sink: the slot that is looked at.
        rank: which sink it is, 0 the first of the video.
        window: slots of the window.
        sinks: number of sinks.
        frames: latent frames of a slot.
    """
    return max(sink.start_lat, query.start_lat - (window + sinks - rank) * frames)
