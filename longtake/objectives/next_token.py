"""Next-token prediction: cross entropy of the tokens of the predicted latents, in nats, given all tokens before them.

    inputs    c0 c0 c0 | c1 c1 c1 | t2 t2 t2        a slot is one latent frame; the first `context_lat` are given
    scored     -  -  -    -  -  -   t2 t2 t2        and not scored (c), every later one is predicted (t)

`TemporalForcing` is the same with the model's own tokens inside of the latent that is predicted: what it meets in a
rollout, given true earlier latents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.token_transformer import TokenTransformer, token_layout
from longtake.rollout.conditions import dropped
from longtake.rollout.noise import Draws, NoiseKey, uniform, uniform_of_sample
from longtake.types import Conditions, LossOutput


@dataclass(frozen=True)
class Scored:
    """What every token of the predicted latents scored.

    Attributes:
        nats: -log p of the true token, float32 [b v t h w].
        z: squared logsumexp of the logits, as `nats`.
    """

    nats: Tensor
    z: Tensor


class NextToken:
    """Cross entropy with full teacher forcing.

    Args:
        context_lat: latent frames that are given and not scored; rollouts may start from as many, or from more.
        z_loss: weight of the mean squared logsumexp of the scored tokens (Cosmos: 1e-4, there over all tokens).
        token_noise: share of input tokens that are replaced, drawn evenly from [0, this] for each clip: against
            exposure bias. What is predicted stays true.
        noise_from: replacements are other tokens of the same clip ("clip"), or any codes ("vocabulary").
        action_dropout: share of samples without actions.

    Raises:
        ConfigError: a value outside of these.
    """

    def __init__(
        self,
        *,
        context_lat: int = 2,
        z_loss: float = 0.0,
        token_noise: float = 0.0,
        noise_from: Literal["clip", "vocabulary"] = "clip",
        action_dropout: float = 0.0,
    ) -> None:
        if context_lat < 0:
            raise ConfigError(f"objective.context_lat is {context_lat}; expected 0 or more. Change it.")
        if not 0 <= z_loss < float("inf"):
            raise ConfigError(f"objective.z_loss is {z_loss}; expected 0 or more. Change `objective.z_loss`.")
        for name, share in (("token_noise", token_noise), ("action_dropout", action_dropout)):
            if not 0 <= share <= 1:
                raise ConfigError(
                    f"objective.{name} is {share}; expected a share in [0, 1]. Change `objective.{name}`."
                )
        if noise_from not in ("clip", "vocabulary"):
            raise unknown_choice("source of noise", noise_from, ("clip", "vocabulary"), "objective.noise_from")
        self.context_lat, self.z_loss = context_lat, z_loss
        self.token_noise, self.noise_from, self.action_dropout = token_noise, noise_from, action_dropout

    def __call__(
        self,
        network: TokenTransformer,
        tokens: Tensor,
        conditions: Conditions,
        key: NoiseKey,
        *,
        mask: Tensor | None = None,
    ) -> LossOutput:
        """Returns the loss of a batch.

        Args:
            network: predicts tokens.
            tokens: true codes, int64 [b v t h w].
            conditions: with the latent frames as slot axis.
            key: seed and plan position of each sample; the only thing that draws depend on.
            mask: False for latents that are not real, bool [b v t]; they are out of the loss.
        """
        assert len(key) == len(tokens), f"{len(key)} noise keys for a batch of {len(tokens)}"
        self.check_start(network.bov)
        told = self._dropped(conditions, key)
        scored = self.scored(network, tokens, self.noised(tokens, key, network.vocab_size), told, key)
        real = None if mask is None else mask[:, :, self.context_lat :]
        nll, per_latent = averaged(scored.nats, real)
        z, _ = averaged(scored.z, real)
        loss = nll + self.z_loss * z if self.z_loss > 0 else nll
        return LossOutput(loss, per_latent.detach(), {"nll": nll.detach(), "z": z.detach()})

    def check_start(self, bov: bool) -> None:
        """Raises ConfigError where the first token of a video is to be scored and nothing predicts it."""
        if self.context_lat == 0 and not bov:
            raise ConfigError(
                "objective.context_lat is 0, but the network has no begin-of-video token, so nothing predicts the "
                "first token; expected 1 or more. Change `objective.context_lat` or set network.bov=true."
            )

    def scored(
        self, network: TokenTransformer, tokens: Tensor, inputs: Tensor, conditions: Conditions, key: NoiseKey
    ) -> Scored:
        """Returns the scores of true tokens [b v t h w] after `inputs` (as `tokens`) in their places."""
        return score(network, tokens, inputs, conditions, self.context_lat)

    def noised(self, tokens: Tensor, key: NoiseKey, vocab_size: int) -> Tensor:
        """Returns the input tokens of a batch, some of them replaced."""
        if self.token_noise == 0:
            return tokens
        b, views, num_lat, height, width = tokens.shape
        draws = Draws(range(num_lat), [0] * num_lat, views)
        chance, choice = (
            rearrange(uniform(key, purpose, draws, (height, width)), "b t v 1 h w -> b v t h w")
            for purpose in ("token_noise", "token_noise_code")
        )
        level = uniform_of_sample(key, "token_noise_level").view(b, 1, 1, 1, 1) * self.token_noise
        if self.noise_from == "clip":
            place = (choice * tokens[0].numel()).long().to(tokens.device)
            other = tokens.flatten(1).gather(1, place.flatten(1)).view_as(tokens)
        else:
            other = (choice * vocab_size).long().to(tokens.device)
        return torch.where((chance < level).to(tokens.device), other, tokens)

    def _dropped(self, conditions: Conditions, key: NoiseKey) -> Conditions:
        if self.action_dropout == 0:
            return conditions
        return dropped(conditions, actions=uniform_of_sample(key, "dropout") < self.action_dropout)


class TemporalForcing(NextToken):
    """Cross entropy of true tokens after true earlier latents and the model's own tokens of this latent.

    The own tokens are drawn in parallel (Duckworth et al. 2019, "Parallel Scheduled Sampling"): a pass draws every
    token of the latent after the tokens of the pass before, the true ones at first. After n passes the first n tokens
    are exactly what a rollout would draw; so passes = tokens of a latent gives true rollouts, 1 or 2 come near.
    Every latent needs passes of its own, because later ones are to see its true tokens.

    Args:
        passes: passes without gradient before the one that is scored.
        share: of the tokens that are the model's own; the others stay true.
        **kwargs: as for `NextToken`.

    Raises:
        ConfigError: a value that makes no sense.
    """

    def __init__(
        self,
        *,
        passes: int = 1,
        share: float = 1.0,
        context_lat: int = 2,
        z_loss: float = 0.0,
        token_noise: float = 0.0,
        noise_from: Literal["clip", "vocabulary"] = "clip",
        action_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            context_lat=context_lat,
            z_loss=z_loss,
            token_noise=token_noise,
            noise_from=noise_from,
            action_dropout=action_dropout,
        )
        if passes < 1 or not 0 <= share <= 1:
            raise ConfigError(
                f"objective.passes is {passes} and objective.share is {share}; expected 1 or more, and a share in "
                "[0, 1]. Change `objective.passes` or `objective.share`."
            )
        self.passes, self.share = passes, share

    def scored(
        self, network: TokenTransformer, tokens: Tensor, inputs: Tensor, conditions: Conditions, key: NoiseKey
    ) -> Scored:
        parts = []
        for latent in range(self.context_lat, tokens.shape[2]):
            stop = slice(0, latent + 1)
            own = self._own(network, inputs[:, :, stop], conditions, key)
            parts.append(score(network, tokens[:, :, stop], own, conditions, latent))
        return Scored(*(torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("nats", "z")))

    @torch.no_grad()
    def _own(self, network: TokenTransformer, inputs: Tensor, conditions: Conditions, key: NoiseKey) -> Tensor:
        """Returns the inputs [b v t h w] with tokens of the network in their last latent."""
        _, views, num_lat, height, width = inputs.shape
        head, last = network.head, num_lat - 1
        draws = Draws([last], [0], views)
        numbers = uniform(key, "own_tokens", draws, (height, width, head.num_uniforms)).transpose(1, 2)[:, :, 0]
        taken = uniform(key, "own_tokens_share", draws, (height, width)).transpose(1, 2)[:, :, 0] < self.share
        numbers, taken = numbers.to(inputs.device), taken.to(inputs.device)  # [b v 1 h w n], [b v 1 h w]
        own = inputs
        for _ in range(self.passes):
            drawn = head.draw(predicted_hidden(network, own, conditions, last), numbers)
            own = torch.cat([inputs[:, :, :last], torch.where(taken, drawn, inputs[:, :, last:])], dim=2)
        return own


def score(network: TokenTransformer, tokens: Tensor, inputs: Tensor, conditions: Conditions, first_lat: int) -> Scored:
    """Returns what the tokens of latents from `first_lat` on score, [b v t' h w].

    Args:
        network: predicts tokens.
        tokens: what is scored, int64 [b v t h w].
        inputs: what the network reads in their places, as `tokens`.
        conditions: with the latent frames as slot axis.
        first_lat: first latent that is scored.
    """
    hidden = predicted_hidden(network, inputs, conditions, first_lat)
    found = network.head.score(hidden, tokens[:, :, first_lat:])
    return Scored(-found.log_probs, found.z)


def predicted_hidden(network: TokenTransformer, inputs: Tensor, conditions: Conditions, first_lat: int) -> Tensor:
    """Returns what predicts every token of latents from `first_lat` on, [b v t' h w d], given the inputs before it."""
    x = rearrange(inputs, "b v t h w -> b t v 1 h w")
    _, num_lat, views, _, height, width = x.shape
    layout = token_layout(num_lat, views=views, height=height, width=width, context_lat=first_lat)
    hidden, _ = network(x, _of_latents(conditions, num_lat), layout)
    return rearrange(hidden[:, first_lat:], "b t (v h w) d -> b v t h w d", v=views, h=height, w=width)


def averaged(values: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the mean over samples of each sample's mean, and the same for each latent [t].

    Args:
        values: [b v t h w].
        real: False for latents that do not count, bool [b v t]; None: all do. Samples without any do not count.
    """
    by_frame = values.mean(dim=(3, 4))
    counted = torch.ones_like(by_frame, dtype=torch.bool) if real is None else real

    def mean(frames: Tensor, there: Tensor) -> Tensor:
        counts = there.sum(1)
        per_sample = torch.where(there, frames, 0.0).sum(1) / counts.clamp(min=1)
        return per_sample.sum(0) / (counts > 0).sum(0).clamp(min=1)

    return mean(by_frame.flatten(1), counted.flatten(1)), mean(by_frame, counted)


def _of_latents(conditions: Conditions, num_lat: int) -> Conditions:
    """Returns conditions of the first latents."""
    fields = {name: getattr(conditions, name) for name in ("actions", "actions_mask", "motion")}
    return dataclasses.replace(
        conditions, **{name: None if value is None else value[:, :num_lat] for name, value in fields.items()}
    )
