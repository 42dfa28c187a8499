"""AR diffusion, chunk by chunk: clips -> latents and conditions -> objective, and rollouts for validation."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.base import BaseModule, built, read_weights
from longtake.errors import ConfigError
from longtake.geometry import covering_latent_frames, latent_frames, pixel_frames
from longtake.loading import network_tensors
from longtake.model_spec import VIDEO_KEYS, ModelSpec, without_folders
from longtake.objectives.slot_objective import SlotObjective
from longtake.provenance import commit
from longtake.rollout.conditions import clip_conditions
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan, check_rollout, plan_rollout
from longtake.streaming import VideoChunk, decoded, to_uint8
from longtake.types import Clip, Conditions
from longtake.work import Work, matmul_dtype

logger = logging.getLogger("longtake")
Node = Mapping[str, Any]


class ARDiffusion(BaseModule):
    """Trains a network that predicts velocities, and rolls it out.

    The encoders are frozen and stand outside of the module: they are in no checkpoint and in no average.

    Args:
        network: config node of the network; it is built in `configure_model`.
        objective: node of what is trained.
        solver: node of what denoises a chunk in rollouts.
        rollout: node of how chunks follow each other.
        encoder: nodes of the frozen encoders, {"video": ..., "text": ... or None}.
        video: geometry of the clips: fps, height, width, num_frames, chunk_lat.
        seed: of the weights and of every draw.
        action_dim: columns of actions that the data must have; None: actions are ignored.
        num_context_frames: pixel frames that rollouts are given by default; None: one chunk.
        val_sigmas: noise levels at which validation measures the error.
        attn_only: train the attention parts (self_attn) only.
        new_lr_scale: factor on the learning rate of what a pretrained network does not have (LaCT's own parameters).
        **kwargs: optimiser and schedule, as for `BaseModule`.

    Attributes:
        trained_for: what rollouts these weights are for.
        wants_ema: set by the EMA callback before `configure_model`.
        ema_updates: updates of the average so far.
    """

    def __init__(
        self,
        *,
        network: Node,
        objective: Node,
        solver: Node,
        rollout: Node,
        encoder: Mapping[str, Node | None],
        video: Node,
        seed: int,
        action_dim: int | None = None,
        num_context_frames: int | None = None,
        val_sigmas: Sequence[float] = (0.25, 0.5, 0.75),
        attn_only: bool = False,
        new_lr_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._nodes = {"network": network, "encoder": encoder, "rollout": rollout, "solver": solver}
        self.objective: SlotObjective = built(objective)  # type: ignore[assignment]
        self.solver: Any = built(solver)
        self.rollout: Any = built(rollout)
        self.video, self.seed, self.action_dim = dict(video), seed, action_dim
        self.num_context_frames = num_context_frames
        self.val_sigmas = tuple(val_sigmas)
        self.attn_only, self.new_lr_scale = attn_only, new_lr_scale
        self.network: nn.Module | None = None
        self.ema_network: nn.Module | None = None
        self.wants_ema, self.ema_updates = False, 0
        self._data: dict[str, Any] = {}
        self._frozen: dict[str, Any] = {}  # a plain dict: Lightning and torch do not look inside
        self._val_objective = copy.deepcopy(self.objective)  # schedules change the other one
        self.trained_for = self.objective.trained_for(num_frames_px=self.video["num_frames"], ratio=self.ratio)
        check_rollout(self.rollout.kind, self.trained_for)
        self.solver.begin(self.rollout.num_steps)  # a wrong number of steps is found before anything is trained
        self.plan(self.default_context_px + 1)  # and so is a start that these weights are not trained for
        self._frames_lat = latent_frames(self.video["num_frames"], self.ratio, "video.num_frames")
        count = self._val_objective.chunks_used(self._frames_lat)
        names = ["loss", *(f"loss@chunk{index:02d}" for index in range(count))]
        # a NaN shall show; torchmetrics' "disable" would let it, but forgets the weights
        self.val_losses = nn.ModuleDict({name: MeanMetric(nan_strategy=float("nan")) for name in names})

    # Building

    def setup(self, stage: str) -> None:
        """Notes what the data is like; Lightning has set up the datamodule before."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "description"):
            self._data = data.description()
        else:
            self._data = {"action_names": [f"action_{column}" for column in range(self.action_dim or 0)]}
        text = self._data.pop("text", None)
        if text and self._nodes["encoder"].get("text"):  # the encoder that made the cached texts, with its vocabulary
            self._nodes["encoder"] = {**self._nodes["encoder"], "text": text}
            self._frozen.pop("text", None)
        config, run = self.run_config.get("data", {}), self.run_config.get("run", {})
        self._data["name"] = config.get("pixels") or run.get("data")
        if not self.action_dim:
            self._data["action_names"] = self._data["action_typical"] = []

    def configure_model(self) -> None:
        """Builds what is missing: the network, and its average where one is wanted."""
        if self.network is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)  # the weights depend on the seed and on nothing that was drawn before
                self.network = built(self._nodes["network"])  # type: ignore[assignment]
            assert isinstance(self.network, nn.Module), f"{type(self.network)} is no network"
            if self.attn_only:
                for name, parameter in self.network.named_parameters():
                    parameter.requires_grad_(".self_attn." in name)
        if self.wants_ema and self.ema_network is None:
            self.ema_network = copy.deepcopy(self.network).requires_grad_(False)

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns up to four groups: with and without decay (vectors and scalars have none), pretrained and new."""
        assert self.network is not None, "configure_model comes first"
        new = self.network.new_parameter_names() if self.new_lr_scale != 1 else set()  # type: ignore[operator]
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in new, parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": params,
                **({"lr_scale": self.new_lr_scale} if is_new else {}),
                **({} if decays else {"weight_decay": 0.0}),
            }
            for (is_new, decays), params in groups.items()
        ]

    @property
    def eval_network(self) -> nn.Module:
        """The network of validation, rollouts and export: the average once it was updated."""
        network = self.ema_network if self.ema_network is not None and self.ema_updates > 0 else self.network
        assert network is not None, "configure_model comes first"
        return network

    @property
    def video_encoder(self) -> Any:
        """The frozen encoder of pixels, loaded at first use."""
        return self._encoder("video")

    @property
    def text_encoder(self) -> Any:
        """The frozen encoder of captions, or None."""
        return self._encoder("text") if self._nodes["encoder"].get("text") else None

    @property
    def ratio(self) -> int:
        """Pixel frames a latent frame."""
        return self.video_encoder.geometry.ratio_time

    def _encoder(self, name: str) -> Any:
        if name not in self._frozen:
            self._frozen[name] = built(self._nodes["encoder"][name])
        encoder = self._frozen[name]
        return encoder.to(self.device) if hasattr(encoder, "to") else encoder

    def data_requirements(self) -> dict[str, int | None]:
        return {"action_dim": self.action_dim, "latent_channels": None}

    # Steps

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        key = NoiseKey.of_positions(self.seed, _position(batch))
        latents, conditions = self.encoded(batch)
        out = self.objective(self.network, latents, conditions, key, mask=self._latent_mask(batch))  # type: ignore[arg-type]
        self.log("train/loss", out.loss, batch_size=len(batch), sync_dist=True)
        for name, value in out.logs.items():
            self.log(f"train/{name}", value, batch_size=len(batch), sync_dist=True)
        return out.loss

    def validation_step(self, batch: Clip, batch_idx: int) -> None:
        """Measures the error at fixed noise levels; the noise depends on the sample's name only."""
        key = NoiseKey(self.seed, tuple(batch.key))
        latents, conditions = self.encoded(batch)
        mask = self._latent_mask(batch)
        weight = len(batch) if batch.frame_mask is None else int(batch.frame_mask.any(1).sum())
        metrics = cast(Mapping[str, MeanMetric], self.val_losses)
        for sigma in self.val_sigmas:
            out = self._val_objective.evaluate(self.eval_network, latents, conditions, key, sigma, mask=mask)  # type: ignore[arg-type]
            values = {"loss": out.loss} | {f"loss@chunk{i:02d}": value for i, value in enumerate(out.per_chunk)}
            for name, value in values.items():
                metrics[name].update(value, weight=weight)
        for name, metric in metrics.items():
            self.log(f"val/{name}", metric, on_epoch=True, batch_size=len(batch))

    def encoded(self, batch: Clip) -> tuple[Tensor, Conditions]:
        """Returns latents [b v t c h w] and the conditions of the chunks of a batch."""
        latents = self.latents_of(batch)
        num_lat = latents.shape[2]
        conditions = clip_conditions(
            self._with_text(batch),
            chunk_lat=self._val_objective.chunk_frames(num_lat),
            num_chunks=self._val_objective.chunks_used(num_lat),
            ratio=self.ratio,
        )
        if not self.action_dim or conditions.actions is None:
            return latents, dataclasses.replace(conditions, actions=None)
        # a mask also where nothing is dropped: then every parameter has a gradient in every step, as DDP wants it
        told = torch.ones(conditions.actions.shape[:3], dtype=torch.bool, device=conditions.actions.device)
        return latents, dataclasses.replace(conditions, actions_mask=told)

    @torch.no_grad()
    def latents_of(self, batch: Clip) -> Tensor:
        """Returns the latents of a batch: cached ones, or those of its pixels."""
        if batch.latents is not None:
            return batch.latents
        assert batch.video is not None, "a batch holds latents or pixels"
        return self.video_encoder.encode(batch.video.float() / 127.5 - 1)

    def _with_text(self, batch: Clip) -> Clip:
        """Returns the batch with encoded texts, where the network takes any: cached ones, or those of its captions."""
        if self.text_encoder is None:
            return dataclasses.replace(batch, text_ids=None, text_emb=None, text_mask=None)
        if batch.text_ids is not None or batch.text_emb is not None:
            return batch
        fields = self.text_encoder(batch.captions or [""] * len(batch))
        return dataclasses.replace(batch, **{name: value.to(self.device) for name, value in fields.items()})

    def work(self, batch: Clip) -> Work:
        """Returns the work of a training step on one rank: forward, and twice as much backward, without encoders."""
        objective, geometry = self.objective, self.video_encoder.geometry
        size = geometry.grid(self.video["height"], self.video["width"])
        clips = batch.latents if batch.latents is not None else batch.video
        assert clips is not None, "a batch holds latents or pixels"
        assert self.network is not None, "configure_model comes first"
        shape = (clips.shape[1], objective.chunk_frames(self._frames_lat), geometry.channels, *size)
        layout = objective.layout(objective.chunks_used(self._frames_lat), self.network.grid(shape))  # type: ignore[operator]
        texts = batch.text_ids if batch.text_ids is not None else batch.text_emb
        flops = self.network.num_flops(layout, len(batch), 0 if texts is None else texts.shape[2])  # type: ignore[operator]
        return Work(len(batch) * len(layout.slots) * layout.grid.tokens, 3.0 * flops)

    def _latent_mask(self, batch: Clip) -> Tensor | None:
        """Returns which latents are real, bool [b v t]: those whose pixel frames all are."""
        if batch.frame_mask is None and batch.view_mask is None:
            return None
        frames = batch.frame_mask
        if frames is None:
            return batch.view_mask[:, :, None].expand(-1, -1, self._frames_lat)  # type: ignore[index]
        grouped = frames[:, 1:].unflatten(1, (-1, self.ratio)).all(2)
        real = torch.cat([frames[:, :1], grouped], dim=1)[:, None]
        if batch.view_mask is not None:
            return real & batch.view_mask[:, :, None]
        views = (batch.latents if batch.latents is not None else batch.video).shape[1]  # type: ignore[union-attr]
        return real.expand(-1, views, -1)

    # Rollouts

    def plan(self, num_frames_px: int, context_px: int | None = None) -> RolloutPlan:
        """Returns the plan of a rollout; without `context_px` of one that starts as rollouts do by default."""
        if context_px is None:
            context_px = self.default_context_px
        return plan_rollout(
            self.rollout.kind, num_frames_px=num_frames_px, context_px=context_px, trained=self.trained_for
        )

    @property
    def default_context_px(self) -> int:
        """Pixel frames that rollouts are given by default: as set, else one chunk, or nothing for one-shot weights."""
        if self.num_context_frames is not None:
            return self.num_context_frames
        return pixel_frames(self.trained_for.chunk_lat, self.ratio) if self.rollout.kind == "memory" else 0

    @torch.no_grad()
    def rollout_frames(self, batch: Clip, plan: RolloutPlan, seed: int | None = None) -> Iterator[VideoChunk]:
        """Yields the frames of rollouts that start as the clips of a batch do, chunk by chunk.

        Args:
            batch: clips whose first frames are given, and whose actions and texts are told.
            plan: from `plan`.
            seed: of the noise; None: the run's.
        """
        batch = batch.to(self.device)
        conditions = clip_conditions(
            self._with_text(batch),
            chunk_lat=plan.trained.chunk_lat,
            num_chunks=plan.num_chunks,
            ratio=self.ratio,
            num_frames_px=plan.num_frames_px,
        )
        if not self.action_dim:
            conditions = dataclasses.replace(conditions, actions=None)
        chunks = self.rollout(
            self.eval_network,
            self.latents_of(batch)[:, :, : plan.start_lat],
            conditions,
            plan,
            self.solver,
            NoiseKey(self.seed if seed is None else seed, tuple(batch.key)),
        )
        yield from decoded(chunks, self.video_encoder, plan)

    @torch.no_grad()
    def truth_frames(self, batch: Clip, plan: RolloutPlan) -> np.ndarray:
        """Returns the true frames of a rollout, uint8 [b v t h w c]: pixels, or what cached latents decode to."""
        if batch.video is not None:
            return to_uint8(batch.video[:, :, : plan.num_frames_px].float() / 127.5 - 1)
        assert batch.latents is not None, "a batch holds latents or pixels"
        count = covering_latent_frames(plan.num_frames_px, self.ratio)
        video = self.video_encoder.decode(batch.latents[:, :, :count].to(self.device).float())
        return to_uint8(video[:, :, : plan.num_frames_px])

    # Files

    def spec(self) -> ModelSpec:
        """Returns what an exported file says of itself. Needs `setup` of the datamodule for the names of actions."""
        nodes = self._nodes
        return ModelSpec(
            video={name: self.video[name] for name in VIDEO_KEYS},
            network=dict(nodes["network"]),
            encoder=without_folders(nodes["encoder"]),
            rollout=dict(nodes["rollout"]),
            solver=dict(nodes["solver"]),
            trained_for=self.trained_for,
            encoder_fingerprint=self.video_encoder.fingerprint,
            num_context_frames=self.default_context_px,
            data=self._data,
            precision=str(matmul_dtype(str(self.trainer.precision))).removeprefix("torch."),
            seed=self.seed,
            step=self.global_step,
            is_average=self.eval_network is self.ema_network,
            commit=commit(),
        )

    def export_tensors(self) -> dict[str, Tensor]:
        """Returns the weights that an exported file holds: those of `eval_network`."""
        return {name: tensor.detach() for name, tensor in self.eval_network.state_dict().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ema_updates"] = self.ema_updates
        checkpoint["spec"] = self.spec().to_dict()  # so that a checkpoint can be rolled out as it is

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ema_updates = checkpoint["ema_updates"]

    def initialise_from(self, path: str | Path) -> None:
        """Takes the network's weights from an exported file, a checkpoint, or released weights of Wan or LaCT.

        Raises:
            ConfigError: the file cannot be read, or its weights do not fit; what differs is named.
        """
        self.configure_model()
        assert self.network is not None
        given, own = network_tensors(read_weights(Path(path))), self.network.state_dict()
        if given.keys() & own.keys() != own.keys() and "patch_embedding.weight" in given:
            from longtake.pretrained.wan import load_pretrained

            kept = load_pretrained(self.network, given)  # type: ignore[arg-type]
            logger.info("%s: %d tensors keep their initial values (not in the file)", path, len(kept))
            return
        wrong = [name for name in sorted(own.keys() | given.keys()) if _shape(own, name) != _shape(given, name)]
        if wrong:
            name = wrong[0]
            raise ConfigError(
                f"{path} does not fit this network in {len(wrong)} tensors: it holds {_shape(given, name)} for "
                f"{name!r}, the network has {_shape(own, name)}. Change `init_from` or `network`."
            )
        self.network.load_state_dict(given)


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "nothing"


def _position(batch: Clip) -> Tensor:
    assert batch.position is not None, "a training batch knows its plan positions"
    return batch.position
