"""FAST tokens of latent frames: aligned, causal, and rebuilt from the config that travels with weights."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from longtake.encoders.actions import PADDING, FastActionsEncoder
from longtake.errors import ConfigError


def clips(n: int, frames: int = 17, seed: int = 0) -> torch.Tensor:
    """Returns actions of a player: turning smoothly, walking or not."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(n, frames, 1, generator=generator).cumsum(1) / 4
    walk = (torch.rand(n, frames, 1, generator=generator) < 0.7).float()
    return torch.cat((turn, walk, turn * walk), dim=-1)


@pytest.fixture(scope="module")
def encoder() -> FastActionsEncoder:
    return FastActionsEncoder(vocab_size=256).fitted(clips(200).numpy())


def test_tokens_of_each_latent(encoder):
    actions = clips(5, seed=1)
    tokens = encoder(actions)
    assert tokens.shape[:2] == (5, 3)
    assert tokens.dtype == torch.int64
    assert tokens.max() < 256
    assert (tokens[..., 0] >= 0).all(), "no window is empty"
    is_real = tokens != PADDING
    assert (is_real.int().diff(dim=-1) <= 0).all(), "padding only comes last"
    assert encoder.tokenizer is not None
    for clip in range(5):
        ids = [[token for token in window if token != PADDING] for window in tokens[clip].tolist()]
        windows = encoder.tokenizer.decode(ids)
        frames = np.concatenate([windows[0][-1:], windows[1], windows[2]])
        assert np.abs(frames - actions[clip].numpy()).max() < 0.3


def test_a_latent_is_told_nothing_of_later_frames(encoder):
    """Frame 9 belongs to latent 2 (frames 9 to 16), frame 8 to latent 1."""
    actions = clips(1, seed=2)
    for frame, first in ((0, 0), (1, 1), (8, 1), (9, 2), (16, 2)):
        changed = actions.clone()
        changed[0, frame] += 2
        before, after = encoder(actions)[0], encoder(changed)[0]
        differs = [before[k].tolist() != after[k][: before.shape[1]].tolist() for k in range(3)]
        assert differs == [k == first for k in range(3)]


def test_the_config_rebuilds_it(encoder, tmp_path):
    actions = clips(4, seed=3)
    again = instantiate(OmegaConf.create(encoder.node()), _convert_="all")
    assert torch.equal(again(actions), encoder(actions))
    assert again.fingerprint == encoder.fingerprint
    assert pickle.loads(pickle.dumps(encoder)).fingerprint == encoder.fingerprint
    encoder.tokenizer.save(tmp_path / "fast.json")
    loaded = FastActionsEncoder(path=str(tmp_path / "fast.json"), vocab_size=256)
    assert loaded.fingerprint == encoder.fingerprint
    other = FastActionsEncoder(vocab_size=256).fitted(clips(40, seed=9).numpy())
    assert other.fingerprint != encoder.fingerprint


def test_refused(encoder):
    with pytest.raises(ConfigError, match="no tokenizer yet"):
        FastActionsEncoder()(clips(1))
    with pytest.raises(ConfigError, match="expected as many at least"):
        FastActionsEncoder(tokenizer=encoder.tokenizer.to_dict(), vocab_size=40)
    with pytest.raises(ConfigError, match="do not fit the FAST tokenizer"):
        encoder(clips(1)[..., :2])
    short = FastActionsEncoder(tokenizer=encoder.tokenizer.to_dict(), vocab_size=256, max_tokens=2)
    with pytest.raises(ConfigError, match="Raise `encoder.actions.max_tokens`"):
        short(clips(3))
