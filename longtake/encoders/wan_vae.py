"""Wan 2.1's video VAE as diffusers has it, behind the interface of this project."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longtake.encoders.video import DTYPES, LatentGeometry, VideoEncoder
from longtake.errors import ConfigError, unknown_choice
from longtake.pretrained.weights_file import fingerprint

_KEY = "encoder.video.path"


class WanVAE(VideoEncoder):
    """The encoder gives the mean of its distribution; the decoder keeps what its convolutions look back on.

    Args:
        path: local folder of the weights as diffusers stores them (config.json, safetensors); nothing is downloaded.
        subfolder: of the weights, where `path` holds a whole pipeline ("vae").
        dtype: what it computes in, "float32" or "bfloat16".
    """

    def __init__(self, path: str, subfolder: str = "", dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise unknown_choice("type of numbers", dtype, DTYPES, "encoder.video.dtype")
        vae = _loaded(Path(path).expanduser() / subfolder)
        config = vae.config
        ratio_time, ratio_space = int(config.scale_factor_temporal), int(config.scale_factor_spatial)
        geometry = LatentGeometry(ratio_time, ratio_space, int(config.z_dim))
        super().__init__(geometry, torch.tensor(config.latents_mean), torch.tensor(config.latents_std))
        self.vae = vae
        assert self.fingerprint  # of the numbers in the file, not of what they are rounded to below
        self.vae.to(DTYPES[dtype])
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        config = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        return fingerprint(config, self.vae.state_dict())

    def encode_clips(self, video: Tensor) -> Tensor:
        raw = self.vae.encode(rearrange(video, "n t c h w -> n c t h w")).latent_dist.mode()
        return rearrange((raw.float() - _per_channel(self.mean)) / _per_channel(self.std), "n c t h w -> n t c h w")

    def decode_clips(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        raw = rearrange(latents.float(), "n t c h w -> n c t h w") * _per_channel(self.std) + _per_channel(self.mean)
        features = self.vae.post_quant_conv(raw.to(self.dtype))
        cache = [None] * self.vae._cached_conv_counts["decoder"] if state is None else list(state)
        frames = []
        for index in range(features.shape[2]):
            is_first = state is None and index == 0
            one = features[:, :, index : index + 1]
            frames.append(self.vae.decoder(one, feat_cache=cache, feat_idx=[0], first_chunk=is_first))
        video = torch.cat(frames, dim=2)
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        return rearrange(video, "n c t h w -> n t c h w"), tuple(cache)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)


def _loaded(folder: Path) -> Any:
    """Returns the diffusers model of a folder. Raises ConfigError."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no video VAE in {folder}; expected a local folder with config.json and safetensors, as diffusers stores "
            f"AutoencoderKLWan. Change `{_KEY}`."
        )
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise ConfigError(
            "encoder/video=wan_vae needs the package `diffusers`, which is not installed. Install it "
            "(`pip install diffusers`), or take encoder/video=video_vae."
        ) from error
    try:
        return AutoencoderKLWan.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{folder} cannot be read as AutoencoderKLWan ({reason}); expected config.json and safetensors. Change "
            f"`{_KEY}`."
        ) from error
