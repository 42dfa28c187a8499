"""Rollout of a token model, latent frame after latent frame, as long as one likes.

    window 0    given given new     the trained length; tokens one by one, from a cache
    window 1          start start new     start = the last pixel frames of window 0, decoded and encoded again as a
    window 2                start start new     causal start; the cache is emptied and time begins at 0 again

A draw is a pure function of (seed, sample, latent frame of the result, view, token): the other samples of a batch, what
was drawn before and how the windows lie do not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.token_decode import PackedWeights, TokenDecoder
from longtake.networks.token_transformer import TokenTransformer
from longtake.rollout.noise import Draws, NoiseKey, uniform
from longtake.rollout.sampling import Nucleus, Sampler
from longtake.types import Conditions

WindowConditions = Conditions | Callable[[int], Conditions]
Restart = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LatentFrame:
    """One latent frame of a rollout.

    Attributes:
        index: in the result; the starts of later windows do not count.
        window: which window it belongs to.
        tokens: codes, int64 [b v h w].
        given: whether it was given at the start of the rollout.
        start: for the first frame of a later window, the codes that the window starts from, [b v t h w]: decode them
            first, and leave their pixels out; else None.
        log_probs: with `truth`, the log-probability in nats of its tokens after the sampled ones before them, at
            temperature 1 and without any cut, float32 [b v h w]; None for given frames and without `truth`.
    """

    index: int
    window: int
    tokens: Tensor
    given: bool
    start: Tensor | None = None
    log_probs: Tensor | None = None


@dataclass
class DecodeStats:
    """What a rollout has done so far.

    Attributes:
        tokens: tokens generated, of all samples.
        passes: passes of the network times samples, the reading of starts not counted.
    """

    tokens: int = 0
    passes: int = 0

    @property
    def passes_per_token(self) -> float:
        """1 for plain decoding, less for a speculative one."""
        return self.passes / max(1, self.tokens)


@dataclass
class Window:
    """One window under way: what generators of tokens work on.

    Attributes:
        decoder: reads tokens; empty at first.
        tokens: codes of the window in raster order [b n]; those from `given` on are filled in.
        given: how many are given.
        frame: tokens of a latent frame, all views.
        uniforms: (latent of the window, repeats) -> numbers in (0, 1), float64 [b repeats frame].
        truth: codes to score, as `tokens`; None: nothing is scored.
        log_probs: what they scored, float32 [b n]; None without `truth`.
    """

    decoder: TokenDecoder
    tokens: Tensor
    given: int
    frame: int
    uniforms: Callable[[int, int], Tensor]
    truth: Tensor | None = None
    log_probs: Tensor | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)


class TokenRollout:
    """Samples token after token.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: mass of the nucleus, in (0, 1].
        top_k: how many tokens are kept before that; None: all.

    Raises:
        ConfigError: a value outside of these.
    """

    kind = "tokens"
    scores_truth = True

    def __init__(self, *, temperature: float = 1.0, top_p: float = 0.8, top_k: int | None = None) -> None:
        self.sampler = Sampler(temperature, top_p, top_k)

    def __call__(
        self,
        network: TokenTransformer,
        context: Tensor,
        conditions: WindowConditions,
        num_lat: int,
        key: NoiseKey,
        *,
        restart: Restart | None = None,
        truth: Tensor | None = None,
        packed: PackedWeights | None = None,
    ) -> TokenStream:
        """Returns the latent frames from the first one on, those given included, as an iterator.

        Args:
            network: in evaluation mode.
            context: codes of the start, int64 [b v t h w]; t = 0 starts from nothing (networks with BOV only).
            conditions: of the trained number of latents; or a function that returns those of one window.
            num_lat: latent frames of the result.
            key: names the draws, one sample an entry of the batch.
            restart: from the codes of a full window [b v t h w] to those that the next one starts from (its last pixel
                frames decoded and encoded again); needed beyond the trained length.
            truth: codes to score along the way, [b v num_lat h w]; within the trained length only.
            packed: from `network.pack()`, where it is used for several rollouts; None: made here.

        Raises:
            ConfigError: a start, a length or a grid that the weights were not trained for.
            DataError: a code outside of the vocabulary.
        """
        return TokenStream(self, network, context, conditions, num_lat, key, restart, truth, packed)

    def latents(self, window: Window) -> Iterator[int]:
        """Fills in the window's tokens; yields each latent frame's index as soon as it is complete."""
        decoder, first = window.decoder, window.given
        hidden = decoder.prefill(window.tokens[:, :first])
        uniforms = torch.empty(0)
        for place in range(first, window.tokens.shape[1]):
            latent, offset = divmod(place, window.frame)
            if offset == 0:
                uniforms = window.uniforms(latent, 1)[:, 0].to(hidden.device)
            if place > first:
                hidden = decoder.step(window.tokens[:, place - 1 : place])[:, 0]
                window.stats.passes += len(hidden)
            window.tokens[:, place] = self.distributions(decoder, hidden).pick(uniforms[:, offset])
            window.stats.tokens += len(hidden)
            if window.truth is not None and window.log_probs is not None:
                head = decoder.network.head
                window.log_probs[:, place] = head.log_probs_of(hidden, window.truth[:, place])
            if offset == window.frame - 1:
                yield latent

    def distributions(self, decoder: TokenDecoder, hidden: Tensor) -> Nucleus:
        """Returns the distributions that tokens are drawn from, after hidden states [n d]."""
        factors = decoder.network.head.factor_logits(hidden)
        if factors is not None and len(factors) == 2:
            return self.sampler.truncated_product(*factors)
        return self.sampler.truncated(decoder.logits(hidden))


class TokenStream(Iterator[LatentFrame]):
    """A rollout under way. Nothing of it is held but the present window.

    Attributes:
        stats: passes and tokens so far.
    """

    def __init__(
        self,
        rollout: TokenRollout,
        network: TokenTransformer,
        context: Tensor,
        conditions: WindowConditions,
        num_lat: int,
        key: NoiseKey,
        restart: Restart | None,
        truth: Tensor | None,
        packed: PackedWeights | None,
    ) -> None:
        b, _, given, *_ = context.shape
        assert len(key) == b, f"{len(key)} noise keys for a batch of {b}"
        _check(network, given, num_lat, restart)
        if truth is not None and (not rollout.scores_truth or num_lat > network.grid_lat[0]):
            raise ConfigError(
                f"tokens are scored along a rollout of {num_lat} latent frames; expected plain decoding of at most "
                f"{network.grid_lat[0]}. Change `rollout` to tokens, or lower `num_frames`."
            )
        network.check(context)
        self.stats = DecodeStats()
        self._rollout, self._network, self._conditions = rollout, network, conditions
        self._num_lat, self._key, self._restart, self._truth = num_lat, key, restart, truth
        self._packed = packed if packed is not None else network.pack()
        self._frames = self._run(context)

    def __next__(self) -> LatentFrame:
        with torch.inference_mode():
            return next(self._frames)

    def _run(self, context: Tensor) -> Iterator[LatentFrame]:
        given = min(context.shape[2], self._num_lat)
        for index in range(given):
            yield LatentFrame(index, 0, context[:, :, index], given=True)
        index, number, start = given, 0, None
        while index < self._num_lat:
            lead = context.shape[2]
            window = self._window(number, context, min(self._network.grid_lat[0], lead + self._num_lat - index), index)
            for latent in self._rollout.latents(window):
                tokens = self._grid(window.tokens, context)[:, :, latent]
                scores = None
                if window.log_probs is not None:
                    scores = self._grid(window.log_probs, context)[:, :, latent].clone()
                yield LatentFrame(index, number, tokens.clone(), False, start, scores)
                index, start = index + 1, None
            if index < self._num_lat:
                assert self._restart is not None
                context = self._restart(self._grid(window.tokens, context).clone())
                self._network.check(context)
                _check(self._network, context.shape[2], self._num_lat, self._restart)
                number, start = number + 1, context

    def _window(self, number: int, context: Tensor, num_lat: int, index: int) -> Window:
        """Returns a window of `num_lat` latents; its first new one is frame `index` of the result."""
        b, views, lead, height, width = context.shape
        network, source = self._network, self._conditions
        told = source if isinstance(source, Conditions) else source(number)
        decoder = network.decoder(told, batch=b, num_lat=num_lat, views=views, packed=self._packed)
        frame = views * height * width
        tokens = context.new_zeros(b, num_lat * frame)
        tokens[:, : lead * frame] = context.transpose(1, 2).flatten(1)

        def uniforms(latent: int, repeats: int) -> Tensor:
            draws = Draws([index + latent - lead] * repeats, range(repeats), views)
            return uniform(self._key, "tokens", draws, (height * width,)).flatten(2)

        truth = None if self._truth is None else self._truth[:, :, :num_lat].transpose(1, 2).flatten(1)
        scores = None if truth is None else torch.zeros(truth.shape, device=truth.device)
        return Window(decoder, tokens, lead * frame, frame, uniforms, truth, scores, self.stats)

    def _grid(self, values: Tensor, like: Tensor) -> Tensor:
        """Returns raster values [b n] as [b v t h w]."""
        b, views, _, height, width = like.shape
        return values.view(b, -1, views, height, width).transpose(1, 2)


def _check(network: TokenTransformer, given: int, num_lat: int, restart: Restart | None) -> None:
    trained = network.grid_lat[0]
    if given == 0 and not network.bov:
        raise ConfigError(
            "a rollout from nothing needs a network with a begin-of-video token; expected a start of at least one "
            "frame. Change `num_context_frames` or `network.bov`."
        )
    if num_lat > given >= trained:
        raise ConfigError(
            f"the start has {given} latent frames, and the weights were trained on {trained} in all; expected a "
            "shorter start. Change `num_context_frames`."
        )
    if num_lat > trained and restart is None:
        raise ConfigError(
            f"{num_lat} latent frames were asked for, and the weights were trained on {trained}; without a video "
            "tokenizer that encodes the last frames again, expected at most that. Change `num_frames`."
        )
