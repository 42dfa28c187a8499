"""Rollouts of tokens: draws, windows, scores, and that they are what the training pass says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError, DataError
from longtake.networks.token_transformer import TokenTransformer
from longtake.rollout.jacobi import JacobiRollout
from longtake.rollout.noise import NoiseKey
from longtake.rollout.tokens import TokenRollout
from longtake.types import Conditions
from tests.longtake.networks.tiny_tokens import VOCAB, conditions, layout, make, video

ROLLOUTS = {"plain": TokenRollout, "jacobi": lambda **kw: JacobiRollout(window=7, **kw)}


def start(b: int, num_lat: int = 2, views: int = 1) -> Tensor:
    return video(b, num_lat, views)[:, :, :, 0].transpose(1, 2)  # [b v t h w]


def rolled(
    network: TokenTransformer, rollout: TokenRollout, context: Tensor, told: Any, num_lat: int, key: NoiseKey, **kw: Any
) -> Tensor:
    frames = list(rollout(network, context, told, num_lat, key, **kw))
    assert [frame.index for frame in frames] == list(range(num_lat))
    assert [frame.given for frame in frames] == [i < context.shape[2] for i in range(num_lat)]
    return torch.stack([frame.tokens for frame in frames], dim=2)


def key(b: int, seed: int = 3) -> NoiseKey:
    return NoiseKey(seed, tuple(range(b)))


@pytest.mark.parametrize("kind", ROLLOUTS)
@pytest.mark.parametrize("name", ["base", "video2world_wide", "action_keys", "adaln", "factorised", "chain"])
def test_greedy_tokens_are_the_likeliest_of_the_training_pass(name: str, kind: str) -> None:
    network, told = make(name), conditions(name, 2)
    tokens = rolled(network, ROLLOUTS[kind](temperature=0.0), start(2), told, 3, key(2))
    x = tokens.transpose(1, 2)[:, :, :, None]
    with torch.no_grad():
        logits = network.head.logits(network(x, told, layout())[0])
    assert torch.equal(logits[:, 2].argmax(dim=-1), tokens[:, 0, 2].flatten(1))


@pytest.mark.parametrize("kind", ROLLOUTS)
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    network, context = make("bov"), start(3, 1)
    together = rolled(network, ROLLOUTS[kind](), context, Conditions(), 3, key(3))
    for row in range(3):
        alone = rolled(network, ROLLOUTS[kind](), context[row : row + 1], Conditions(), 3, NoiseKey(3, (row,)))
        assert torch.equal(alone[0], together[row])
    again = rolled(network, ROLLOUTS[kind](), context, Conditions(), 3, key(3, seed=4))
    assert not torch.equal(again, together)


@pytest.mark.parametrize("kind", ROLLOUTS)
def test_several_views_and_a_start_from_nothing(kind: str) -> None:
    network = make("bov")
    tokens = rolled(network, ROLLOUTS[kind](), start(2, 1, views=2)[:, :, :0], Conditions(), 3, key(2))
    assert tokens.shape == (2, 2, 3, 4, 4)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < VOCAB
    assert len(tokens.unique()) > 20


@pytest.mark.parametrize("kind", ROLLOUTS)
def test_beyond_the_trained_length(kind: str) -> None:
    """Every window starts from what `restart` returns, with conditions of its own, and draws go on."""
    network, asked, restarts = make("additive"), [], []

    def told(window: int) -> Conditions:
        asked.append(window)
        return conditions("additive", 2, seed=window)

    def restart(window: Tensor) -> Tensor:
        assert window.shape == (2, 1, 3, 4, 4)
        restarts.append(window)
        return (window[:, :, 1:] + 1) % VOCAB

    frames = list(ROLLOUTS[kind](temperature=0.0)(network, start(2), told, 6, key(2), restart=restart))
    assert [frame.window for frame in frames] == [0, 0, 0, 1, 2, 3]
    assert asked == [0, 1, 2, 3]
    assert [frame.start is not None for frame in frames] == [False, False, False, True, True, True]
    for frame, window in zip(frames[3:], restarts, strict=True):
        assert frame.start is not None
        assert torch.equal(frame.start, (window[:, :, 1:] + 1) % VOCAB)
        alone = rolled(
            network,
            ROLLOUTS[kind](temperature=0.0),
            frame.start,
            conditions("additive", 2, seed=frame.window),
            3,
            key(2),
        )
        assert torch.equal(alone[:, :, 2], frame.tokens)
    assert torch.equal(restarts[1][:, :, 2], frames[3].tokens)
    assert not torch.equal(frames[3].tokens, frames[4].tokens)


def test_truth_is_scored_after_the_sampled_prefix() -> None:
    network, truth = make("bov"), start(2, 3, 1)
    frames = list(TokenRollout(top_p=0.5)(network, truth[:, :, :1], Conditions(), 3, key(2), truth=truth))
    tokens = torch.stack([frame.tokens for frame in frames], dim=2)
    with torch.no_grad():
        hidden, _ = network(tokens.transpose(1, 2)[:, :, :, None], Conditions(), layout())
        expected = network.head.log_probs_of(hidden, truth.transpose(1, 2).flatten(2))
    assert frames[0].log_probs is None
    for k in (1, 2):
        scores = frames[k].log_probs
        assert scores is not None
        assert torch.allclose(scores[:, 0].flatten(1), expected[:, k], atol=1e-4)
    # the first token of a prediction is teacher-forced by construction
    with torch.no_grad():
        teacher, _ = network(truth.transpose(1, 2)[:, :, :, None], Conditions(), layout())
    forced = network.head.log_probs_of(teacher, truth.transpose(1, 2).flatten(2))
    assert torch.allclose(frames[1].log_probs[:, 0, 0, 0], forced[:, 1, 0], atol=1e-4)  # type: ignore[index]


def test_stats_count_passes() -> None:
    network = make("base")
    stream = TokenRollout()(network, start(2), Conditions(), 3, key(2))
    list(stream)
    assert (stream.stats.tokens, stream.stats.passes) == (32, 30)  # the first token comes from the prefill
    stream = JacobiRollout(temperature=0.0, window=4)(network, start(2), Conditions(), 3, key(2))
    list(stream)
    assert stream.stats.tokens == 32
    assert 8 <= stream.stats.passes <= 32


def test_bad_requests_are_named() -> None:
    base = make("base")
    rollout = TokenRollout()
    with pytest.raises(ConfigError, match="begin-of-video"):
        rollout(base, start(1)[:, :, :0], Conditions(), 3, key(1))
    with pytest.raises(ConfigError, match="num_frames"):
        rollout(base, start(1), Conditions(), 4, key(1))
    with pytest.raises(ConfigError, match="num_context_frames"):
        rollout(base, start(1, 3), Conditions(), 4, key(1), restart=lambda window: window)
    with pytest.raises(DataError, match="vocabulary"):
        rollout(base, start(1) + VOCAB, Conditions(), 3, key(1))
    with pytest.raises(ConfigError, match="grid"):
        rollout(base, start(1)[..., :2], Conditions(), 3, key(1))
    with pytest.raises(ConfigError, match="scored"):
        JacobiRollout()(base, start(1), Conditions(), 3, key(1), truth=start(1, 3))
    with pytest.raises(ConfigError, match="rollout.window"):
        JacobiRollout(window=1)
    with pytest.raises(ConfigError, match="rollout.draft"):
        JacobiRollout(draft="left")  # type: ignore[arg-type]
