"""Trains the decoder of a video VAE against a discriminator: the same latents -> the same clips, with real detail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_modules.base import built
from lightning_modules.continuous_tokenizer import ContinuousTokenizer
from lightning_modules.video_tokenizer import Coded
from longtake.encoders.discriminator import decoder_loss, discriminator_loss, pictures_of, slope_penalty
from longtake.encoders.video_vae import RATIO_TIME
from longtake.errors import ConfigError
from longtake.rollout.noise import Draws, NoiseKey, normal
from longtake.types import Clip


class AdversarialDecoder(ContinuousTokenizer):
    """A decoder that is trained further for how its clips look, behind an encoder that stays as it is.

    A squared error alone makes a decoder leave out what it cannot place exactly: walls lose their texture, and what is
    left of it stands still while the camera turns. Latents do not change, so whatever was trained on them stays valid.
    Decoder and discriminator take their steps at once, each by its own part of one loss.

    Args:
        discriminator: config node of the discriminator.
        adversarial_weight: weight of looking real beside the errors of pixels.
        discriminator_steps: first steps, in which only the discriminator learns from the comparison.
        discriminator_lr_scale: factor on its learning rate.
        slope_weight: weight of the squared slope of its scores at real pictures.
        **kwargs: as for `ContinuousTokenizer`.
    """

    def __init__(
        self,
        *,
        discriminator: Mapping[str, Any],
        adversarial_weight: float,
        discriminator_steps: int,
        discriminator_lr_scale: float,
        slope_weight: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._discriminator_node = discriminator
        self.discriminator: Any = None
        self.adversarial_weight = adversarial_weight
        self.discriminator_steps = discriminator_steps
        self.discriminator_lr_scale = discriminator_lr_scale
        self.slope_weight = slope_weight

    def configure_model(self) -> None:
        super().configure_model()
        assert self.network is not None
        self.network.encoder.requires_grad_(False)
        if self.discriminator is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.discriminator = built(self._discriminator_node)

    def on_fit_start(self) -> None:
        """Raises ConfigError for a run that begins without weights: there are no latents that could stay."""
        if self.trainer.ckpt_path is None and not self._is_initialised:
            raise ConfigError(
                "this module trains the decoder of a first stage further, but init_from is null; expected the weights "
                "of a first stage, for example weights/video_vae_doom.safetensors. Change `init_from`."
            )
        super().on_fit_start()

    def begin(self) -> None:
        """Nothing: the weights come from a file."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns two groups: the decoder, and the discriminator at a rate of its own."""
        assert self.network is not None, "configure_model comes first"
        return [
            {"params": list(self.network.decoder.parameters())},
            {"params": list(self.discriminator.parameters()), "lr_scale": self.discriminator_lr_scale},
        ]

    def code(self, video: Tensor, batch: Clip) -> Coded:
        assert batch.position is not None, "a training batch knows its plan positions"
        network, key = self.network, NoiseKey.of_positions(self.seed, batch.position)
        with torch.no_grad():
            latents = network.encode(video)
        draws = Draws([0], [0], len(video) // len(batch), latents.shape[1])
        noise = normal(key, "latent_noise", draws, latents.shape[2:], self.device).reshape(latents.shape)
        recon, _ = network.decode(latents + self.latent_noise * network.std[:, None, None] * noise)
        first = self.global_step % RATIO_TIME  # pictures across the borders of groups too: seams give a decoder away
        real, decoded = pictures_of(video, first), pictures_of(recon, first)
        told_apart = discriminator_loss(self.discriminator(real), self.discriminator(decoded.detach()))
        slope = slope_penalty(self.discriminator, real[:: len(real) // len(video)])  # a picture a clip says enough
        logs = {"discriminator_loss": told_apart.detach(), "discriminator_slope": slope.detach()}
        loss = told_apart + self.slope_weight * slope
        if self.global_step >= self.discriminator_steps:
            fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            looks = decoder_loss(functional_call(self.discriminator, fixed, (decoded,)))
            logs["adversarial_loss"] = looks.detach()
            loss = loss + self.adversarial_weight * looks
        return Coded(recon, loss, logs)

    def export_tensors(self) -> dict[str, Tensor]:
        """Returns the weights of `eval_network` in the basis that they came in."""
        return {name: tensor.detach() for name, tensor in self.eval_network.state_dict().items()}
