"""Autoregression over discrete tokens: clips -> tokens and conditions -> objective, and rollouts for validation."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.base import built
from lightning_modules.generative import GenerativeModule, Node, position_of
from longtake.errors import ConfigError
from longtake.geometry import latent_frames, pixel_frames
from longtake.model_spec import TokenSpec
from longtake.networks.token_transformer import token_layout
from longtake.objectives.next_token import NextToken, predicted_hidden
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan, TrainedFor, check_rollout
from longtake.streaming import VideoChunk
from longtake.token_stream import token_chunks, token_conditions, tokens_of_pixels
from longtake.types import Clip, Conditions
from longtake.work import Work

logger = logging.getLogger("longtake")


class ARTokens(GenerativeModule):
    """Trains a network that predicts tokens, and rolls it out.

    Args:
        objective: config node of what is trained.
        num_context_frames: pixel frames that validation and rollouts are given; None: as the objective is given.
        ratio_time: pixel frames a latent frame, for tokens whose video tokenizer is not there (encoder/video=none).
        **kwargs: as for `GenerativeModule`.

    Raises:
        ConfigError: tokenizer, geometry, network and objective do not fit each other.
    """

    def __init__(
        self,
        *,
        objective: Node,
        action_dim: int | None = None,
        num_context_frames: int | None = None,
        ratio_time: int = 8,
        new_lr_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            action_dim=action_dim, num_context_frames=num_context_frames, new_lr_scale=new_lr_scale, **kwargs
        )
        self._ratio_time = ratio_time
        self.objective: NextToken = built(objective)  # type: ignore[assignment]
        self.grid_lat = self._checked_grid()
        self.objective.check_start(bool(self.network_node.get("bov", False)))
        self.trained_for = TrainedFor(
            rollouts=("tokens",),
            chunk_lat=1,
            starts_lat=tuple(range(self.objective.context_lat, self.grid_lat[0])),
            ratio=self.ratio,
        )
        check_rollout(self.rollout.kind, self.trained_for)
        plan = self.plan(self.default_context_px + 1)  # a start that these weights are not trained for is found here
        self.context_lat = plan.start_lat
        latents = [f"nll@latent{index:02d}" for index in range(self.context_lat, self.grid_lat[0])]
        # a NaN shall show; torchmetrics' "disable" would let it, but forgets the weights
        self.val_means = nn.ModuleDict(
            {name: MeanMetric(nan_strategy=float("nan")) for name in ("nll", "accuracy", *latents)}
        )

    def _checked_grid(self) -> tuple[int, int, int]:
        """Returns latent frames, rows and columns of a clip; network, tokenizer and video must agree on them."""
        frames, rows, columns = (int(size) for size in self.network_node["grid_lat"])
        grid = (frames, rows, columns)
        num_lat = latent_frames(self.video["num_frames"], self.ratio, "video.num_frames")
        wanted = (num_lat, rows, columns)
        if self.video_encoder is not None:
            geometry = self.video_encoder.geometry
            rows, columns = geometry.grid(self.video["height"], self.video["width"])
            wanted = (num_lat, rows, columns)
            if geometry.vocab_size != self.network_node["vocab_size"]:
                raise ConfigError(
                    f"the video tokenizer has {geometry.vocab_size} tokens, the network is built for "
                    f"{self.network_node['vocab_size']}; expected the same number. Change `network.vocab_size` or "
                    "`encoder/video`."
                )
        if grid != wanted:
            raise ConfigError(
                f"network.grid_lat is {list(grid)}; clips of {self.video['num_frames']} frames of "
                f"{self.video['width']}x{self.video['height']} have {list(wanted)} tokens (latent frames, rows, "
                "columns). Change `network.grid_lat` or `video`."
            )
        if not 0 <= self.objective.context_lat < num_lat:
            raise ConfigError(
                f"objective.context_lat is {self.objective.context_lat}, and a clip has {num_lat} latent frames; "
                "expected fewer, so that one is predicted. Change `objective.context_lat` or `video.num_frames`."
            )
        return wanted

    def setup(self, stage: str) -> None:
        """Notes what the data is like, and fits the tokenizer of actions on its training split where there is none."""
        super().setup(stage)
        encoder = self.encoder("actions")
        if encoder is None or encoder.tokenizer is not None:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        fitted = encoder.fitted(data.training_actions())
        logger.info("FAST tokenizer of actions: %d tokens, fitted on the training split", fitted.tokenizer.vocab_size)
        self.set_encoder("actions", fitted.node())

    def data_requirements(self) -> dict[str, int | None]:
        return {"action_dim": self.action_dim, "vocab_size": int(self.network_node["vocab_size"])}

    @property
    def ratio(self) -> int:
        return self._ratio_time if self.video_encoder is None else super().ratio

    @property
    def encoder_fingerprint(self) -> str | None:
        if self.video_encoder is not None:
            return super().encoder_fingerprint
        return (self._data.get("tokens") or {}).get("encoder_fingerprint")

    # Steps

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        key = NoiseKey.of_positions(self.seed, position_of(batch))
        tokens, conditions = self.encoded(batch)
        out = self.objective(self.network, tokens, conditions, key, mask=self.latent_mask(batch, tokens.shape[2]))
        self.log("train/loss", out.loss, batch_size=len(batch), sync_dist=True)
        for name, value in out.logs.items():
            self.log(f"train/{name}", value, batch_size=len(batch), sync_dist=True)
        return out.loss

    def validation_step(self, batch: Clip, batch_idx: int) -> None:
        """Measures the negative log likelihood of the predicted latents, token by token, and how many are hit."""
        tokens, conditions = self.encoded(batch)
        network, first = self.eval_network, self.context_lat
        hidden, targets = predicted_hidden(network, tokens, conditions, first), tokens[:, :, first:]
        nats = -network.head.log_probs_of(hidden, targets)
        hits = (network.head.likeliest(hidden) == targets).float()
        mask = self.latent_mask(batch, tokens.shape[2])
        real = torch.ones_like(nats[..., 0, 0]) if mask is None else mask[:, :, first:].float()
        self._update("nll", nats, real)
        self._update("accuracy", hits, real)
        for index in range(nats.shape[2]):
            self._update(f"nll@latent{first + index:02d}", nats[:, :, index], real[:, :, index])
        for name, metric in self.val_means.items():
            self.log(f"val/{name}", metric, on_epoch=True, batch_size=len(batch))  # type: ignore[arg-type]

    def on_validation_epoch_end(self) -> None:
        nll = self.val_means["nll"].compute()  # type: ignore[operator]
        self.log("val/loss", nll)
        self.log("val/bits_per_token", nll / math.log(2))

    def _update(self, name: str, values: Tensor, real: Tensor) -> None:
        """Adds values [b v (t) h w]; `real` [b v (t)] is 0 for latents that do not count."""
        metric: MeanMetric = self.val_means[name]  # type: ignore[assignment]
        metric.update(values.mean(dim=(-2, -1)), weight=real)

    def encoded(self, batch: Clip) -> tuple[Tensor, Conditions]:
        """Returns tokens [b v t h w] and the conditions of their latent frames."""
        tokens = self.codes_of(batch)
        conditions = self._conditions(batch, tokens.shape[2])
        if conditions.actions is None:
            return tokens, conditions
        # a mask also where nothing is dropped: then every parameter has a gradient in every step, as DDP wants it
        told = torch.ones(conditions.actions.shape[:3], dtype=torch.bool, device=conditions.actions.device)
        return tokens, dataclasses.replace(conditions, actions_mask=told)

    def _conditions(self, batch: Clip, num_lat: int, first_px: int = 0, num_frames_px: int | None = None) -> Conditions:
        """Returns the conditions of latents of a batch, see `token_conditions`."""
        return token_conditions(
            self.with_text(batch if self.action_dim else dataclasses.replace(batch, actions=None)),
            num_lat=num_lat,
            ratio=self.ratio,
            actions=self.encoder("actions"),
            first_px=first_px,
            num_frames_px=num_frames_px,
        )

    @torch.no_grad()
    def codes_of(self, batch: Clip) -> Tensor:
        if batch.tokens is not None:
            return batch.tokens
        if batch.video is None:
            raise ConfigError(
                "the data has neither tokens nor pixels; expected one of them. Change `data` (for example doom_tokens)."
            )
        return tokens_of_pixels(batch.video, self.video_encoder)

    def work(self, batch: Clip) -> Work:
        """Returns the work of a training step on one rank: forward, and twice as much backward, without encoders."""
        clips = batch.tokens if batch.tokens is not None else batch.video
        assert clips is not None, "a batch holds tokens or pixels"
        num_lat, height, width = self.grid_lat
        layout = token_layout(num_lat, views=clips.shape[1], height=height, width=width)
        flops = self.network.num_flops(layout, len(batch))
        return Work(len(batch) * num_lat * layout.grid.tokens, 3.0 * flops)

    # Rollouts

    @property
    def default_context_px(self) -> int:
        """As set, else as many as the objective is given."""
        if self.num_context_frames is not None:
            return self.num_context_frames
        return pixel_frames(self.objective.context_lat, self.ratio)

    @torch.no_grad()
    def rollout_frames(self, batch: Clip, plan: RolloutPlan, seed: int | None = None) -> Iterator[VideoChunk]:
        batch = batch.to(self.device)
        yield from token_chunks(
            self.rollout,
            self.eval_network,
            self.video_encoder,
            self.codes_of(batch)[:, :, : plan.start_lat],
            partial(self._conditions, batch, num_frames_px=plan.num_frames_px),
            plan,
            self.noise_key(batch, seed),
            restart_lat=self.context_lat,
        )

    # Files

    def spec(self) -> TokenSpec:
        return TokenSpec(
            video={name: self.video[name] for name in TokenSpec.video_keys},
            vocab_size=int(self.network_node["vocab_size"]),
            grid_lat=list(self.grid_lat),
            **self.spec_fields(),
        )

    def initialise_from(self, path: str | Path) -> None:
        """As for `AveragedModule`; `model.pt`, which no run of ours writes, is taken as released weights of Cosmos."""
        if Path(path).suffix not in (".pt", ".pth"):
            super().initialise_from(path)
            return
        from longtake.pretrained.cosmos_ar import load_cosmos_ar

        self.configure_model()
        load_cosmos_ar(self.network, path)
