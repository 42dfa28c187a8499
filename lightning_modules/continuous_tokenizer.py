"""Trains a video VAE: clips of pixels -> latents -> the same clips."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from lightning_modules.video_tokenizer import Coded, VideoTokenizer
from longtake.encoders.latent_basis import change_basis, measured_basis
from longtake.encoders.video_vae import KIND
from longtake.rollout.noise import Draws, NoiseKey, normal
from longtake.types import Clip

logger = logging.getLogger("longtake")


class ContinuousTokenizer(VideoTokenizer):
    """A first stage with continuous latents.

    Its latents are means with noise of a fixed size added while training, so that the decoder is smooth: a generated
    latent is never exactly one that the encoder makes. A weak pull towards variance 1 keeps the noise from being
    outgrown; mean and variance of each channel are measured all along and normalise the latents later. An exported file
    has its latents in another basis, in which directions count by what they do to the pixels (`latent_basis`).

    Args:
        latent_noise: standard deviation of the noise on latents of about unit variance.
        variance_pull: weight of (mean square of a latent channel - 1)^2.
        linear_lr_scale: factor on the learning rate of the linear maps, which begin as principal components.
        **kwargs: as for `VideoTokenizer`; the network is a `VideoVAENetwork`.
    """

    kind = KIND

    def __init__(
        self,
        *,
        latent_noise: float,
        variance_pull: float,
        linear_lr_scale: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.latent_noise, self.variance_pull = latent_noise, variance_pull
        self.linear_lr_scale = linear_lr_scale
        self._recent: Tensor | None = None  # clips of the last training batch, for the basis of the exported file

    def begin(self) -> None:
        """Begins the linear maps as principal components of training clips."""
        assert self.network is not None
        mean, covariance, count = self.moments(self.network.blocks, self.principal_clips)
        self.network.begin_linear(mean, covariance)
        logger.info("linear maps begin as %d principal components of %s blocks", self.network.channels, f"{count:,}")

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

    def code(self, video: Tensor, batch: Clip) -> Coded:
        assert batch.position is not None, "a training batch knows its plan positions"
        latents, self._recent = self.network.encode(video), video
        self._measure(latents.detach())
        key = NoiseKey.of_positions(self.seed, batch.position)
        views, frames = len(video) // len(batch), latents.shape[1]
        noise = normal(key, "latent_noise", Draws([0], [0], views, frames), latents.shape[2:], self.device)
        recon, _ = self.network.decode(latents + self.latent_noise * noise.reshape(latents.shape))
        pull = (latents.square().mean((0, 1, 3, 4)) - 1).square().mean()
        return Coded(recon, self.variance_pull * pull, {"variance_pull": pull})

    def reconstruct(self, video: Tensor) -> Tensor:
        """Returns what clean latents are decoded to."""
        return self.eval_network.decode(self.eval_network.encode(video))[0]

    def export_tensors(self) -> dict[str, Tensor]:
        """Returns the weights that an exported file holds: those of `eval_network`, in the balanced basis."""
        network = copy.deepcopy(self.eval_network)
        if self._recent is not None:
            change_basis(network, measured_basis(network, self._recent))
        return {name: tensor.detach() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def _measure(self, latents: Tensor, rate: float = 0.01) -> None:
        """Moves the known mean and standard deviation of the raw latents towards those of a batch."""
        assert self.network is not None
        mean, std = self.network.mean, self.network.std
        square = (std.square() + mean.square()).lerp(latents.float().square().mean((0, 1, 3, 4)), rate)
        mean.lerp_(latents.float().mean((0, 1, 3, 4)), rate)
        std.copy_((square - mean.square()).clamp(min=1e-6).sqrt())
