"""Bidirectional diffusion: the whole clip is one target slot that sees all of itself."""

from __future__ import annotations

from typing import ClassVar

from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.slot_objective import SlotObjective


class Bidirectional(SlotObjective):
    """Velocity error of whole clips; the leading latents may be given (an image, a short clip)."""

    rollouts: ClassVar[tuple[str, ...]] = ("one_shot",)

    def chunk_frames(self, num_frames_lat: int) -> int:
        return num_frames_lat

    def chunks_used(self, num_frames_lat: int) -> int:
        return 1

    def layout(self, num_chunks: int, grid: Grid) -> ChunkLayout:
        assert num_chunks == 1, f"a bidirectional clip is one slot, got {num_chunks} chunks"
        return ChunkLayout.one_shot(grid)
