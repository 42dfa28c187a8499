"""AR diffusion, chunk by chunk: clips -> latents and conditions -> objective, and rollouts for validation."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.base import built
from lightning_modules.generative import GenerativeModule, Node, position_of
from longtake.errors import ConfigError
from longtake.geometry import covering_latent_frames, pixel_frames
from longtake.model_spec import DiffusionSpec
from longtake.objectives.context_target import ContextTarget
from longtake.objectives.slot_objective import SlotObjective
from longtake.rollout.conditions import clip_conditions
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import check_rollout
from longtake.rollout.sliding_plan import AnyPlan, SlidingPlan
from longtake.streaming import VideoChunk, decoded, to_uint8, to_unit_range
from longtake.types import Clip, Conditions
from longtake.work import Work

logger = logging.getLogger("longtake")


class ARDiffusion(GenerativeModule):
    """Trains a network that predicts velocities, and rolls it out.

    Args:
        objective: config node of what is trained.
        solver: node of what denoises a chunk in rollouts.
        num_context_frames: pixel frames that rollouts are given by default; None: one chunk.
        val_sigmas: noise levels at which validation measures the error.
        attn_only: train the attention parts (self_attn) only.
        **kwargs: as for `GenerativeModule`; `video` also has chunk_lat.
    """

    def __init__(
        self,
        *,
        objective: Node,
        solver: Node,
        action_dim: int | None = None,
        num_context_frames: int | None = None,
        val_sigmas: Sequence[float] = (0.25, 0.5, 0.75),
        attn_only: bool = False,
        new_lr_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            action_dim=action_dim, num_context_frames=num_context_frames, new_lr_scale=new_lr_scale, **kwargs
        )
        self._solver_node = solver
        self.objective: SlotObjective = built(objective)  # type: ignore[assignment]
        self.solver: Any = built(solver)
        self.val_sigmas, self.attn_only = tuple(val_sigmas), attn_only
        self._val_objective = copy.deepcopy(self.objective)  # schedules change the other one
        self.trained_for = self.objective.trained_for(num_frames_px=self.video["num_frames"], ratio=self.ratio)
        check_rollout(self.rollout.kind, self.trained_for)
        self.solver.begin(self.rollout.num_steps)  # a wrong number of steps is found before anything is trained
        self.plan(self.default_context_px + 1)  # and so is a start that these weights are not trained for
        self._frames_lat = self.objective.frames_lat(self.video["num_frames"], self.ratio)
        count = self._val_objective.chunks_used(self._frames_lat)
        names = ["loss", *(f"loss@chunk{index:02d}" for index in range(count))]
        # a NaN shall show; torchmetrics' "disable" would let it, but forgets the weights
        self.val_losses = nn.ModuleDict({name: MeanMetric(nan_strategy=float("nan")) for name in names})

    def configure_model(self) -> None:
        super().configure_model()
        if self.attn_only:
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(".self_attn." in name)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        views = getattr(self.network, "views", None)
        names = tuple(self._data.get("view_names", ()))
        if views is not None and names and names != views.names:
            raise ConfigError(
                f"the data has the views {', '.join(names)}, the network those of a rig with {', '.join(views.names)}; "
                "expected the same in the same order. Change `network/views` (its rig) or `data`."
            )

    def data_requirements(self) -> dict[str, int | None]:
        return {"action_dim": self.action_dim, "latent_channels": None}

    # Steps

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        key = NoiseKey.of_positions(self.seed, position_of(batch))
        latents, conditions = self.encoded(batch)
        mask = self.latent_mask(batch, latents.shape[2])
        if isinstance(self.objective, ContextTarget):
            out = self.objective(
                self.network, latents, conditions, key, mask=mask, context_transform=self.through_8_bit
            )
        else:
            out = self.objective(self.network, latents, conditions, key, mask=mask)
        self.log("train/loss", out.loss, batch_size=len(batch), sync_dist=True)
        for name, value in out.logs.items():
            self.log(f"train/{name}", value, batch_size=len(batch), sync_dist=True)
        return out.loss

    def validation_step(self, batch: Clip, batch_idx: int) -> None:
        """Measures the error at fixed noise levels; the noise depends on the sample's name only."""
        key = NoiseKey(self.seed, tuple(batch.key))
        latents, conditions = self.encoded(batch)
        mask = self.latent_mask(batch, latents.shape[2])
        weight = len(batch) if batch.frame_mask is None else int(batch.frame_mask.any(1).sum())
        metrics = cast(Mapping[str, MeanMetric], self.val_losses)
        for sigma in self.val_sigmas:
            out = self._val_objective.evaluate(self.eval_network, latents, conditions, key, sigma, mask=mask)
            values = {"loss": out.loss} | {f"loss@chunk{i:02d}": value for i, value in enumerate(out.per_chunk)}
            for name, value in values.items():
                metrics[name].update(value, weight=weight)
        for name, metric in metrics.items():
            if metric.update_called:  # validation clips may be shorter than those of training
                self.log(f"val/{name}", metric, on_epoch=True, batch_size=len(batch))

    def encoded(self, batch: Clip) -> tuple[Tensor, Conditions]:
        """Returns latents [b v t c h w] and the conditions of the chunks of a batch."""
        latents = self.codes_of(batch)
        num_lat = latents.shape[2]
        conditions = clip_conditions(
            self.with_control(self.with_text(batch)),
            chunk_lat=self._val_objective.chunk_frames(num_lat),
            num_chunks=self._val_objective.chunks_used(num_lat),
            ratio=self.ratio,
            own_starts=self.trained_for.own_starts,
        )
        if not self.action_dim or conditions.actions is None:
            return latents, dataclasses.replace(conditions, actions=None)
        # a mask also where nothing is dropped: then every parameter has a gradient in every step, as DDP wants it
        told = torch.ones(conditions.actions.shape[:3], dtype=torch.bool, device=conditions.actions.device)
        return latents, dataclasses.replace(conditions, actions_mask=told)

    @torch.no_grad()
    def codes_of(self, batch: Clip) -> Tensor:
        if batch.latents is not None:
            return batch.latents
        assert batch.video is not None, "a batch holds latents or pixels"
        return self.video_encoder.encode_blocks(batch.video.float() / 127.5 - 1, self.trained_for.block_lat)

    @torch.no_grad()
    def through_8_bit(self, latents: Tensor) -> Tensor:
        """Returns latents [b v t c h w] of a causal start as they are after their frames were in a file."""
        return self.video_encoder.encode(to_unit_range(to_uint8(self.video_encoder.decode(latents)), latents.device))

    @torch.no_grad()
    def with_control(self, batch: Clip) -> Clip:
        """Returns the batch with control videos as latents: cached ones, or encoded; without, for a plain network."""
        if batch.control is None or getattr(self.network, "control", None) is None:
            return dataclasses.replace(batch, control=None, control_mask=None)
        if batch.latents is not None:
            return batch
        control = {kind: self.video_encoder.encode(own.float() / 127.5 - 1) for kind, own in batch.control.items()}
        return dataclasses.replace(batch, control=control)

    def work(self, batch: Clip) -> Work:
        """Returns the work of a training step on one rank, without encoders.

        The training pass counts three times, forward and backward; passes without gradient, such as those that draw
        own contexts, count once. Tokens are those of the training pass.
        """
        objective, geometry = self.objective, self.video_encoder.geometry
        size = geometry.grid(self.video["height"], self.video["width"])
        clips = batch.latents if batch.latents is not None else batch.video
        assert clips is not None, "a batch holds latents or pixels"
        assert self.network is not None, "configure_model comes first"
        shape = (clips.shape[1], objective.chunk_frames(self._frames_lat), geometry.channels, *size)
        chunks, grid = objective.chunks_used(self._frames_lat), self.network.grid(shape)
        layout = objective.layout(chunks, grid)
        passes = [layout] * 3 + objective.passes_without_gradient(chunks, grid)
        texts = batch.text_ids if batch.text_ids is not None else batch.text_emb
        num_texts = 0 if texts is None else texts.shape[2]
        flops = sum(self.network.num_flops(each, len(batch), num_texts) for each in passes)
        return Work(len(batch) * len(layout.slots) * layout.grid.tokens, float(flops))

    # Rollouts

    @property
    def default_context_px(self) -> int:
        """As set, else one chunk, or nothing for one-shot weights."""
        if self.num_context_frames is not None:
            return self.num_context_frames
        return pixel_frames(self.trained_for.chunk_lat, self.ratio) if self.rollout.kind == "memory" else 0

    @torch.no_grad()
    def rollout_frames(self, batch: Clip, plan: AnyPlan, seed: int | None = None) -> Iterator[VideoChunk]:
        batch = batch.to(self.device)
        conditions = clip_conditions(
            self.with_control(self.with_text(batch)),
            chunk_lat=plan.trained.chunk_lat,
            num_chunks=plan.num_chunks,
            ratio=self.ratio,
            num_frames_px=plan.num_frames_px,
            own_starts=plan.trained.own_starts,
        )
        if not self.action_dim:
            conditions = dataclasses.replace(conditions, actions=None)
        if isinstance(plan, SlidingPlan):
            yield from self._window_frames(batch, plan, conditions, seed)
            return
        chunks = self.rollout(
            self.eval_network,
            self.codes_of(batch)[:, :, : plan.start_lat],
            conditions,
            plan,
            self.solver,
            self.noise_key(batch, seed),
        )
        yield from decoded(chunks, self.video_encoder, plan)

    def _window_frames(
        self, batch: Clip, plan: SlidingPlan, conditions: Conditions, seed: int | None
    ) -> Iterator[VideoChunk]:
        """Yields the frames of a rollout of one window: clips are no longer, and each window counts its own frames."""
        assert plan.num_chunks == 1, f"rollouts while training are one window long, this one has {plan.num_chunks}"
        start = self._start_frames(batch, plan.start_needed_px)
        chunks = self.rollout(
            self.eval_network,
            start,
            conditions,
            plan,
            self.solver,
            self.noise_key(batch, seed),
            codec=self.video_encoder,
        )
        for chunk in chunks:
            yield VideoChunk(chunk.index, chunk.start, to_uint8(chunk.frames), chunk.num_given)

    def _start_frames(self, batch: Clip, count: int) -> Tensor:
        """Returns the first frames of clips in [-1, 1], [b v t c h w]: pixels, or what cached codes decode to."""
        if batch.video is not None:
            return batch.video[:, :, :count].float() / 127.5 - 1
        latents = self.codes_of(batch)[:, :, : max(1, covering_latent_frames(count, self.ratio))]
        return self.video_encoder.decode(latents.to(self.device))[:, :, :count]

    # Files

    def spec(self) -> DiffusionSpec:
        video = {name: self.video[name] for name in DiffusionSpec.video_keys}
        return DiffusionSpec(video=video, solver=dict(self._solver_node), **self.spec_fields())

    def load_released(self, given: dict[str, Tensor], path: Path) -> bool:
        """Takes released weights of Wan or LaCT, which keep q, k and v apart."""
        if "patch_embedding.weight" not in given or "blocks.0.self_attn.qkv.weight" in given:
            return False
        from longtake.pretrained.wan import load_pretrained

        kept = load_pretrained(self.network, given)
        logger.info("%s: %d tensors keep their initial values (not in the file)", path, len(kept))
        return True
