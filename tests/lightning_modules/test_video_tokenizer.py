"""Training a first stage: where it begins, that it learns, what is exported, and that a resumed run goes on alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.continuous_tokenizer import ContinuousTokenizer
from longtake.encoders.video_vae import VideoVAE
from longtake.schedules import warmup_constant
from longtake.types import Clip
from tests.first_stage import NODE, random_video
from tests.lightning_modules.tokenizer_fit import VIDEO, fit, root

__all__ = ["root"]  # a fixture


def module(**changes: Any) -> ContinuousTokenizer:
    settings: dict[str, Any] = {
        "network": NODE,
        "video": VIDEO,
        "seed": 0,
        "latent_noise": 0.1,
        "absolute_error": 0.1,
        "variance_pull": 0.02,
        "linear_lr_scale": 0.1,
        "principal_clips": 8,
        "optimizer": partial(torch.optim.AdamW, lr=2e-3),
        "scheduler": partial(warmup_constant, warmup_steps=2),
    }
    return ContinuousTokenizer(**{**settings, **changes})


def test_it_learns_and_its_file_is_the_encoder(root: Path, tmp_path: Path) -> None:
    made = module()
    losses = fit(made, root, tmp_path, steps=40)
    assert losses.val[-1]["val/psnr"] > losses.val[0]["val/psnr"] > 10
    assert losses.val[-1]["val/loss"] < losses.val[0]["val/loss"]
    assert list(tmp_path.glob("samples/step_*/reconstructions.png"))
    encoder = VideoVAE(str(tmp_path / "weights.safetensors"))
    video = random_video(9, width=32)
    network = made.ema_network
    assert network is not None
    recon, expected, other = (one.decode(one.encode(video[0]))[0] for one in (encoder.network, network, made.network))
    assert (recon - expected).abs().max() < 0.01 * expected.abs().max()  # in another basis, the average it is
    assert (recon - other).abs().max() > (recon - expected).abs().max()


def test_it_begins_with_principal_components(root: Path, tmp_path: Path) -> None:
    linear = fit(module(), root, tmp_path / "a", steps=1).train[0]
    random = fit(module(principal_clips=0), root, tmp_path / "b", steps=1).train[0]
    assert linear < 0.5 * random


def test_a_resumed_run_goes_on_alike(root: Path, tmp_path: Path) -> None:
    whole = module()
    expected = fit(whole, root, tmp_path / "whole", steps=6)
    fit(module(), root, tmp_path / "half", steps=3)
    rest = module()
    losses = fit(rest, root, tmp_path / "rest", steps=6, ckpt=tmp_path / "half" / "last.ckpt")
    assert losses.train == expected.train[3:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_noise_belongs_to_the_sample_not_to_its_place_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(principal_clips=0)
    made.configure_model()
    assert made.network is not None
    made.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    video = ((random_video(9, b=2) + 1) * 127.5).to(torch.uint8)
    clean = made.network.encode(video.flatten(0, 1).float() / 127.5 - 1).detach()
    noises: list[torch.Tensor] = []
    decode = made.network.decode

    def noted(latents: torch.Tensor) -> Any:
        noises.append(latents.detach())
        return decode(latents)

    monkeypatch.setattr(made.network, "decode", noted)
    for rows in ([0, 1], [1, 0], [1]):
        made.training_step(Clip(video=video[rows], key=["a"] * len(rows), position=torch.tensor(rows)), 0)
        noises[-1] = noises[-1] - clean[rows]
    torch.testing.assert_close(noises[0], noises[1].flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(noises[0][1:], noises[2], rtol=0, atol=1e-5)
    assert (noises[0][0] - noises[0][1]).abs().max() > 0.1
    assert noises[0].std() == pytest.approx(0.1, rel=0.2)


def test_measured_statistics_normalise_the_latents() -> None:
    made = module()
    made.configure_model()
    assert made.network is not None
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None], torch.tensor([0.0, 1.0, -2.0, 5.0])[:, None, None]
    for _ in range(800):
        made._measure(torch.randn(4, 3, 4, 2, 3, generator=generator) * scale + shift)
    torch.testing.assert_close(made.network.mean, shift.flatten(), rtol=0.1, atol=0.1)
    torch.testing.assert_close(made.network.std, scale.flatten(), rtol=0.1, atol=0.05)


def test_training_goes_on_from_an_exported_file(root: Path, tmp_path: Path) -> None:
    fit(module(), root, tmp_path, steps=3)
    made = module()
    made.initialise_from(tmp_path / "weights.safetensors")
    encoder = VideoVAE(str(tmp_path / "weights.safetensors"))
    own = made.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in encoder.network.state_dict().items())
