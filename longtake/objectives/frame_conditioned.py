"""Clips of which the first frames are given: text to world, image to world, video to world, in one model.

The clip is one target slot. Of each sample 0, 1 or 2 leading latents (0, 1 or 5 pixel frames) are given in every view:
they go in clean and at noise level 0, the network may be told which they are (`network.given_channel`), and they are
out of the loss. Views are left out at random, so that one model serves one to all of them, and may lose what they are
given. So it is done in Cosmos Predict 2 and Transfer 2.5; there a given latent counts as a loss of 0 in the mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.geometry import latent_frames
from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.flow_matching import NoiseLevels, pick
from longtake.objectives.slot_objective import SlotObjective, TrainingPass
from longtake.rollout.conditions import dropped
from longtake.rollout.denoise import Network
from longtake.rollout.noise import Draws, NoiseKey, uniform, uniform_of_sample
from longtake.rollout.plan import TrainedFor
from longtake.types import Conditions, LossOutput


class FrameConditioned(SlotObjective):
    """Velocity error of the latents that are not given.

    Args:
        noise_levels: how noise levels are drawn and weighed.
        clean_latents: shares of the samples with 0, 1, 2, ... given latents; they sum to 1.
        clean_noise: given latents get a noise level drawn evenly from [0, this], and the network is told it.
        views: fewest and most views of a sample; the others are absent. None: all are there.
        view_condition_dropout: up to so many views, never the first one, lose what they are given.
        control_dropout: share of samples without any control.
        control_region: share of samples in which control counts inside of a drawn box of space and time only, so that
            masks mean something to the network.
        text_dropout: see `SlotObjective`.
        action_dropout: see `SlotObjective`.
        joint_dropout: see `SlotObjective`.
    """

    rollouts: ClassVar[tuple[str, ...]] = ("sliding_window", "one_shot")

    def __init__(
        self,
        *,
        noise_levels: NoiseLevels,
        clean_latents: Sequence[float] = (0.5, 0.25, 0.25),
        clean_noise: float = 0.0,
        views: Sequence[int] | None = None,
        view_condition_dropout: int = 0,
        control_dropout: float = 0.0,
        control_region: float = 0.0,
        text_dropout: float = 0.0,
        action_dropout: float = 0.0,
        joint_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            noise_levels=noise_levels,
            first_chunk_clean={"none": 1.0},
            text_dropout=text_dropout,
            action_dropout=action_dropout,
            joint_dropout=joint_dropout,
        )
        shares = list(clean_latents)
        if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(
                f"objective.clean_latents is {shares}; expected shares of samples with 0, 1, 2, ... given latents that "
                "sum to 1. Change `objective.clean_latents`."
            )
        if views is not None and not (len(views) == 2 and 1 <= views[0] <= views[1]):
            raise ConfigError(
                f"objective.views is {list(views)}; expected the fewest and the most views of a sample, for example "
                "[1, 7], or null. Change `objective.views`."
            )
        for name, value, most in (
            ("clean_noise", clean_noise, 0.999),
            ("control_dropout", control_dropout, 1),
            ("control_region", control_region, 1),
            ("view_condition_dropout", view_condition_dropout, math.inf),
        ):
            if not 0 <= value <= most:
                raise ConfigError(
                    f"objective.{name} is {value}; expected 0 {'or more' if most > 1 else f'to {most}'}. Change "
                    f"`objective.{name}`."
                )
        self.clean_latents, self.clean_noise = shares, clean_noise
        self.views = None if views is None else (views[0], views[1])
        self.view_condition_dropout, self.control_dropout = view_condition_dropout, control_dropout
        self.control_region = control_region

    def trained_for(self, *, num_frames_px: int, ratio: int) -> TrainedFor:
        frames = latent_frames(num_frames_px, ratio, "video.num_frames")
        starts = tuple(count for count, share in enumerate(self.clean_latents) if share > 0)
        if starts[-1] >= frames:
            raise ConfigError(
                f"objective.clean_latents gives up to {starts[-1]} latents of clips that have {frames}, so that "
                "nothing is left to predict. Change `objective.clean_latents` or `video.num_frames`."
            )
        return TrainedFor(rollouts=self.rollouts, chunk_lat=frames, starts_lat=starts, ratio=ratio)

    def chunk_frames(self, num_frames_lat: int) -> int:
        return num_frames_lat

    def chunks_used(self, num_frames_lat: int) -> int:
        return 1

    def layout(self, num_chunks: int, grid: Grid) -> ChunkLayout:
        assert num_chunks == 1, f"a frame-conditioned clip is one slot, got {num_chunks} chunks"
        return ChunkLayout.one_shot(grid)

    def __call__(
        self,
        network: Network,
        latents: Tensor,
        conditions: Conditions,
        key: NoiseKey,
        *,
        mask: Tensor | None = None,
    ) -> LossOutput:
        """As `SlotObjective`; what is given, and which views and controls are left out, is drawn for each sample."""
        training_pass = self.prepare(network, latents, key)
        given = ~training_pass.predicted.expand(-1, -1, *latents.shape[1:3])
        conditions = dataclasses.replace(self._dropped(conditions, key), given=given)
        if self.views is not None:
            there = self.views_of(key, latents.shape[1], conditions.view_mask).to(latents.device)
            conditions = dataclasses.replace(conditions, view_mask=there)
            mask = there[:, :, None].expand(-1, -1, latents.shape[2]) if mask is None else mask & there[:, :, None]
            training_pass, conditions, mask = _without_absent(training_pass, conditions, mask, there)
        return self._loss(network, training_pass, conditions, mask)

    def views_of(self, key: NoiseKey, views: int, mask: Tensor | None = None) -> Tensor:
        """Returns which views of each sample are there, bool [b v]: an evenly drawn number of evenly drawn ones.

        Args:
            key: names the draws.
            views: number of views of the clips.
            mask: views that there are at all, bool [b v]; None: all.
        """
        if self.views is None:
            return torch.ones(len(key), views, dtype=torch.bool) if mask is None else mask
        fewest, most = (min(count, views) for count in self.views)
        count = fewest + (uniform_of_sample(key, "view_count") * (most - fewest + 1)).long()
        draws = uniform(key, "views", Draws([0], [0], views))[:, 0, :, 0]
        there = torch.ones_like(draws, dtype=torch.bool) if mask is None else mask.cpu()
        return (_ranks(torch.where(there, draws, 2.0)) < count[:, None]) & there

    def _given(self, key: NoiseKey, layout: ChunkLayout, frames: int) -> Tensor:
        count = pick(uniform_of_sample(key, "start"), self.clean_latents)
        given = torch.arange(frames) < count[:, None, None, None]
        if self.view_condition_dropout == 0:
            return given
        views = layout.grid.views
        lost = (uniform_of_sample(key, "views_not_given") * (self.view_condition_dropout + 1)).long()
        draws = uniform(key, "view_not_given", Draws([0], [0], views))[:, 0, :, 0]
        draws[:, 0] = 2.0  # the first view keeps what it is given
        loses = _ranks(draws) < lost.clamp(max=views - 1)[:, None]
        return given & ~loses[:, None, :, None]

    def _given_levels(self, key: NoiseKey) -> Tensor | float:
        if self.clean_noise == 0:
            return 0.0
        return (uniform_of_sample(key, "clean_noise") * self.clean_noise)[:, None, None, None]

    def _dropped(self, conditions: Conditions, key: NoiseKey) -> Conditions:
        conditions = super()._dropped(conditions, key)
        if self.control_region > 0 and conditions.control:
            conditions = self._in_regions(conditions, key)
        if self.control_dropout == 0:
            return conditions
        return dropped(conditions, control=uniform_of_sample(key, "control") < self.control_dropout)

    def _in_regions(self, conditions: Conditions, key: NoiseKey) -> Conditions:
        """Returns the conditions with control weighted 0 outside of a box in some samples, the same in all views."""
        whole = uniform_of_sample(key, "control_region") >= self.control_region
        ends = uniform(key, "control_box", Draws([0], [0]), (3, 2))[:, 0, 0, 0].sort(dim=-1).values  # [b 3 2]
        found = {}
        for kind, latents in (conditions.control or {}).items():
            inside = torch.ones(len(key), 1, 1, 1, dtype=torch.bool)  # [b f h w]
            for axis, size in enumerate((latents.shape[3], *latents.shape[5:])):
                middle = (torch.arange(size) + 0.5) / size
                within = (middle >= ends[:, axis, :1]) & (middle < ends[:, axis, 1:])
                inside = inside & within.view(-1, *[size if other == axis else 1 for other in range(3)])
            place = (inside | whole.view(-1, 1, 1, 1)).to(latents.device, latents.dtype)[:, None, None]
            given = (conditions.control_weight or {}).get(kind)
            found[kind] = place if given is None else place * given
        return dataclasses.replace(conditions, control_weight=found)


def _without_absent(
    training_pass: TrainingPass, conditions: Conditions, mask: Tensor, there: Tensor
) -> tuple[TrainingPass, Conditions, Tensor]:
    """Returns a pass, its conditions and the mask [b v t] with as many views as the sample with most of them has.

    Nothing sees an absent view, and it is out of the loss: so it need not be computed. A sample with fewer views keeps
    some absent ones to fill its row.
    """
    views = there.shape[1]
    kept = max(int(there.sum(dim=1).max()), 2)  # of one view alone, attention between views would get no gradient
    if kept >= views:
        return training_pass, conditions, mask
    rows = (~there).byte().argsort(dim=1, stable=True)[:, :kept]  # [b kept]: those that are there, in their order

    def of(tensor: Tensor, axis: int) -> Tensor:
        """Picks the views, on `axis`; a tensor that is equal for all views has size 1 there."""
        if tensor.shape[axis] == 1:
            return tensor
        shape = [len(rows), *[1] * (tensor.ndim - 1)]
        shape[axis] = kept
        index = rows.to(tensor.device).view(shape)
        return tensor.take_along_dim(index, dim=axis)

    def all_of(group: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        return None if group is None else {kind: of(tensor, 2) for kind, tensor in group.items()}

    def maybe(tensor: Tensor | None, axis: int) -> Tensor | None:
        return None if tensor is None else of(tensor, axis)

    layout = ChunkLayout.one_shot(dataclasses.replace(training_pass.layout.grid, views=kept))
    fewer = dataclasses.replace(
        training_pass,
        layout=layout,
        **{name: of(getattr(training_pass, name), 2) for name in ("x", "sigma", "velocity", "predicted")},
    )
    told = dataclasses.replace(
        conditions,
        view_ids=maybe(conditions.view_ids, 1),
        view_mask=maybe(conditions.view_mask, 1),
        text_index=maybe(conditions.text_index, 2),
        control=all_of(conditions.control),
        control_weight=all_of(conditions.control_weight),
        given=maybe(conditions.given, 2),
    )
    return fewer, told, of(mask, 1)


def _ranks(draws: Tensor) -> Tensor:
    """Returns the rank of every draw among those of its sample, [b v]."""
    return draws.argsort(dim=1).argsort(dim=1)
