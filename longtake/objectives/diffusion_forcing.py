"""Diffusion forcing (Chen et al. 2024, arXiv 2407.01392): noisy chunks that see the noisy chunks before them.

There is no second, clean copy of a chunk, so a pass is half as long as with teacher forcing. Every chunk (or latent
frame) has a noise level of its own; a rollout commits chunks at noise level 0, which training has seen as its limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from longtake.errors import unknown_choice
from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.chunked import ChunkedObjective
from longtake.objectives.flow_matching import NoiseLevels


class DiffusionForcing(ChunkedObjective):
    """Velocity error of chunks at independent noise levels.

    Args:
        chunk_lat: latent frames of a chunk.
        noise_levels: how noise levels are drawn and weighed.
        first_chunk_clean: see `SlotObjective`.
        levels_per: "slot" draws a level a chunk, "frame" one a latent frame.
        num_chunks: chunks of a clip that are used, from its start; None: all.
        text_dropout: see `SlotObjective`.
        action_dropout: see `SlotObjective`.
        joint_dropout: see `SlotObjective`.
    """

    commit_role: ClassVar[Literal["context", "target"]] = "target"
    context_sees: Literal["self", "past"] = "past"

    def __init__(
        self,
        *,
        chunk_lat: int,
        noise_levels: NoiseLevels,
        first_chunk_clean: Mapping[str, float],
        levels_per: Literal["slot", "frame"] = "slot",
        num_chunks: int | None = None,
        text_dropout: float = 0.0,
        action_dropout: float = 0.0,
        joint_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            chunk_lat=chunk_lat,
            num_chunks=num_chunks,
            noise_levels=noise_levels,
            first_chunk_clean=first_chunk_clean,
            text_dropout=text_dropout,
            action_dropout=action_dropout,
            joint_dropout=joint_dropout,
        )
        if levels_per not in ("slot", "frame"):
            raise unknown_choice("unit of noise levels", levels_per, ["slot", "frame"], "objective.levels_per")
        self.levels_per = levels_per

    def layout(self, num_chunks: int, grid: Grid) -> ChunkLayout:
        return ChunkLayout.diffusion_forcing(num_chunks, grid)
