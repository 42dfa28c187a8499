"""Training a video tokenizer: that it learns, what is exported, and that a resumed run goes on alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.discrete_tokenizer import DiscreteTokenizer, TokenPerplexity
from longtake.encoders.cosmos_layers import Past
from longtake.encoders.cosmos_tokenizer import VideoFSQ
from longtake.encoders.video_vae import VideoVAE
from longtake.errors import ConfigError
from longtake.schedules import warmup_constant
from longtake.types import Clip
from tests.first_stage import TOKENS_NODE, random_blocks, random_tokens_network
from tests.lightning_modules.tokenizer_fit import VIDEO, fit, root

__all__ = ["root"]  # a fixture


def module(**changes: Any) -> DiscreteTokenizer:
    settings: dict[str, Any] = {
        "network": {**TOKENS_NODE, "channels": 16},
        "video": VIDEO,
        "seed": 0,
        "absolute_error": 0.1,
        "principal_clips": 8,
        "variance_pull": 0.1,
        "optimizer": partial(torch.optim.AdamW, lr=2e-3),
        "scheduler": partial(warmup_constant, warmup_steps=2),
    }
    return DiscreteTokenizer(**{**settings, **changes})


def test_it_learns_and_its_file_is_the_tokenizer(root: Path, tmp_path: Path) -> None:
    made = module()
    figures = fit(made, root, tmp_path, steps=60)
    assert sum(figures.train[-5:]) < 0.8 * sum(figures.train[:5])
    first, last = figures.val[0], figures.val[-1]
    assert last["val/psnr"] > first["val/psnr"] + 0.1
    assert last["val/loss"] < first["val/loss"]
    assert 1 < last["val/token_perplexity"] <= 8 * 2 * 2 * 2 * 4  # clips, views, latent frames, rows, columns
    assert list(tmp_path.glob("samples/step_*/reconstructions.png"))
    path = str(tmp_path / "weights.safetensors")
    tokenizer, video = VideoFSQ(path), random_blocks(9, width=32)
    assert made.ema_network is not None
    expected = made.ema_network.eval().encode(video[0])[0]
    assert (tokenizer.encode(video)[0] == expected).float().mean() > 0.9  # weights are rounded to half precision
    assert not torch.equal(made.network.quant_conv.conv3d.weight, made.ema_network.quant_conv.conv3d.weight)
    with pytest.raises(ConfigError, match="holds a 'video_tokens'; expected a 'video_encoder'"):
        VideoVAE(path)


def test_a_resumed_run_goes_on_alike(root: Path, tmp_path: Path) -> None:
    whole = module()
    expected = fit(whole, root, tmp_path / "whole", steps=6)
    fit(module(), root, tmp_path / "half", steps=3)
    rest = module()
    figures = fit(rest, root, tmp_path / "rest", steps=6, ckpt=tmp_path / "half" / "last.ckpt")
    assert figures.train == expected.train[3:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_the_loss_reaches_every_weight_through_the_quantiser() -> None:
    made = module()
    made.configure_model()
    made.network = random_tokens_network().train()  # at the start residuals are zero, and with them gradients
    made.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    video = ((random_blocks(9, b=2) + 1) * 127.5).to(torch.uint8)
    made.training_step(Clip(video=video, key=["a", "b"], position=torch.arange(2)), 0).backward()
    still = [name for name, p in made.network.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_quantiser_begins_with_numbers_of_unit_variance(root: Path, tmp_path: Path) -> None:
    variances = {}
    for clips in (8, 0):
        made = module(principal_clips=clips, optimizer=partial(torch.optim.AdamW, lr=0.0))
        fit(made, root, tmp_path / str(clips), steps=1)
        network = made.network
        mean, covariance, _ = made.moments(lambda v, n=network: n.features(v, Past(keeps=False)).flatten(0, 3), 8)
        variances[clips] = covariance
    torch.testing.assert_close(variances[8].float(), torch.eye(6), rtol=0, atol=1e-2)
    assert variances[0].diagonal().min() < 0.5


def test_the_pull_is_zero_where_the_levels_are_used_evenly_and_grows_from_there() -> None:
    made = module()
    made.configure_model()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 5, 16, 16, 6, generator=generator)
    clip, pulls = Clip(key=["a"]), []
    for numbers in (z, 3 * z, z + 1):
        made.network.features = lambda video, past, n=numbers: n  # type: ignore[method-assign]
        made.network.frames = lambda codes, past: codes  # type: ignore[method-assign]
        coded = made.code(torch.zeros(1), clip)
        assert coded.extra_loss is not None
        pulls.append(float(coded.extra_loss))
    assert pulls[0] == pytest.approx(0, abs=1e-3)
    assert pulls[1] == pytest.approx(0.1 * 64, rel=0.1)  # (9 - 1)^2
    assert pulls[2] == pytest.approx(0.1 * 2, rel=0.1)


def test_vectors_do_not_decay() -> None:
    made = module()
    made.configure_model()
    groups = made.param_groups()
    assert {p.ndim > 1: group.get("weight_decay") for group in groups for p in group["params"]} == {
        True: None,
        False: 0.0,
    }
    assert sum(len(group["params"]) for group in groups) == len(list(made.network.parameters()))


def test_perplexity_counts_what_is_used_evenly() -> None:
    metric = TokenPerplexity(100)
    metric.update(torch.tensor([[1, 2], [3, 4]]))
    assert float(metric.compute()) == pytest.approx(4)
    metric.update(torch.tensor([1] * 96))
    assert 1 < float(metric.compute()) < 2
