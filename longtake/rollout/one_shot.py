"""The whole clip as one slot: rollout of bidirectional (and frame-conditioned) weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtake.networks.layout import ChunkLayout
from longtake.rollout.chunks import Chunk
from longtake.rollout.conditions import ConditionSource, of_chunks
from longtake.rollout.denoise import Guidance, Network, advance, evaluate, frame_sigmas, noise_of_chunk
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutKind, RolloutPlan
from longtake.rollout.solvers import Solver
from longtake.types import Conditions


class OneShotRollout:
    """Predicts a clip of the trained length at once; there is nothing after it.

    Args:
        num_steps: network evaluations; None: as many as the solver lists.
        guidance: scale of classifier-free guidance; 1 = none, at half the cost.
        unconditional: what the unconditional branch does not get: "text", "actions".
        guidance_interval: lowest and highest noise level at which guidance acts; elsewhere it costs nothing.
    """

    kind: RolloutKind = "one_shot"

    def __init__(
        self,
        *,
        num_steps: int | None = 50,
        guidance: float = 5.0,
        unconditional: Sequence[str] = ("text",),
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ) -> None:
        self.num_steps = num_steps
        self.guidance = Guidance(guidance, tuple(unconditional), tuple(guidance_interval))

    @torch.no_grad()
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
    ) -> Iterator[Chunk]:
        """Returns an iterator of one chunk. The arguments are those of `MemoryRollout`."""
        b, views, given_lat, *size = context.shape
        assert given_lat == plan.start_lat, f"the start has {given_lat} latent frames, the plan says {plan.start_lat}"
        assert len(key) == b, f"{len(key)} noise keys for a batch of {b}"
        frames = plan.trained.chunk_lat
        given = context if context.dtype == torch.float64 else context.float()
        own = of_chunks(conditions, [0]) if isinstance(conditions, Conditions) else conditions(0)
        own = self.guidance.stack(own, negative)
        layout = ChunkLayout.one_shot(network.grid((views, frames, *size)))
        x = noise_of_chunk(key, "noise", 0, given.new_empty(b, views, frames, *size))
        x = torch.cat([given, x[:, :, given_lat:]], dim=2)
        run = solver.begin(self.num_steps)
        for told in run.schedule.told:
            sigmas = [frame_sigmas(told, given_lat, frames)]
            velocity, _ = evaluate(network, [x], sigmas, own, layout, None, self.guidance, told)
            x = advance(run, x, velocity, given)
        return iter([Chunk(0, x, given_lat)])
