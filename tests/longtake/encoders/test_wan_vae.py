"""AutoencoderKLWan of diffusers behind our interface, with a tiny random configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.encoders.wan_vae import WanVAE
from longtake.errors import ConfigError
from tests.first_stage import random_video

diffusers = pytest.importorskip("diffusers")
Z = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=Z,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    )
    path = tmp_path_factory.mktemp("wan") / "vae"
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wan(folder: Path) -> WanVAE:
    return WanVAE(str(folder.parent), subfolder="vae")


def test_it_is_diffusers_with_normalised_latents(wan: WanVAE, folder: Path) -> None:
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder).eval()
    video = random_video(9, v=2)
    clips = video[0].transpose(1, 2)
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        raw = vae.encode(clips).latent_dist.mode()
        frames = vae.decode(raw).sample
    latents = wan.encode(video)
    torch.testing.assert_close(latents[0].transpose(1, 2), (raw - mean) / std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wan.decode(latents)[0].transpose(1, 2), frames, rtol=1e-4, atol=1e-5)


def test_geometry_and_causality(wan: WanVAE) -> None:
    assert (wan.geometry.ratio_time, wan.geometry.ratio_space, wan.geometry.channels) == (4, 8, Z)
    video = random_video(9)
    whole = wan.encode(video)
    assert whole.shape == (1, 1, 3, Z, 2, 3)
    torch.testing.assert_close(wan.encode(video[:, :, :5]), whole[:, :, :2], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="for example 5 or 9"):
        wan.encode(video[:, :, :7])


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2, 3)])
def test_a_stream_is_what_one_call_decodes(wan: WanVAE, cuts: tuple[int, ...]) -> None:
    latents = torch.randn(1, 2, 4, Z, 2, 3, generator=torch.Generator().manual_seed(0))
    state, parts = None, []
    for begin, end in zip((0, *cuts), (*cuts, 4), strict=True):
        part, state = wan.decode_stream(latents[:, :, begin:end], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=2), wan.decode(latents), rtol=0, atol=1e-5)


def test_a_state_can_be_continued_twice(wan: WanVAE) -> None:
    latents = torch.randn(1, 1, 3, Z, 2, 3, generator=torch.Generator().manual_seed(1))
    _, state = wan.decode_stream(latents[:, :, :2])
    first, _ = wan.decode_stream(latents[:, :, 2:], state)
    again, _ = wan.decode_stream(latents[:, :, 2:], state)
    assert torch.equal(first, again)


def test_the_fingerprint_follows_the_weights(wan: WanVAE, folder: Path, tmp_path: Path) -> None:
    assert WanVAE(str(folder), dtype="bfloat16").fingerprint == wan.fingerprint
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder)
    with torch.no_grad():
        vae.quant_conv.bias += 1
    vae.save_pretrained(tmp_path)
    assert WanVAE(str(tmp_path)).fingerprint != wan.fingerprint


def test_a_missing_or_damaged_folder_is_a_config_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encoder.video.path"):
        WanVAE(str(tmp_path))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="cannot be read as AutoencoderKLWan"):
        WanVAE(str(tmp_path))
