"""Trains a first stage: clips of pixels -> latents -> the same clips."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.base import BaseModule, built
from longtake.encoders.video_vae import KIND, VideoVAENetwork
from longtake.media.write import save_image
from longtake.metrics.frames import psnr, sharpness
from longtake.provenance import commit
from longtake.rollout.noise import Draws, NoiseKey, normal
from longtake.types import Clip

logger = logging.getLogger("longtake")

_TENTH = 0.2  # a tenth of the range [-1, 1]: the unit in which the loss counts errors
_SHOWN_CLIPS, _SHOWN_FRAMES = 4, 9


@dataclass(frozen=True)
class EncoderSpec:
    """What the weights file of a first stage says of itself: `network` builds it, the rest is for people."""

    network: dict[str, Any]
    video: dict[str, Any]
    seed: int
    step: int
    is_average: bool
    metrics: dict[str, float]
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON."""
        return {"kind": KIND, **vars(self)}


class VideoTokenizer(BaseModule):
    """Trains a video VAE with a squared and an absolute error.

    Its latents are means with noise of a fixed size added while training, so that the decoder is smooth: a generated
    latent is never exactly one that the encoder makes. A weak pull towards variance 1 keeps the noise from being
    outgrown; mean and variance of each channel are measured all along and normalise the latents later.

    Args:
        network: config node of the network.
        video: geometry of the clips: fps, height, width, num_frames.
        seed: of the weights and of every draw.
        latent_noise: standard deviation of the noise on latents of about unit variance.
        absolute_error: weight of the absolute error beside the squared one.
        variance_pull: weight of (mean square of a latent channel - 1)^2.
        linear_lr_scale: factor on the learning rate of the linear maps, which begin as principal components.
        principal_clips: training clips from which these are taken; 0 begins at random.
        **kwargs: optimiser and schedule, as for `BaseModule`.

    Attributes:
        wants_ema: set by the EMA callback before `configure_model`.
        ema_updates: updates of the average so far.
    """

    def __init__(
        self,
        *,
        network: Mapping[str, Any],
        video: Mapping[str, Any],
        seed: int,
        latent_noise: float,
        absolute_error: float,
        variance_pull: float,
        linear_lr_scale: float,
        principal_clips: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._node, self.video, self.seed = dict(network), dict(video), seed
        self.latent_noise, self.absolute_error, self.variance_pull = latent_noise, absolute_error, variance_pull
        self.linear_lr_scale, self.principal_clips = linear_lr_scale, principal_clips
        self.network: VideoVAENetwork | None = None
        self.ema_network: VideoVAENetwork | None = None
        self.wants_ema, self.ema_updates = False, 0
        self._is_initialised = False
        self.val_metrics = nn.ModuleDict({name: MeanMetric() for name in ("loss", "psnr", "sharpness")})

    def configure_model(self) -> None:
        """Builds what is missing: the network, and its average where one is wanted."""
        if self.network is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.network = built(self._node)  # type: ignore[assignment]
        if self.wants_ema and self.ema_network is None:
            self.ema_network = copy.deepcopy(self.network).requires_grad_(False)  # type: ignore[union-attr]

    def initialise_from(self, path: str | Path) -> None:
        super().initialise_from(path)
        self._is_initialised = True

    def on_fit_start(self) -> None:
        """Begins the linear maps as principal components of training clips, unless the weights come from a file."""
        super().on_fit_start()
        if self.trainer.ckpt_path is not None or self._is_initialised or self.principal_clips == 0:
            return
        assert self.network is not None
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        loader = data.fixed_loader("train", data.shard())  # every rank takes its share of the clips
        num_batches = -(-self.principal_clips // (data.val_batch_size * self.trainer.world_size))
        count, total, product = (torch.zeros(1, dtype=torch.float64) for _ in range(3))
        for batch in islice(loader, num_batches):
            blocks = self.network.blocks(_clips(batch)).double()
            count, total, product = count + len(blocks), total + blocks.sum(0), product + blocks.T @ blocks
        parts = (part.to(self.device) for part in (count, total, product))
        count, total, product = (self.trainer.strategy.reduce(part, reduce_op="sum") for part in parts)  # type: ignore[misc]
        mean = total / count
        self.network.begin_linear(mean, product / count - torch.outer(mean, mean))
        logger.info(
            "linear maps begin as %d principal components of %s blocks", self.network.channels, f"{int(count):,}"
        )

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns three groups: matrices, the linear maps, and vectors (without decay)."""
        assert self.network is not None, "configure_model comes first"
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.network.named_parameters():
            groups.setdefault((".linear." in name, parameter.squeeze().ndim > 1), []).append(parameter)
        return [
            {
                "params": params,
                **({"lr_scale": self.linear_lr_scale} if is_linear else {}),
                **({} if decays else {"weight_decay": 0.0}),
            }
            for (is_linear, decays), params in groups.items()
        ]

    @property
    def eval_network(self) -> VideoVAENetwork:
        """The network of validation and export: the average once it was updated."""
        network = self.ema_network if self.ema_network is not None and self.ema_updates > 0 else self.network
        assert network is not None, "configure_model comes first"
        return network

    def data_requirements(self) -> dict[str, int | None]:
        return {"action_dim": None}

    # Steps

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        assert self.network is not None, "configure_model comes first"
        assert batch.position is not None, "a training batch knows its plan positions"
        video = _clips(batch)
        latents = self.network.encode(video)
        self._measure(latents.detach())
        key = NoiseKey.of_positions(self.seed, batch.position)
        views, frames = len(video) // len(batch), latents.shape[1]
        noise = normal(key, "latent_noise", Draws([0], [0], views, frames), latents.shape[2:], self.device)
        noisy = latents + self.latent_noise * noise.reshape(latents.shape)
        recon, _ = self.network.decode(noisy)
        error = (recon - video) / _TENTH
        squared, absolute = error.square().mean(), error.abs().mean()
        pull = (latents.square().mean((0, 1, 3, 4)) - 1).square().mean()
        loss = squared + self.absolute_error * absolute + self.variance_pull * pull
        values = {"loss": loss, "squared_error": squared, "variance_pull": pull}
        for name, value in values.items():
            self.log(f"train/{name}", value, batch_size=len(batch), sync_dist=True)
        return loss

    @torch.no_grad()
    def _measure(self, latents: Tensor, rate: float = 0.01) -> None:
        """Moves the known mean and standard deviation of the raw latents towards those of a batch."""
        assert self.network is not None
        mean, std = self.network.mean, self.network.std
        square = (std.square() + mean.square()).lerp(latents.float().square().mean((0, 1, 3, 4)), rate)
        mean.lerp_(latents.float().mean((0, 1, 3, 4)), rate)
        std.copy_((square - mean.square()).clamp(min=1e-6).sqrt())

    def validation_step(self, batch: Clip, batch_idx: int) -> None:
        """Measures reconstructions from clean latents, clip by clip; a clip without real frames does not count."""
        video = _clips(batch)
        recon, _ = self.eval_network.decode(self.eval_network.encode(video))
        pred, truth = (recon.float().clamp(-1, 1) + 1) / 2, (video + 1) / 2
        is_real = torch.ones(len(video), device=self.device)
        if batch.frame_mask is not None:
            is_real = batch.frame_mask.any(1).float().repeat_interleave(len(video) // len(batch))
        values = {
            "loss": ((recon - video) / _TENTH).square().mean((1, 2, 3, 4)),
            "psnr": psnr(pred, truth),
            "sharpness": sharpness(pred) / sharpness(truth).clamp(min=1e-6),
        }
        for name, value in values.items():
            metric: MeanMetric = self.val_metrics[name]  # type: ignore[assignment]
            metric.update(value.to(self.device, torch.float32), weight=is_real)
            self.log(f"val/{name}", metric, on_epoch=True, batch_size=len(batch))
        if batch_idx == 0 and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._show(truth, pred)

    def _show(self, truth: Tensor, pred: Tensor) -> None:
        """Writes one picture: for each clip the true frames, and below them what the latents make of them."""
        rows = torch.stack([truth[:_SHOWN_CLIPS, :_SHOWN_FRAMES], pred[:_SHOWN_CLIPS, :_SHOWN_FRAMES]], dim=1)
        picture = rearrange(rows, "clips rows t c h w -> (clips rows h) (t w) c")
        pixels = (picture * 255).round().byte().cpu().numpy()
        pixels = np.kron(pixels, np.ones((2, 2, 1), dtype=np.uint8)) if pixels.shape[1] < 1000 else pixels
        folder = Path(self.trainer.default_root_dir) / "samples" / f"step_{self.global_step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / "reconstructions.png", pixels)
        for tracker in self.loggers:
            if isinstance(tracker, TensorBoardLogger):
                tracker.experiment.add_image("val/reconstructions", pixels, self.global_step, dataformats="HWC")

    # Files

    def spec(self) -> EncoderSpec:
        """Returns what an exported file says of itself."""
        metrics = {
            name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")
        }
        return EncoderSpec(
            network=dict(self._node),
            video={name: self.video[name] for name in ("fps", "height", "width", "num_frames")},
            seed=self.seed,
            step=self.global_step,
            is_average=self.eval_network is self.ema_network,
            metrics=metrics,
            commit=commit(),
        )

    def export_tensors(self) -> dict[str, Tensor]:
        """Returns the weights that an exported file holds: those of `eval_network`."""
        return {name: tensor.detach() for name, tensor in self.eval_network.state_dict().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ema_updates"] = self.ema_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ema_updates = checkpoint["ema_updates"]


def _clips(batch: Clip) -> Tensor:
    """Returns every view of a batch as a clip of its own, [n t c h w] in [-1, 1]."""
    assert batch.video is not None, "a first stage is trained on pixels"
    return batch.video.flatten(0, 1).float() / 127.5 - 1
