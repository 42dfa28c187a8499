"""From noise to one clean slot: network evaluations, guidance, solver. Shared by every diffusion rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.memory import Memory
from longtake.rollout.conditions import dropped
from longtake.rollout.noise import Draws, NoiseKey, normal
from longtake.rollout.solvers import SolverRun
from longtake.types import Conditions

_TEXT = ("text_emb", "text_ids", "text_mask")


class Network(Protocol):
    """What rollouts and objectives need of a network that predicts velocities."""

    def __call__(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, layout: ChunkLayout, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        """Returns the velocity of every slot, of the shape of x [b s v f c h w], and the memory after them.

        `sigma` [b s v f] may have size 1 where views or frames are equal. With `memory=None` nothing is remembered.
        """
        ...

    @property
    def streams(self) -> bool:
        """Whether a rollout can carry memory (a causal mixer)."""
        ...

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """Returns the tokens of a slot of latents of a shape [... v f c h w]."""
        ...

    def empty_memory(self) -> Memory:
        """Returns the memory at the beginning of a video."""
        ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v = u + scale * (c - u), both branches in one batch: first c, then u.

    Attributes:
        scale: 1 leaves the unconditional branch out.
        without: what the unconditional branch does not get: "text", "actions". A negative text replaces the text.
        interval: lowest and highest noise level at which the branches differ in effect (Kynkäänniemi et al. 2024,
            arXiv 2404.07724); elsewhere c alone is evaluated, at half the cost.
    """

    scale: float
    without: tuple[str, ...] = ("text",)
    interval: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ConfigError(
                f"rollout.guidance_interval is {list(self.interval)}; expected two rising noise levels from 0 to 1, "
                "for example [0.5, 1.0]. Change `rollout.guidance_interval`."
            )
        for name in self.without:
            if name not in ("text", "actions"):
                raise unknown_choice("condition", name, ["text", "actions"], "rollout.unconditional")

    @property
    def branches(self) -> int:
        return 1 if self.scale == 1 else 2

    def acts_at(self, told: float) -> bool:
        """Returns whether guidance changes the velocity at a noise level."""
        return self.branches > 1 and self.interval[0] <= told <= self.interval[1]

    def stack(self, conditions: Conditions, negative: Conditions | None) -> Conditions:
        """Returns the conditions of all branches as one batch.

        Args:
            conditions: of the conditional branch.
            negative: the text of the unconditional branch; None: no text.

        Raises:
            ConfigError: the branches would be equal.
        """
        if self.branches == 1:
            return conditions
        has_text = conditions.text_ids is not None or conditions.text_emb is not None
        drops_text = "text" in self.without and has_text
        drops_actions = "actions" in self.without and conditions.actions is not None
        if not drops_text and not drops_actions:
            raise ConfigError(
                f"rollout.guidance is {self.scale}, but there is no {' or '.join(self.without) or 'condition'} to "
                "leave out of the unconditional branch. Set `rollout.guidance` to 1 or change `rollout.unconditional`."
            )
        other = conditions
        b = _batch_size(conditions)
        everybody = torch.ones(b, dtype=torch.bool)
        if drops_text and negative is not None:
            other = dataclasses.replace(other, **{name: getattr(negative, name) for name in _TEXT})
        elif drops_text:
            other = dropped(other, text=everybody)
        if drops_actions:
            other = dropped(other, actions=everybody)
        return Conditions.stack([conditions, other])

    def combine(self, velocity: Tensor, told: float) -> Tensor:
        """Returns the guided velocity [b ...] at a noise level from those of all branches."""
        if self.branches == 1:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        if not self.acts_at(told):
            return conditional
        return unconditional + self.scale * (conditional - unconditional)


def evaluate(
    network: Network,
    slots: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    conditions: Conditions,
    layout: ChunkLayout,
    memory: Memory | None,
    guidance: Guidance,
    told: float,
    *,
    commits: bool = False,
) -> tuple[Tensor, Memory | None]:
    """Returns the guided velocity of the last slot, [b v f c h w], and the memory after a pass that commits.

    Args:
        network: predicts velocities.
        slots: latents of each slot, [b v f c h w].
        sigmas: noise level of each slot, [f] or [1]; [v f] where views differ.
        conditions: of all branches and slots.
        layout: of the slots.
        memory: of all branches.
        guidance: how the branches combine.
        told: noise level of what is denoised in the last slot.
        commits: whether memory is wanted, for which every branch is needed.
    """
    x = torch.stack(list(slots), dim=1)
    if commits or guidance.acts_at(told):
        x = x.repeat(guidance.branches, *[1] * (x.ndim - 1))
    elif guidance.branches > 1:  # the first branch alone
        guidance, own = Guidance(1.0), slice(len(x))
        conditions = conditions.map(lambda value: value[own])
        memory = None if memory is None else memory.map(lambda value: value[own])
    rows = [sigma if sigma.ndim == 2 else sigma[None] for sigma in sigmas]
    shape = torch.broadcast_shapes(*(row.shape for row in rows))
    sigma = torch.stack([row.expand(shape) for row in rows])[None].expand(len(x), -1, -1, -1)
    velocity, memory = network(x, sigma.to(x.device, x.dtype), conditions, layout, memory)
    return guidance.combine(velocity[:, -1].to(x.dtype), told), memory


def noise_of_chunk(key: NoiseKey, purpose: str, chunk: int, like: Tensor) -> Tensor:
    """Returns the noise of one chunk, of the shape, dtype and device of `like` [b v f c h w]."""
    views, frames, *size = like.shape[1:]
    return normal(key, purpose, Draws([chunk], [0], views, frames), size, like.device)[:, 0].to(like.dtype)


def checked_context_noise(level: float) -> float:
    """Returns the noise level of what a rollout remembers or hands over.

    Raises:
        ConfigError: it is no level, or leaves nothing of the context.
    """
    if not 0 <= level < 1:
        raise ConfigError(
            f"rollout.context_noise is {level}; expected 0 or more and less than 1. Change `rollout.context_noise`."
        )
    return level


def frame_sigmas(sigma: float, given_lat: int, frames: int) -> Tensor:
    """Returns the noise level of the frames of a slot: [1] where all are equal, else [f] with 0 for those given."""
    if given_lat == 0:
        return torch.tensor([sigma], dtype=torch.float64)
    return torch.where(torch.arange(frames) < given_lat, 0.0, torch.tensor(sigma, dtype=torch.float64))


def advance(run: SolverRun, x: Tensor, velocity: Tensor, given: Tensor) -> Tensor:
    """Returns x after a solver step; its first frames stay as `given` [b v n c h w]."""
    x = run.step(x, velocity)
    return torch.cat([given, x[:, :, given.shape[2] :]], dim=2) if given.shape[2] else x


def _batch_size(conditions: Conditions) -> int:
    fields = (getattr(conditions, field.name) for field in dataclasses.fields(conditions))
    return next(len(value) for value in fields if isinstance(value, Tensor))
