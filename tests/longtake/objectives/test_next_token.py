"""Next-token objectives: what is scored, keyed draws, and own tokens that are those of a rollout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.token_head import FullHead
from longtake.networks.token_transformer import TokenTransformer
from longtake.objectives.next_token import NextToken, TemporalForcing, predicted_hidden
from longtake.rollout.noise import Draws, NoiseKey, uniform
from longtake.types import Conditions
from tests.longtake.networks.tiny_tokens import GRID, VOCAB, conditions, make

KEY = NoiseKey(3, (10, 11, 12))


def clips(b: int = 3, num_lat: int = 3, views: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (b, views, num_lat, *GRID[1:]), generator=torch.Generator().manual_seed(7))


def nats_by_hand(network: TokenTransformer, tokens: Tensor, told: Conditions, first: int) -> Tensor:
    """Returns -log p [b t h w] of one view from all logits of one pass."""
    hidden = predicted_hidden(network, tokens, told, 0)
    logits = network.head.logits(hidden)[:, 0, first:]
    return F.cross_entropy(logits.flatten(0, -2), tokens[:, 0, first:].flatten(), reduction="none").view(
        tokens[:, 0, first:].shape
    )


@pytest.mark.parametrize("name", ["base", "factorised", "chain", "additive", "action_keys"])
@pytest.mark.parametrize("context_lat", [1, 2])
def test_the_loss_is_the_cross_entropy_of_the_predicted_latents(name: str, context_lat: int) -> None:
    network, tokens, told = make(name), clips(), conditions(name, 3)
    out = NextToken(context_lat=context_lat)(network, tokens, told, KEY)
    wanted = nats_by_hand(network, tokens, told, context_lat)
    assert out.loss.item() == pytest.approx(wanted.mean().item(), abs=1e-5)
    assert out.per_chunk.tolist() == pytest.approx(wanted.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert out.logs["nll"] == out.loss


def test_context_tokens_matter_only_as_context() -> None:
    """The score of the last latent changes with what is given, but given tokens themselves are not scored."""
    network, tokens = make("base"), clips()
    out = NextToken(context_lat=2)(network, tokens, Conditions(), KEY)
    assert isinstance(network.head, FullHead)
    (gradient,) = torch.autograd.grad(out.loss, [network.head.output.weight])
    targets = set(tokens[:, :, 2].flatten().tolist())
    lifted = {row for row in range(VOCAB) if gradient[row].norm() > 0.05}
    assert lifted <= targets  # only true tokens of the last latent are pulled up


def test_the_loss_of_a_batch_is_the_mean_of_its_samples() -> None:
    network, tokens, told = make("additive"), clips(), conditions("additive", 3)
    objective = NextToken(context_lat=1, token_noise=0.5, action_dropout=0.5, z_loss=1e-3)
    whole = objective(network, tokens, told, KEY)
    parts = [
        objective(
            network,
            tokens[row : row + 1],
            told.map(lambda value, row=row: value[row : row + 1]),
            NoiseKey(3, KEY.samples[row : row + 1]),
        )
        for row in range(3)
    ]
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part in parts) / 3, abs=1e-5)
    per_chunk = torch.stack([part.per_chunk for part in parts]).mean(0)
    assert torch.allclose(whole.per_chunk, per_chunk, atol=1e-5)


def test_latents_that_are_not_real_do_not_count() -> None:
    network, tokens = make("base"), clips()
    mask = torch.ones(3, 1, 3, dtype=torch.bool)
    mask[0, :, 2] = mask[2] = False
    out = NextToken(context_lat=1)(network, tokens, Conditions(), KEY, mask=mask)
    nats = nats_by_hand(network, tokens, Conditions(), 1).mean((2, 3))
    assert out.loss.item() == pytest.approx(((nats[0, 0] + nats[1].mean()) / 2).item(), abs=1e-5)
    assert out.per_chunk.tolist() == pytest.approx([nats[:2, 0].mean().item(), nats[1, 1].item()], abs=1e-5)


def test_z_loss_adds_the_squared_logsumexp() -> None:
    network, tokens = make("base"), clips()
    plain, more = (NextToken(z_loss=z)(network, tokens, Conditions(), KEY) for z in (0.0, 0.5))
    logits = network.head.logits(predicted_hidden(network, tokens, Conditions(), 2))
    wanted = plain.loss + 0.5 * logits.logsumexp(-1).square().mean()
    assert more.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert more.logs["nll"].item() == pytest.approx(plain.loss.item(), abs=1e-6)


@pytest.mark.parametrize("source", ["clip", "vocabulary"])
def test_token_noise_replaces_inputs_by_the_sample_alone_and_keeps_the_targets(source: Any) -> None:
    objective, tokens = NextToken(token_noise=0.8, noise_from=source), clips(views=2)
    noised = objective.noised(tokens, KEY, VOCAB)
    share = (noised != tokens).float().flatten(1).mean(1)
    assert (share > 0).all()
    assert share.max() < 0.8 + 0.1
    assert len(set(share.tolist())) == 3  # a level a clip
    for row in range(3):
        alone = objective.noised(tokens[row : row + 1], NoiseKey(3, KEY.samples[row : row + 1]), VOCAB)
        assert torch.equal(alone[0], noised[row])
        if source == "clip":
            assert set(noised[row].flatten().tolist()) <= set(tokens[row].flatten().tolist())
    assert not torch.equal(objective.noised(tokens, NoiseKey(4, KEY.samples), VOCAB), noised)


def test_noised_inputs_change_the_loss_and_not_what_is_scored() -> None:
    network, tokens = make("base"), clips()
    noisy = NextToken(token_noise=1.0)
    out = noisy(network, tokens, Conditions(), KEY)
    inputs = noisy.noised(tokens, KEY, VOCAB)
    hidden = predicted_hidden(network, inputs, Conditions(), 2)
    wanted = -network.head.log_probs_of(hidden, tokens[:, :, 2:]).mean()
    assert out.loss.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_actions_are_dropped_for_whole_samples() -> None:
    network, tokens, told = make("additive"), clips(), conditions("additive", 3)
    none, some, all_of_them = (
        NextToken(action_dropout=share)(network, tokens, told, KEY).loss.item() for share in (0.0, 0.5, 1.0)
    )
    assert len({none, some, all_of_them}) == 3
    dropped = NextToken()(network, tokens, Conditions(), KEY).loss.item()
    assert all_of_them == pytest.approx(dropped, abs=1e-5)


def own_tokens_one_by_one(network: TokenTransformer, tokens: Tensor, told: Conditions) -> Tensor:
    """Returns the last latent drawn token after token, each seeing those drawn before; numbers as the objective has."""
    last = tokens.shape[2] - 1
    numbers = uniform(KEY, "own_tokens", Draws([last], [0], 1), (*GRID[1:], network.head.num_uniforms))
    numbers = numbers.transpose(1, 2)[:, :, 0].flatten(2, 4)  # [b v l n]
    own = tokens.clone()
    for place in range(GRID[1] * GRID[2]):
        hidden = predicted_hidden(network, own, told, last).flatten(2, 4)[:, :, place]
        own[:, :, last].view(*own.shape[:2], -1)[:, :, place] = network.head.draw(hidden, numbers[:, :, place])
    return own


@pytest.mark.parametrize("name", ["base", "factorised", "chain"])
def test_enough_passes_make_the_own_tokens_those_of_a_rollout(name: str) -> None:
    network, tokens = make(name), clips()
    with torch.no_grad():
        wanted = own_tokens_one_by_one(network, tokens, Conditions())
        exact = TemporalForcing(passes=GRID[1] * GRID[2])._own(network, tokens, Conditions(), KEY)
        once = TemporalForcing(passes=1)._own(network, tokens, Conditions(), KEY)
    assert torch.equal(exact, wanted)
    assert torch.equal(once[:, :, :2], tokens[:, :, :2])
    assert torch.equal(once[:, 0, 2, 0, 0], wanted[:, 0, 2, 0, 0])  # the first token is right after one pass
    assert not torch.equal(once, wanted)


def test_temporal_forcing_scores_true_tokens_after_true_earlier_latents() -> None:
    network, tokens = make("base"), clips()
    objective = TemporalForcing(context_lat=1, passes=2)
    out = objective(network, tokens, Conditions(), KEY)
    parts = []
    for latent in (1, 2):
        own = objective._own(network, tokens[:, :, : latent + 1], Conditions(), KEY)
        hidden = predicted_hidden(network, own, Conditions(), latent)
        parts.append(-network.head.log_probs_of(hidden, tokens[:, :, latent : latent + 1]).mean())
        assert not torch.equal(own[:, :, latent], tokens[:, :, latent])
    assert out.per_chunk.tolist() == pytest.approx([part.item() for part in parts], abs=1e-5)
    assert out.loss.requires_grad


def test_without_own_tokens_temporal_forcing_is_full_teacher_forcing() -> None:
    network, tokens = make("additive"), clips()
    told = conditions("additive", 3)
    full = NextToken(context_lat=1)(network, tokens, told, KEY).loss.item()
    assert TemporalForcing(share=0.0, context_lat=1)(network, tokens, told, KEY).loss.item() == pytest.approx(
        full, abs=1e-5
    )


def test_the_first_token_of_a_video_is_scored_only_after_bov() -> None:
    tokens = clips()
    out = NextToken(context_lat=0)(make("bov"), tokens, Conditions(), KEY)
    assert len(out.per_chunk) == 3
    with pytest.raises(ConfigError, match=r"objective\.context_lat is 0.*network\.bov=true"):
        NextToken(context_lat=0)(make("base"), tokens, Conditions(), KEY)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"context_lat": -1}, "context_lat"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"token_noise": 1.5}, "token_noise"),
        ({"noise_from": "nowhere"}, "noise_from"),
        ({"action_dropout": math.nan}, "action_dropout"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{key}"):
        NextToken(**settings)


@pytest.mark.parametrize("settings", [{"passes": 0}, {"share": 2.0}])
def test_passes_and_share_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.passes"):
        TemporalForcing(**settings)
