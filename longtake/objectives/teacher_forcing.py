"""Teacher forcing: every chunk is predicted from clean chunks before it, all chunks in one pass.

    target_0 x R, then for every later chunk i: context_{i-1}, target_i x R

The context slots are clean (or slightly noised, `context_noise`), and the repeats of a target, each with its own noise
and noise level, are blind to each other. Layout and loss follow LaCT's AR video model (arXiv 2505.23884, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from einops import rearrange
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.chunked import ChunkedObjective
from longtake.objectives.flow_matching import NoiseLevels
from longtake.objectives.own_contexts import own_layout, with_own_contexts
from longtake.rollout.denoise import Network
from longtake.rollout.noise import NoiseKey
from longtake.types import Conditions, LossOutput


class TeacherForcing(ChunkedObjective):
    """Velocity error of noisy chunks, each told the clean chunks before it.

    Args:
        chunk_lat: latent frames of a chunk.
        noise_levels: how noise levels are drawn and weighed.
        first_chunk_clean: see `SlotObjective`.
        noise_repeats: noisy copies of every chunk.
        num_chunks: chunks of a clip that are used, from its start; None: all.
        context_noise: contexts get a noise level drawn evenly from [0, this], and the network is told it.
        context_sees: whether a context slot attends to itself only ("self") or to earlier ones too ("past").
        own_contexts: share of clips whose contexts the network has drawn again itself (`own_contexts`).
        own_noise: these get noise of a level drawn evenly from [0, this] before.
        own_steps: network evaluations that they take, for a third of a step's time each.
        text_dropout: see `SlotObjective`.
        action_dropout: see `SlotObjective`.
        joint_dropout: see `SlotObjective`.
    """

    def __init__(
        self,
        *,
        chunk_lat: int,
        noise_levels: NoiseLevels,
        first_chunk_clean: Mapping[str, float],
        noise_repeats: int = 1,
        num_chunks: int | None = None,
        context_noise: float = 0.0,
        context_sees: Literal["self", "past"] = "self",
        own_contexts: float = 0.0,
        own_noise: float = 0.7,
        own_steps: int = 3,
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
        if noise_repeats < 1:
            raise ConfigError(
                f"objective.noise_repeats is {noise_repeats}; expected 1 or more. Change `objective.noise_repeats`."
            )
        if not 0 <= context_noise < 1:
            raise ConfigError(
                f"objective.context_noise is {context_noise}; expected 0 or more and less than 1. "
                "Change `objective.context_noise`."
            )
        if context_sees not in ("self", "past"):
            raise unknown_choice("visibility of contexts", context_sees, ["self", "past"], "objective.context_sees")
        for name, value in (("own_contexts", own_contexts), ("own_noise", own_noise)):
            if not 0 <= value <= 1:
                raise ConfigError(f"objective.{name} is {value}; expected 0 to 1. Change `objective.{name}`.")
        if own_steps < 1:
            raise ConfigError(f"objective.own_steps is {own_steps}; expected 1 or more. Change `objective.own_steps`.")
        self.own_contexts, self.own_noise, self.own_steps = own_contexts, own_noise, own_steps
        self.noise_repeats = noise_repeats
        self.context_noise = context_noise
        self.context_sees = context_sees

    def __call__(
        self,
        network: Network,
        latents: Tensor,
        conditions: Conditions,
        key: NoiseKey,
        *,
        mask: Tensor | None = None,
    ) -> LossOutput:
        """See `SlotObjective`; with `own_contexts` the network first draws contexts again."""
        training_pass, conditions = self.prepare(network, latents, key), self._dropped(conditions, key)
        if self.own_contexts > 0:
            count = self.chunks_used(latents.shape[2])
            used = latents[:, :, : count * self.chunk_lat].to(training_pass.x.dtype)
            training_pass = with_own_contexts(
                network,
                training_pass,
                rearrange(used, "b v (n f) c h w -> b n v f c h w", n=count),
                conditions,
                key,
                share=self.own_contexts,
                noise=self.own_noise,
                steps=self.own_steps,
            )
        return self._loss(network, training_pass, conditions, mask)

    def layout(self, num_chunks: int, grid: Grid) -> ChunkLayout:
        return ChunkLayout.teacher_forcing(num_chunks, self.noise_repeats, grid, context_sees=self.context_sees)

    def passes_without_gradient(self, num_chunks: int, grid: Grid) -> list[ChunkLayout]:
        if self.own_contexts == 0 or num_chunks < 2:
            return []
        return [own_layout(num_chunks - 1, grid, self.context_sees)] * self.own_steps
