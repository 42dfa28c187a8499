"""Scores a token model on clips: cross entropies, accuracy, baselines, and what its samples look like.

What each figure means is said in `longtake.metrics.token_nll`; here they are computed side by side on the same clips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.generate_tokens import TokenModel
from longtake.geometry import pixel_frames
from longtake.metrics.baselines import copy_last
from longtake.metrics.frames import psnr, ssim, unit_frames
from longtake.metrics.token_baselines import NAMES as BASELINES
from longtake.metrics.token_baselines import TokenBaselines
from longtake.metrics.token_nll import TokenScores, over_seeds
from longtake.metrics.token_top500 import K, ce_top500_logits, ce_top500_logprobs, hits, top_of_product, top_tokens
from longtake.objectives.next_token import predicted_hidden
from longtake.rollout.noise import NoiseKey
from longtake.rollout.tokens import TokenRollout
from longtake.types import Clip, Conditions

_GIVEN_VALUE = -100.0  # log probability of what a given token is not


@dataclass(frozen=True)
class TokenClip:
    """One clip.

    Attributes:
        key: its name, which also names the draws.
        tokens: int64 [v t h w], t as the weights were trained on.
        actions: float32 [t_px a], or None.
        frames: what the tokens were made of, uint8 [v t_px h w c]; None where there are only tokens.
    """

    key: str
    tokens: np.ndarray
    actions: np.ndarray | None = None
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class TopTokens:
    """The best tokens at every place of a batch, those of given latents included (there the given one has all).

    Attributes:
        indices: int32 [b v t h w k].
        values: log probabilities, float32 of the same shape.
    """

    indices: Tensor
    values: Tensor


class TokenEvaluation:
    """Adds up figures over batches of clips.

    Args:
        model: what is scored; its rollout says how samples are drawn.
        start_lat: latents of a clip that are given.
        seeds: of the samples, 3 or more.
        baselines: fitted on training clips; None: only the uniform guess is compared.

    Raises:
        ConfigError: nothing is given, or nothing is left to predict; or too few seeds.
    """

    def __init__(
        self, model: TokenModel, *, start_lat: int, seeds: Sequence[int], baselines: TokenBaselines | None
    ) -> None:
        num_lat = model.spec.grid_lat[0]
        if not 1 <= start_lat < num_lat:
            raise ConfigError(
                f"{start_lat} latent frames are given and clips have {num_lat}; expected 1 to {num_lat - 1}. Change "
                "`num_context_frames`."
            )
        if len(set(seeds)) < 3:
            raise ConfigError(f"eval_seeds is {list(seeds)}; expected 3 different ones or more. Change `eval_seeds`.")
        self.model, self.start_lat, self.seeds, self.baselines = model, start_lat, tuple(seeds), baselines
        self._scores: dict[str, TokenScores] = {}
        self._frames: dict[str, list[float]] = {}
        self._hits_of_top: list[float] = []
        self.num_clips = 0

    @torch.no_grad()
    def add(self, clips: Sequence[TokenClip]) -> TopTokens:
        """Scores a batch and returns the best tokens at every place."""
        model, first = self.model, self.start_lat
        batch = _Batch.of(clips, model)
        self.num_clips += len(clips)
        top, hidden = self._teacher_forced(batch)
        targets = batch.tokens[:, :, first:]
        self._update("nll_full_tf", -model.network.head.log_probs_of(hidden, targets), top.indices[..., 0] == targets)
        k = {"vocab_size": model.spec.vocab_size}
        self._update("ce_top500_logits", ce_top500_logits(top.indices, top.values, targets, **k))
        self._update("ce_top500_logprobs", ce_top500_logprobs(top.indices, top.values, targets, **k))
        self._hits_of_top.append(float(hits(top.indices, targets).float().mean()) * len(clips))
        self._baselines(batch)
        if batch.clip.actions is not None and len(clips) > 1 and model.spec.action_names:
            other = dataclasses.replace(batch.clip, actions=batch.clip.actions.roll(1, dims=0))
            told = predicted_hidden(model.network, batch.tokens, self._conditions(other), first)
            self._update("nll_shuffled_actions", -model.network.head.log_probs_of(told, targets))
        greedy, _ = self._rollout(batch, TokenRollout(temperature=0), self.seeds[0])
        self._update("ce_greedy_rollout", -greedy)
        for seed in self.seeds:
            sampled, made = self._rollout(batch, self._plain(), seed)
            self._update(f"ce_sampled_prefix/{seed}", -sampled)
            self._update("ce_sampled_prefix", -sampled)
            if seed == self.seeds[0]:
                self._looks(batch, made, [clip.frames for clip in clips])
        return _with_given(batch.tokens[:, :, :first], top, model.spec.vocab_size)

    def metrics(self) -> dict[str, float | None]:
        """Returns every figure in nats a token (and bits, where the name says so), and decibels."""
        found: dict[str, float | None] = {"num_clips": float(self.num_clips), "nll_parallel": None}
        for name, scores in self._scores.items():
            if "/" in name or name == "ce_sampled_prefix":
                continue
            own = scores.metrics()
            full = name in ("nll_full_tf", "ce_greedy_rollout")
            found |= own if full else {name: own[name]}
        found["bits_per_token"] = found["nll_full_tf_bits_per_token"]
        found["accuracy"] = found.pop("nll_full_tf_accuracy")
        found |= over_seeds("ce_sampled_prefix", [self._scores[f"ce_sampled_prefix/{s}"].mean for s in self.seeds])
        found["top500_hit_share"] = sum(self._hits_of_top) / max(1, self.num_clips)
        best = min(value for name in BASELINES if (value := found.get(f"nll_{name}")) is not None)
        assert found["nll_full_tf"] is not None
        found["below_best_baseline"] = best - found["nll_full_tf"]
        return {**found, **{name: float(np.mean(values)) for name, values in self._frames.items()}}

    def curves(self) -> dict[str, Any]:
        """Returns nats a token by latent frame and by place of the raster."""
        return {
            name: {
                "per_latent": {str(k): v for k, v in scores.per_latent().items()},
                "per_position": scores.per_position(),
            }
            for name, scores in self._scores.items()
            if "/" not in name
        }

    def _teacher_forced(self, batch: _Batch) -> tuple[TopTokens, Tensor]:
        """Returns the best tokens of predicted latents and the hidden states, given all true tokens before."""
        network = self.model.network
        hidden = predicted_hidden(network, batch.tokens, self._conditions(batch.clip), self.start_lat)
        k = min(K, self.model.spec.vocab_size)
        return TopTokens(*_best(network.head, hidden, k)), hidden

    def _conditions(self, clip: Clip) -> Conditions:
        return self.model.conditions(clip, self.model.spec.grid_lat[0])

    def _plain(self) -> TokenRollout:
        """Returns plain decoding that draws as the model's rollout does (speculation does not change what is drawn)."""
        sampler = self.model.rollout.sampler
        return TokenRollout(temperature=sampler.temperature, top_p=sampler.top_p, top_k=sampler.top_k)

    def _rollout(self, batch: _Batch, rollout: TokenRollout, seed: int) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities of the true tokens of predicted latents, and the whole clip with drawn ones."""
        latents = list(
            rollout(
                self.model.network,
                batch.tokens[:, :, : self.start_lat],
                self._conditions(batch.clip),
                batch.tokens.shape[2],
                NoiseKey(seed, tuple(batch.clip.key)),
                truth=batch.tokens,
                packed=self.model.packed,
            )
        )
        scores = [latent.log_probs for latent in latents if latent.log_probs is not None]
        return torch.stack(scores, dim=2), torch.stack([latent.tokens for latent in latents], dim=2)

    def _baselines(self, batch: _Batch) -> None:
        if self.baselines is None:
            count = float(np.log(self.model.spec.vocab_size))
            self._update("nll_uniform", torch.full(batch.tokens[:, :, self.start_lat :].shape, count))
            return
        for name, nats in self.baselines.nats(batch.tokens).items():
            self._update(f"nll_{name}", nats)

    def _looks(self, batch: _Batch, made: Tensor, raw: Sequence[np.ndarray | None]) -> None:
        """Compares the predicted frames with the decoded true tokens, and with the frames that these are made of."""
        model = self.model
        if model.video_encoder is None:
            return
        given = pixel_frames(self.start_lat, model.spec.trained_for.ratio)
        decoded, true = (unit_frames(model.frames_of(tokens)).flatten(0, 1) for tokens in (made, batch.tokens))
        self._compare("decoded_truth", decoded[:, given:], true[:, given:])
        copied = copy_last(true[:, given - 1 : given], true.shape[1] - given)
        self._compare("decoded_truth_copy_last", copied, true[:, given:])
        frames = [part for part in raw if part is not None]
        if len(frames) == len(raw):
            pixels = unit_frames(np.concatenate(frames))
            self._compare("raw", decoded[:, given:], pixels[:, given:])
            self._compare("tokenizer_ceiling", true[:, given:], pixels[:, given:])

    def _compare(self, name: str, pred: Tensor, truth: Tensor) -> None:
        self._frames.setdefault(f"psnr_{name}_db", []).extend(psnr(pred, truth).tolist())
        self._frames.setdefault(f"ssim_{name}", []).extend(ssim(pred, truth).tolist())

    def _update(self, name: str, nats: Tensor, right: Tensor | None = None) -> None:
        self._scores.setdefault(name, TokenScores(name, self.start_lat)).update(nats, right)


@dataclass(frozen=True)
class _Batch:
    tokens: Tensor
    clip: Clip = field(default_factory=Clip)

    @classmethod
    def of(cls, clips: Sequence[TokenClip], model: TokenModel) -> _Batch:
        num_lat = model.spec.grid_lat[0]
        arrays = [model.check_tokens(clip.tokens, clip.key) for clip in clips]
        short = next((clip for clip, own in zip(clips, arrays, strict=True) if own.shape[1] != num_lat), None)
        if short is not None:
            raise ConfigError(
                f"{short.key} has {short.tokens.shape[1]} latent frames; these weights are scored on {num_lat}. Change "
                "`data`, `input_tokens_dir` or `ckpt`."
            )
        tables = [clip.actions for clip in clips if clip.actions is not None]
        actions = None
        if model.spec.action_names and len(tables) == len(clips):
            actions = torch.from_numpy(np.stack(tables)).to(model.device)
        tokens = torch.from_numpy(np.stack(arrays)).to(model.device)
        told = Clip(
            actions=actions,
            fps=torch.full((len(clips),), float(model.fps), device=model.device),
            view_ids=torch.arange(tokens.shape[1], device=model.device).expand(len(clips), -1),
            key=[clip.key for clip in clips],
        )
        return cls(tokens, dataclasses.replace(told, **model.text_fields([""] * len(clips))))


def _best(head: Any, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k best tokens, indices int32 and log probabilities [... k], without all logits where possible."""
    factors = head.factor_logits(hidden)
    if factors is not None and len(factors) == 2:
        low, high = (logits.log_softmax(dim=-1) for logits in factors)
        return top_of_product(low, high, k)
    flat = hidden.reshape(-1, hidden.shape[-1])
    parts = [top_tokens(head.logits(rows), k) for rows in flat.split(64)]
    indices, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return indices.view(*hidden.shape[:-1], k), values.view(*hidden.shape[:-1], k)


def _with_given(given: Tensor, top: TopTokens, vocab_size: int) -> TopTokens:
    """Returns the best tokens with those of given latents [b v t h w] before them, each sure of the given one."""
    k = top.indices.shape[-1]
    indices = (given.unsqueeze(-1) + torch.arange(k, device=given.device)) % vocab_size
    values = torch.full(indices.shape, _GIVEN_VALUE, device=given.device)
    values[..., 0] = 0.0
    return TopTokens(torch.cat([indices.int(), top.indices], dim=2), torch.cat([values, top.values], dim=2))
