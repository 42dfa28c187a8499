"""What every diffusion objective has in common: noise the target slots, run the network once, weigh the velocity error.

An objective differs from the next one only in its layout: which chunks are slots, in which role, and what they may see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from longtake.errors import ConfigError
from longtake.geometry import latent_frames
from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.flow_matching import NoiseLevels, noised, pick, start_probabilities
from longtake.rollout.conditions import dropped, of_chunks
from longtake.rollout.denoise import Network
from longtake.rollout.noise import Draws, NoiseKey, normal, uniform, uniform_of_sample
from longtake.rollout.plan import TrainedFor
from longtake.types import Conditions, LossOutput


@dataclass(frozen=True)
class TrainingPass:
    """The input of one training pass and what it is held against.

    Attributes:
        x: latents of every slot, noised, [b s v f c h w].
        sigma: noise level of every latent frame, [b s v f], with size 1 where views or frames of a slot are equal.
        layout: of the slots.
        velocity: what the target slots should predict, [b targets v f c h w].
        weight: what each latent of the target slots weighs, [b targets 1 f] or [b targets 1 1].
        predicted: False for latents that were given, bool [b targets v f], with size 1 as in `sigma`.
    """

    x: Tensor
    sigma: Tensor
    layout: ChunkLayout
    velocity: Tensor
    weight: Tensor
    predicted: Tensor


class SlotObjective(ABC):
    """Velocity error on the target slots of a layout.

    Attributes:
        rollouts: kinds of rollout that the weights are for.
        own_starts: whether every chunk of a clip is a causal start of its own (`TrainedFor.own_starts`).
        one_context: whether a chunk is told of the one before it only (`TrainedFor.one_context`).
        gives_in_evaluation: whether `evaluate` gives the first chunk the start that training gives it.

    Args:
        noise_levels: how noise levels are drawn and weighed.
        first_chunk_clean: how often the first chunk has no clean leading latents ("none"), one ("image") or more
            ("clip"): what a rollout may start from.
        text_dropout: share of samples without text, for guidance.
        action_dropout: share of samples without actions.
        joint_dropout: share of samples without both; the three exclude each other.
    """

    rollouts: ClassVar[tuple[str, ...]] = ("memory",)
    commit_role: ClassVar[Literal["context", "target"]] = "context"
    context_sees: Literal["self", "past"] = "self"
    levels_per: Literal["slot", "frame"] = "slot"
    context_noise: float = 0.0
    own_starts: ClassVar[bool] = False
    one_context: ClassVar[bool] = False
    gives_in_evaluation: ClassVar[bool] = False

    def __init__(
        self,
        *,
        noise_levels: NoiseLevels,
        first_chunk_clean: Mapping[str, float],
        text_dropout: float = 0.0,
        action_dropout: float = 0.0,
        joint_dropout: float = 0.0,
    ) -> None:
        shares = {"text_dropout": text_dropout, "action_dropout": action_dropout, "joint_dropout": joint_dropout}
        for name, value in shares.items():
            if not 0 <= value <= 1 or sum(shares.values()) > 1:
                raise ConfigError(
                    f"objective.{name} is {value} and the dropouts sum to {sum(shares.values())}; expected shares "
                    f"in [0, 1] that sum to at most 1. Change `objective.{name}`."
                )
        self.noise_levels = noise_levels
        self.first_chunk_clean = dict(first_chunk_clean)
        self.text_dropout, self.action_dropout, self.joint_dropout = text_dropout, action_dropout, joint_dropout

    @abstractmethod
    def chunk_frames(self, num_frames_lat: int) -> int:
        """Returns the latent frames of a chunk for clips of `num_frames_lat`."""

    @abstractmethod
    def chunks_used(self, num_frames_lat: int) -> int:
        """Returns how many chunks of a clip of `num_frames_lat` latent frames are trained on.

        Raises:
            ConfigError: the clip is not made of whole chunks, or too short.
        """

    @abstractmethod
    def layout(self, num_chunks: int, grid: Grid) -> ChunkLayout:
        """Returns the slots of a training pass; its targets are in chunk order, equally many a chunk."""

    def passes_without_gradient(self, num_chunks: int, grid: Grid) -> list[ChunkLayout]:
        """Returns the layouts of what a training step evaluates besides its training pass, for counting work."""
        return []

    def frames_lat(self, num_frames_px: int, ratio: int) -> int:
        """Returns the latent frames of clips of `num_frames_px`. Raises ConfigError where there are no such clips."""
        return latent_frames(num_frames_px, ratio, "video.num_frames")

    def trained_for(self, *, num_frames_px: int, ratio: int) -> TrainedFor:
        """Returns what weights trained by this objective on clips of `num_frames_px` may be used for.

        Raises:
            ConfigError: such clips do not fit this objective.
        """
        num_frames_lat = self.frames_lat(num_frames_px, ratio)
        self.chunks_used(num_frames_lat)
        frames = self.chunk_frames(num_frames_lat)
        probabilities = start_probabilities(self.first_chunk_clean, frames)
        return TrainedFor(
            rollouts=self.rollouts,
            chunk_lat=frames,
            starts_lat=tuple(n for n, probability in enumerate(probabilities) if probability > 0),
            context_sees=self.context_sees,
            commit_role=self.commit_role,
            ratio=ratio,
            own_starts=self.own_starts,
            one_context=self.one_context,
        )

    def __call__(
        self,
        network: Network,
        latents: Tensor,
        conditions: Conditions,
        key: NoiseKey,
        *,
        mask: Tensor | None = None,
    ) -> LossOutput:
        """Returns the loss of a batch.

        Args:
            network: predicts velocities.
            latents: normalised and clean, [b v t c h w].
            conditions: with the chunks of the clip as slot axis (`clip_conditions`).
            key: seed and plan position of each sample; the only thing that draws depend on.
            mask: False for latents that are not real, bool [b v t]; they are out of the loss.
        """
        training_pass = self.prepare(network, latents, key)
        return self._loss(network, training_pass, self._dropped(conditions, key), mask)

    @torch.no_grad()
    def evaluate(
        self,
        network: Network,
        latents: Tensor,
        conditions: Conditions,
        key: NoiseKey,
        sigma: float,
        *,
        mask: Tensor | None = None,
    ) -> LossOutput:
        """Returns the unweighted error with every target at one noise level, nothing given and nothing dropped."""
        return self._loss(network, self.prepare(network, latents, key, sigma=sigma), conditions, mask)

    def prepare(self, network: Network, latents: Tensor, key: NoiseKey, *, sigma: float | None = None) -> TrainingPass:
        """Returns the noised slots of a batch; with `sigma` as in `evaluate`."""
        assert len(key) == len(latents), f"{len(key)} noise keys for a batch of {len(latents)}"
        latents = latents if latents.dtype == torch.float64 else latents.float()
        views, num_lat, *size = latents.shape[1:]
        count, frames = self.chunks_used(num_lat), self.chunk_frames(num_lat)
        layout = self.layout(count, network.grid((views, frames, *size)))
        chunks = rearrange(latents[:, :, : count * frames], "b v (n f) c h w -> b n v f c h w", f=frames)
        slot_chunks = [slot.chunk for slot in layout.slots]
        x = chunks.index_select(1, torch.tensor(slot_chunks, device=latents.device))
        targets = torch.tensor(layout.targets, device=latents.device)
        clean = x.index_select(1, targets)
        levels, weight = self._levels(key, layout, sigma)
        given = torch.zeros(len(key), 1, 1, 1, dtype=torch.bool)
        if sigma is None or self.gives_in_evaluation:
            given = self._given(key, layout, frames)
        target_levels = torch.where(given, self._given_levels(key), levels).to(latents.device, latents.dtype)
        noise = self._noise(key, "noise", layout.targets, layout, clean)
        x = x.index_copy(1, targets, noised(clean, noise, target_levels[..., None, None, None]))
        sigmas = target_levels.new_zeros(len(key), len(layout.slots), *target_levels.shape[2:])
        sigmas[:, targets] = target_levels
        if self.context_noise > 0 and sigma is None and layout.contexts:
            x, sigmas = self._with_context_noise(x, sigmas, key, layout)
        predicted = (~given).expand(-1, len(targets), -1, -1).to(latents.device)
        weight = weight.to(latents.device, latents.dtype)
        return TrainingPass(x, sigmas, layout, noise - clean, weight, predicted)

    def _levels(self, key: NoiseKey, layout: ChunkLayout, sigma: float | None) -> tuple[Tensor, Tensor]:
        """Returns noise levels and weights of the targets, float64 on the CPU, [b targets 1 f or 1]."""
        slots = [layout.slots[index] for index in layout.targets]
        if sigma is not None:
            levels = torch.full((len(key), len(slots), 1, 1), sigma, dtype=torch.float64)
            return levels, torch.ones_like(levels)
        frames = layout.grid.frames if self.levels_per == "frame" else 1
        draws = Draws([slot.chunk for slot in slots], [slot.repeat for slot in slots], 1, frames)
        u = uniform(key, "sigma", draws)
        return self.noise_levels.sigma(u, layout.grid.tokens), self.noise_levels.weight(u)

    def _given(self, key: NoiseKey, layout: ChunkLayout, frames: int) -> Tensor:
        """Returns which latents of the targets are given, bool [b targets v f], with size 1 where equal for all."""
        probabilities = start_probabilities(self.first_chunk_clean, frames)
        if probabilities[0] == 1:
            return torch.zeros(len(key), 1, 1, 1, dtype=torch.bool)
        slots = [layout.slots[index] for index in layout.targets]
        u = uniform(key, "start", Draws([slot.chunk for slot in slots], [slot.repeat for slot in slots]))
        is_first = torch.tensor([slot.chunk == 0 for slot in slots])[:, None, None]
        return (torch.arange(frames) < pick(u, probabilities)) & is_first

    def _given_levels(self, key: NoiseKey) -> Tensor | float:
        """Returns the noise level of what is given, broadcasting to [b targets v f]."""
        return 0.0

    def _noise(
        self, key: NoiseKey, purpose: str, indices: tuple[int, ...], layout: ChunkLayout, like: Tensor
    ) -> Tensor:
        """Returns the noise of some slots, [b slots v f c h w], of the dtype and device of `like`."""
        slots = [layout.slots[index] for index in indices]
        draws = Draws([slot.chunk for slot in slots], [slot.repeat for slot in slots], *like.shape[2:4])
        return normal(key, purpose, draws, like.shape[4:], like.device).to(like.dtype)

    def _with_context_noise(
        self, x: Tensor, sigmas: Tensor, key: NoiseKey, layout: ChunkLayout
    ) -> tuple[Tensor, Tensor]:
        """Returns x and sigmas with the contexts noised by levels of their own."""
        indices = torch.tensor(layout.contexts, device=x.device)
        chunks = [layout.slots[index].chunk for index in layout.contexts]
        levels = self._context_levels(key, chunks).to(sigmas)
        clean = x.index_select(1, indices)
        noise = self._noise(key, "context", layout.contexts, layout, clean)
        x = x.index_copy(1, indices, noised(clean, noise, levels[..., None, None, None]))
        return x, sigmas.index_copy(1, indices, levels.expand(-1, -1, *sigmas.shape[2:]))

    def _context_levels(self, key: NoiseKey, chunks: list[int]) -> Tensor:
        """Returns the noise levels of contexts, drawn evenly from [0, context_noise], [b contexts 1 1]."""
        return uniform(key, "context_sigma", Draws(chunks, [0] * len(chunks))) * self.context_noise

    def _dropped(self, conditions: Conditions, key: NoiseKey) -> Conditions:
        shares = [self.joint_dropout, self.text_dropout, self.action_dropout]
        if sum(shares) == 0:
            return conditions
        fate = pick(uniform_of_sample(key, "dropout"), [*shares, 1 - sum(shares)])
        text = fate <= 1 if self.joint_dropout + self.text_dropout > 0 else None
        actions = (fate == 0) | (fate == 2) if self.joint_dropout + self.action_dropout > 0 else None
        return dropped(conditions, text=text, actions=actions)

    def _loss(
        self, network: Network, training_pass: TrainingPass, conditions: Conditions, mask: Tensor | None
    ) -> LossOutput:
        layout = training_pass.layout
        conditions = of_chunks(conditions, [slot.chunk for slot in layout.slots])
        prediction, _ = network(training_pass.x, training_pass.sigma, conditions, layout)
        targets = torch.tensor(layout.targets, device=prediction.device)
        wanted = training_pass.velocity
        error = (prediction.index_select(1, targets).to(wanted.dtype) - wanted).square().mean(dim=(4, 5, 6))
        predicted = training_pass.predicted.expand(error.shape)
        if mask is not None:
            predicted = predicted & _of_targets(mask, layout)
        num_chunks = len({layout.slots[index].chunk for index in layout.targets})
        return _average(error, training_pass.weight, predicted, num_chunks)


def _of_targets(mask: Tensor, layout: ChunkLayout) -> Tensor:
    """Returns the mask [b v t] of the latents of the targets, [b targets v f]."""
    frames = layout.grid.frames
    starts = [layout.slots[index].chunk * frames for index in layout.targets]
    return torch.stack([mask[:, :, start : start + frames] for start in starts], dim=1)


def _average(error: Tensor, weight: Tensor, predicted: Tensor, num_chunks: int) -> LossOutput:
    """Returns the losses of errors [b targets v f]; samples and chunks without a predicted latent do not count."""

    def mean(values: Tensor, counted: Tensor) -> Tensor:
        """Returns the mean over samples (axis 0) of each sample's mean over its last axis."""
        counts = counted.sum(-1)
        per_sample = torch.where(counted, values, 0.0).sum(-1) / counts.clamp(min=1)
        return per_sample.sum(0) / (counts > 0).sum(0).clamp(min=1)

    weighted = error * weight
    by_chunk = [
        rearrange(value, "b (n r) v f -> b n (r v f)", n=num_chunks) for value in (weighted.detach(), predicted)
    ]
    return LossOutput(
        loss=mean(weighted.flatten(1), predicted.flatten(1)),
        per_chunk=mean(*by_chunk),
        logs={"mse": mean(error.detach().flatten(1), predicted.flatten(1))},
    )
