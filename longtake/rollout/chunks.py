"""Chunk-by-chunk rollout of a diffusion model with memory (LaCT, windows, sinks, block-causal).

    chunk 0      first evaluation [t0]       later ones [t0]
    chunk i      first evaluation [c(i-1) ti], which commits chunk i-1 to memory; later ones [ti], which only read it

So committing costs no pass of its own and every chunk costs the same, however long the video. A start of several chunks
is committed chunk by chunk first. Nothing of the video is held but the last chunk and the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.layout import ChunkLayout
from longtake.networks.memory import Memory
from longtake.rollout.conditions import ConditionSource, join_slots, of_chunks, slot_part, with_slots
from longtake.rollout.denoise import (
    Guidance,
    Network,
    advance,
    checked_context_noise,
    evaluate,
    frame_sigmas,
    noise_of_chunk,
)
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutKind, RolloutPlan
from longtake.rollout.solvers import Solver
from longtake.types import Conditions


@dataclass(frozen=True)
class Chunk:
    """One chunk of a rollout.

    Attributes:
        index: of the chunk in the video.
        latents: normalised latents, [b v f c h w].
        given_lat: how many of its first latent frames were given, not predicted.
    """

    index: int
    latents: Tensor
    given_lat: int


@dataclass(frozen=True)
class RolloutState:
    """All that a rollout carries from chunk to chunk. Its tensors are never changed in place.

    Attributes:
        key: names the noise.
        branches: branches of guidance that are stacked on the batch axis of the memory.
        next_chunk: the chunk that comes next.
        memory: of the chunks that were committed.
        pending: the last chunk, [b v f c h w], which the next chunk's first evaluation commits.
        pending_conditions: its own conditions for all branches, one slot (fields with a slot axis only).
    """

    key: NoiseKey
    branches: int
    memory: Memory
    next_chunk: int = 0
    pending: Tensor | None = None
    pending_conditions: Conditions | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and plain values only, so that it can be saved and read back without running any code."""
        conditions = {} if self.pending_conditions is None else vars(self.pending_conditions)
        return {
            "seed": self.key.seed,
            "samples": list(self.key.samples),
            "branches": self.branches,
            "next_chunk": self.next_chunk,
            "memory": self.memory.state_dict(),
            "pending": self.pending,
            "pending_conditions": {name: value for name, value in conditions.items() if value is not None},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RolloutState:
        """Returns the state that `state_dict` described."""
        return cls(
            key=NoiseKey(state["seed"], tuple(state["samples"])),
            branches=state["branches"],
            memory=Memory.from_state_dict(state["memory"]),
            next_chunk=state["next_chunk"],
            pending=state["pending"],
            pending_conditions=None if state["pending"] is None else Conditions(**state["pending_conditions"]),
        )

    def to(self, device: torch.device | str) -> RolloutState:
        """Returns this state on another device."""
        pending = None if self.pending is None else self.pending.to(device)
        conditions = None if self.pending_conditions is None else self.pending_conditions.to(device)
        return RolloutState(self.key, self.branches, self.memory.to(device), self.next_chunk, pending, conditions)


class MemoryRollout:
    """Predicts chunk after chunk from a memory of the ones before.

    Args:
        num_steps: network evaluations a chunk; None: as many as the solver lists.
        guidance: scale of classifier-free guidance; 1 = none, at half the cost.
        unconditional: what the unconditional branch does not get: "text", "actions".
        context_noise: noise level of the chunks that go into memory, 0 = clean. Above 0 only for weights that were
            trained with `objective.context_noise`.
        guidance_interval: lowest and highest noise level at which guidance acts; elsewhere it costs nothing.
    """

    kind: RolloutKind = "memory"

    def __init__(
        self,
        *,
        num_steps: int | None = 50,
        guidance: float = 5.0,
        unconditional: Sequence[str] = ("text",),
        context_noise: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ) -> None:
        self.num_steps = num_steps
        self.guidance = Guidance(guidance, tuple(unconditional), tuple(guidance_interval))
        self.context_noise = checked_context_noise(context_noise)

    def __call__(
        self,
        network: Network,
        context: Tensor,
        conditions: ConditionSource,
        plan: RolloutPlan,
        solver: Solver,
        key: NoiseKey,
        *,
        negative: Conditions | None = None,
        state: RolloutState | None = None,
    ) -> ChunkStream:
        """Returns the chunks from the first one on, those given at the start included, as an iterator.

        Args:
            network: predicts velocities; give it in evaluation mode.
            context: latents of the start, [b v t c h w] with t = plan.start_lat; t = 0 starts from nothing and still
                says the size, type and device of the latents.
            conditions: with the chunks as slot axis, or a function that returns those of one chunk (one slot).
            plan: from `plan_rollout`.
            solver: denoises a chunk.
            key: names the noise, one sample an entry of the batch.
            negative: text of the unconditional branch (text fields only); None: no text.
            state: continue from here; `context` is then only read if the start was not finished.
        """
        if not network.streams:
            raise ConfigError(
                "rollout=memory needs a network with a causal mixer (LaCT, window, block-causal), but this one sees "
                "the whole clip. Change `rollout` to one_shot or `network.mixer`."
            )
        solver.begin(self.num_steps)  # a wrong number of steps is found before anything is computed
        return ChunkStream(self, network, context, conditions, plan, solver, key, negative, state)


class ChunkStream(Iterator[Chunk]):
    """A rollout under way. `state` may be saved between two chunks and given to a new rollout."""

    def __init__(
        self,
        rollout: MemoryRollout,
        network: Network,
        context: Tensor,
        conditions: ConditionSource,
        plan: RolloutPlan,
        solver: Solver,
        key: NoiseKey,
        negative: Conditions | None,
        state: RolloutState | None,
    ) -> None:
        b, views, frames = context.shape[:3]
        assert frames == plan.start_lat, f"the start has {frames} latent frames, the plan says {plan.start_lat}"
        assert len(key) == b, f"{len(key)} noise keys for a batch of {b}"
        branches = rollout.guidance.branches
        if state is not None and state.branches != branches:
            raise ConfigError(
                f"the saved rollout has {state.branches} branches of guidance, but "
                f"rollout.guidance={rollout.guidance.scale} needs {branches}. Change `rollout.guidance`."
            )
        self._rollout, self._network, self._plan, self._solver = rollout, network, plan, solver
        self._conditions, self._negative = conditions, negative
        self._context = context if context.dtype == torch.float64 else context.float()
        self._grid = network.grid((views, plan.trained.chunk_lat, *context.shape[3:]))
        self.state = state or RolloutState(key, branches, network.empty_memory())

    def __len__(self) -> int:
        """Returns how many chunks are still to come."""
        return max(0, self._plan.num_chunks - self.state.next_chunk)

    @torch.no_grad()
    def __next__(self) -> Chunk:
        chunk = self.state.next_chunk
        if chunk >= self._plan.num_chunks:
            raise StopIteration
        own = self._conditions_of(chunk)
        frames = self._plan.trained.chunk_lat
        if chunk < self._plan.given_chunks:
            commits = self.state.pending is not None and not self._plan.trained.one_context
            memory = self._commit_pending(own) if commits else self.state.memory
            given = frames
            latents = self._context[:, :, chunk * frames : (chunk + 1) * frames]
        else:
            given = self._plan.lead_lat if chunk == 0 else 0
            latents, memory = self._predict(chunk, given, own)
        self.state = RolloutState(
            self.state.key, self.state.branches, memory, chunk + 1, latents.clone(), slot_part(own)
        )
        return Chunk(chunk, latents, given)

    def _conditions_of(self, chunk: int) -> Conditions:
        """Returns the conditions of one chunk, one slot, all branches."""
        source = self._conditions
        own = of_chunks(source, [chunk]) if isinstance(source, Conditions) else source(chunk)
        return self._rollout.guidance.stack(own, self._negative)

    def _predict(self, chunk: int, given_lat: int, own: Conditions) -> tuple[Tensor, Memory]:
        """Returns the clean chunk and the memory, with the chunk before it committed."""
        frames, trained, state = self._plan.trained.chunk_lat, self._plan.trained, self.state
        b, views, _, *size = self._context.shape
        given = self._context[:, :, :given_lat]
        x = noise_of_chunk(state.key, "noise", chunk, self._context.new_empty(b, views, frames, *size))
        x = torch.cat([given, x[:, :, given_lat:]], dim=2)
        run, memory = self._solver.begin(self._rollout.num_steps), state.memory
        place = chunk
        if trained.one_context:  # as in training: slots 0 and 1 of a video that has no others
            memory, place = self._network.empty_memory(), min(chunk, 1)
        for index, told in enumerate(run.schedule.told):
            commits = index == 0 and state.pending is not None
            layout = ChunkLayout.stream(
                place, self._grid, commits, context_sees=trained.context_sees, commit_role=trained.commit_role
            )
            slots, sigmas, conditions = [x], [frame_sigmas(told, given_lat, frames)], own
            if commits:
                slots.insert(0, self._pending_latents())
                sigmas.insert(0, frame_sigmas(self._rollout.context_noise, 0, frames))
                assert state.pending_conditions is not None, "a pending chunk has its conditions"
                conditions = join_slots(state.pending_conditions, own)
            guidance = self._rollout.guidance
            velocity, after = evaluate(
                self._network, slots, sigmas, conditions, layout, memory, guidance, told, commits=commits
            )
            memory = after if commits else memory
            assert memory is not None, "a pass that commits must return memory"
            x = advance(run, x, velocity, given)
        return x, memory

    def _commit_pending(self, own: Conditions) -> Memory:
        """Returns the memory with the pending chunk in it, by a pass of its own (a start of several chunks)."""
        trained, pending = self._plan.trained, self.state.pending_conditions
        assert pending is not None, "there is no pending chunk"
        layout = ChunkLayout.commit_only(
            self.state.next_chunk - 1,
            self._grid,
            context_sees=trained.context_sees,
            commit_role=trained.commit_role,
        )
        slots, noise, guidance = [self._pending_latents()], self._rollout.context_noise, self._rollout.guidance
        sigmas, conditions = [frame_sigmas(noise, 0, trained.chunk_lat)], with_slots(own, pending)
        _, memory = evaluate(
            self._network, slots, sigmas, conditions, layout, self.state.memory, guidance, noise, commits=True
        )
        assert memory is not None, "a pass that commits must return memory"
        return memory

    def _pending_latents(self) -> Tensor:
        """Returns the pending chunk as it goes into memory."""
        pending, sigma = self.state.pending, self._rollout.context_noise
        assert pending is not None, "there is no pending chunk"
        if sigma == 0:
            return pending
        noise = noise_of_chunk(self.state.key, "context", self.state.next_chunk - 1, pending)
        return (1 - sigma) * pending + sigma * noise
