"""Training a decoder against a discriminator: what stays, what changes, whose gradient is whose."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.adversarial_decoder import AdversarialDecoder
from longtake.encoders.discriminator import PatchDiscriminator
from longtake.encoders.video_vae import KIND, VideoVAE
from longtake.errors import ConfigError
from longtake.pretrained.weights_file import write_weights
from longtake.types import Clip
from tests.first_stage import NODE, random_network, random_video
from tests.lightning_modules.tokenizer_fit import VIDEO, fit, root

__all__ = ["root"]  # a fixture


def module(**changes: Any) -> AdversarialDecoder:
    settings: dict[str, Any] = {
        "network": NODE,
        "video": VIDEO,
        "seed": 0,
        "latent_noise": 0.1,
        "absolute_error": 0.1,
        "variance_pull": 0.02,
        "linear_lr_scale": 0.1,
        "principal_clips": 0,
        "discriminator": {"_target_": "longtake.encoders.discriminator.PatchDiscriminator", "width": 8},
        "adversarial_weight": 0.1,
        "discriminator_steps": 2,
        "discriminator_lr_scale": 2.0,
        "slope_weight": 0.5,
        "optimizer": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
        "scheduler": None,
    }
    return AdversarialDecoder(**{**settings, **changes})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "first_stage.safetensors"
    tensors = {name: value.half() for name, value in random_network().state_dict().items()}
    write_weights(path, tensors, {"kind": KIND, "network": NODE})
    return path


def started(weights: Path, **changes: Any) -> AdversarialDecoder:
    made = module(**changes)
    made.initialise_from(weights)
    return made


def test_latents_stay_and_the_decoder_changes(root: Path, tmp_path: Path, weights: Path) -> None:
    made = started(weights)
    fit(made, root, tmp_path / "run", steps=6)
    before, after = VideoVAE(str(weights)), VideoVAE(str(tmp_path / "run" / "weights.safetensors"))
    assert after.fingerprint == before.fingerprint
    video = random_video(9, width=32)
    latents = before.encode(video)
    assert torch.equal(after.encode(video), latents)
    assert not torch.equal(after.decode(latents), before.decode(latents))
    assert not torch.equal(made.discriminator.score.weight, module_discriminator().score.weight)


def module_discriminator() -> PatchDiscriminator:
    made = module()
    made.configure_model()
    return made.discriminator


def test_a_run_without_weights_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_from is null"):
        fit(module(), root, tmp_path, steps=1)


def test_a_resumed_run_goes_on_alike(root: Path, tmp_path: Path, weights: Path) -> None:
    whole = started(weights)
    expected = fit(whole, root, tmp_path / "whole", steps=6)
    fit(started(weights), root, tmp_path / "half", steps=3)
    rest = module()
    losses = fit(rest, root, tmp_path / "rest", steps=6, ckpt=tmp_path / "half" / "last.ckpt")
    assert losses.train == expected.train[3:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def gradients(weights: Path, *, adversarial_weight: float, wait: int = 0) -> dict[str, torch.Tensor]:
    made = started(weights, adversarial_weight=adversarial_weight, discriminator_steps=wait)
    made.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    video = ((random_video(9, b=2) + 1) * 127.5).to(torch.uint8)
    made.training_step(Clip(video=video, key=["a", "b"], position=torch.tensor([0, 1])), 0).backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def test_each_learns_from_its_own_part_of_the_loss(weights: Path) -> None:
    with_looks, without, waiting = (
        gradients(weights, adversarial_weight=weight, wait=wait) for weight, wait in ((0.5, 0), (0.0, 0), (0.5, 9))
    )
    assert with_looks.keys() == without.keys()
    assert not any("encoder" in name for name in with_looks)
    for name, gradient in with_looks.items():
        is_discriminator = name.startswith("discriminator.")
        # the discriminator never learns to praise the decoder; the decoder does try to look real
        assert torch.equal(gradient, without[name]) == is_discriminator, name
        assert torch.equal(waiting[name], without[name]), name
    assert any(gradient.any() for name, gradient in without.items() if name.startswith("discriminator."))
