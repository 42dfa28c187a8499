"""What a token model has to beat: uniform, unigram, bigram and copy-previous, as strong as the training data make them.

All are proper distributions over the whole vocabulary, fitted on training clips at the latents that are scored, with
every smoothing constant chosen by leave-one-out likelihood on the same clips; nothing is fitted on what is measured.

`uniform`        1 / V
`unigram`        u(x) = (n(x) + alpha) / (N + alpha V)
`bigram`         given y, the token at the same place of the latent before: (n(y, x) + beta u(x)) / (n(y) + beta)
`bigram_raster`  the same given the token before in raster order (before the first one: the last of the latent before)
`copy_previous`  a [x = y] + (1 - a) u(x), y as for `bigram`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("uniform", "unigram", "bigram", "bigram_raster", "copy_previous")
_POWERS = range(-20, 17)  # of 2, for smoothing constants
_COARSE = 4
_EM_STEPS = 100


class TokenBaselines:
    """Collects training tokens, is fitted once, and then scores clips.

    Args:
        vocab_size: tokens are 0 to vocab_size - 1.
        first_lat: first latent that is scored, 1 or more; those before are given.
    """

    def __init__(self, vocab_size: int, first_lat: int) -> None:
        if first_lat < 1:
            raise ValueError(
                f"latents are scored from {first_lat} on; expected 1 or more, since a bigram needs one before"
            )
        self.vocab_size, self.first_lat = vocab_size, first_lat
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._unigram: _Unigram | None = None
        self._same: _Bigram | None = None
        self._raster: _Bigram | None = None
        self._copy = 0.0

    def update(self, tokens: Tensor) -> None:
        """Adds training clips, int [b v t h w]."""
        assert self._unigram is None, "the baselines are fitted already"
        self._seen.append(tuple(part.flatten() for part in self._parts(tokens)))  # type: ignore[arg-type]

    def fit(self) -> dict[str, float]:
        """Fits all constants and returns them, with the number of tokens that they are fitted on.

        Raises:
            ValueError: fewer than two training tokens.
        """
        if sum(len(x) for x, _, _ in self._seen) < 2:
            raise ValueError("the baselines have no training tokens; expected clips of more latents than are given")
        x, same, before = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen = []
        self._unigram = _Unigram.fit(x, self.vocab_size)
        self._same = _Bigram.fit(same, x, self._unigram)
        self._raster = _Bigram.fit(before, x, self._unigram)
        self._copy = _fit_copy(x == same, self._unigram.left_out(x))
        return {
            "tokens": float(len(x)),
            "unigram_alpha": self._unigram.alpha,
            "bigram_beta": self._same.beta,
            "bigram_raster_beta": self._raster.beta,
            "copy_share": self._copy,
        }

    def nats(self, tokens: Tensor) -> dict[str, Tensor]:
        """Returns -log p of every scored token under each baseline, float64 [b v t' h w] with t' = t - first_lat."""
        assert self._unigram is not None, "fit() comes first"
        assert self._same is not None
        assert self._raster is not None
        x, same, before = self._parts(tokens)
        unigram = self._unigram.probability(x)
        return {
            "uniform": torch.full(x.shape, math.log(self.vocab_size), dtype=torch.float64),
            "unigram": -unigram.log(),
            "bigram": -self._same.probability(same, x, unigram).log(),
            "bigram_raster": -self._raster.probability(before, x, unigram).log(),
            "copy_previous": -(self._copy * (x == same).double() + (1 - self._copy) * unigram).log(),
        }

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scored tokens, those at the same place one latent before, and those before in raster order."""
        tokens = tokens.detach().cpu().long()
        shape = tokens[:, :, self.first_lat :].shape
        flat = tokens.flatten(2)
        skipped = self.first_lat * tokens.shape[3] * tokens.shape[4]
        before = flat[:, :, skipped - 1 : -1].reshape(shape)
        return tokens[:, :, self.first_lat :], tokens[:, :, self.first_lat - 1 : -1], before


@dataclass
class _Unigram:
    counts: Tensor  # [V] float64
    alpha: float

    @classmethod
    def fit(cls, x: Tensor, vocab_size: int) -> _Unigram:
        counts = torch.bincount(x, minlength=vocab_size).double()
        used = counts[counts > 0]

        def log_likelihood(alpha: float) -> float:
            """Every token predicted from all others."""
            return float((used * ((used - 1 + alpha) / (used.sum() - 1 + alpha * vocab_size)).log()).sum())

        return cls(counts, _best_constant(log_likelihood))

    def probability(self, x: Tensor) -> Tensor:
        return (self.counts[x] + self.alpha) / (self.counts.sum() + self.alpha * len(self.counts))

    def left_out(self, x: Tensor) -> Tensor:
        """Returns the probability of training tokens, each without itself."""
        return (self.counts[x] - 1 + self.alpha) / (self.counts.sum() - 1 + self.alpha * len(self.counts))


@dataclass
class _Bigram:
    pairs: Tensor  # y * V + x of the pairs that were seen, sorted
    counts: Tensor  # of these pairs, float64
    totals: Tensor  # of each y, [V] float64
    beta: float

    @classmethod
    def fit(cls, y: Tensor, x: Tensor, unigram: _Unigram) -> _Bigram:
        vocab_size = len(unigram.counts)
        pairs, counts = torch.unique(y * vocab_size + x, return_counts=True)
        counts = counts.double()
        totals = torch.bincount(y, minlength=vocab_size).double()
        base, total = unigram.left_out(pairs % vocab_size), totals[pairs // vocab_size]

        def log_likelihood(beta: float) -> float:
            """Every pair predicted from all others."""
            return float((counts * ((counts - 1 + beta * base) / (total - 1 + beta)).log()).sum())

        return cls(pairs, counts, totals, _best_constant(log_likelihood))

    def probability(self, y: Tensor, x: Tensor, base: Tensor) -> Tensor:
        wanted = y * len(self.totals) + x
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        seen = torch.where(self.pairs[place] == wanted, self.counts[place], 0.0)
        return (seen + self.beta * base) / (self.totals[y] + self.beta)


def _best_constant(log_likelihood: Callable[[float], float]) -> float:
    """Returns the power of 2 where a likelihood with one peak is highest: first every fourth, then those around it."""
    coarse = max(_POWERS[::_COARSE], key=lambda power: log_likelihood(2.0**power))
    fine = range(max(coarse - _COARSE + 1, _POWERS[0]), min(coarse + _COARSE, _POWERS[-1] + 1))
    return 2.0 ** max(fine, key=lambda power: log_likelihood(2.0**power))


def _fit_copy(is_copy: Tensor, base: Tensor) -> float:
    """Returns the share `a` of copies by expectation maximisation, with one copy and one other token added to the data.

    Args:
        is_copy: whether each training token equals the one before, bool [n].
        base: its probability otherwise, [n].
    """
    share, hits = 0.5, base[is_copy]
    for _ in range(_EM_STEPS):
        copied = (share / (share + (1 - share) * hits)).sum()
        share = float((copied + 1) / (len(is_copy) + 2))
    return share
