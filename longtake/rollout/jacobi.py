"""Lossless speculative decoding of tokens: Jacobi iteration with maximal coupling.

Teng et al. 2024, "Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi
Decoding", with the coupling of MC-SJD. A window of n places after the last final token holds guesses x_j and the
distributions q_j that they were drawn from. One causal pass over the guesses gives new distributions p_j. Every guess
is kept with probability min(1, p_j(x_j) / q_j(x_j)), else drawn from max(p_j - q_j, 0): so it is now a draw from p_j,
and changed as rarely as any such rule can. The places up to the first changed one, this one included, are final.

Why nothing is lost: place j uses random numbers of its own, and what happens at the places before j never depends on
it. Given their whole history x_j is always a draw from q_j, and when they are all final q_j is the true distribution.
A new place starts from the same place of the previous latent frame, drawn from a distribution that holds nothing else.

Deviations: the released code draws rejected guesses afresh (no coupling), which changes more of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice
from longtake.rollout.sampling import Nucleus, picked
from longtake.rollout.tokens import TokenRollout, Window

Draft = Literal["previous", "above"]

CANDIDATES = 8  # draws that are tried for a rejected guess before its residual distribution is written out
NUMBERS = 2 * CANDIDATES + 2  # random numbers of a place in a pass
FIRST_REPEATS = 8  # passes that numbers are drawn for at first


class JacobiRollout(TokenRollout):
    """Samples from the same distribution as `TokenRollout` in fewer passes.

    Args:
        temperature: as for `TokenRollout`.
        top_p: as for `TokenRollout`.
        top_k: as for `TokenRollout`.
        window: guesses that one pass checks.
        draft: where first guesses come from: "previous" latent frame, or the row "above".

    Raises:
        ConfigError: a value outside of these.
    """

    scores_truth = False

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_p: float = 0.8,
        top_k: int | None = None,
        window: int = 24,
        draft: Draft = "previous",
    ) -> None:
        super().__init__(temperature=temperature, top_p=top_p, top_k=top_k)
        if window < 2:
            raise ConfigError(f"rollout.window is {window}; expected 2 guesses or more. Change `rollout.window`.")
        if draft not in ("previous", "above"):
            raise unknown_choice("kind of draft", draft, ("previous", "above"), "rollout.draft")
        self.window, self.draft = window, draft

    def latents(self, window: Window) -> Iterator[int]:
        """Fills in the window's tokens; yields each latent frame's index as soon as it is complete."""
        guesses = _Guesses(self, window)
        done = window.given // window.frame
        while done * window.frame < window.tokens.shape[1]:
            guesses.iterate()
            while (done + 1) * window.frame <= min(guesses.final):
                yield done
                done += 1

    def keeps(self, p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
        """Returns whether guesses of probability q, now p, are kept: with probability min(1, p / q)."""
        return uniform * q < p


class _Guesses:
    """The moving window of one batch."""

    def __init__(self, rollout: JacobiRollout, window: Window) -> None:
        self.rollout, self.w = rollout, window
        b, self.end = window.tokens.shape
        network = window.decoder.network
        self.bov = int(network.bov)
        self.final = [window.given] * b
        self.size = min(rollout.window, self.end - window.given)
        device = window.tokens.device
        self.guessed = torch.full((b, 1), window.given, device=device)  # places before these hold a token or a guess
        self.drawn = _Drawn(None, self.guessed, 0)  # by the last pass; later guesses are copies
        self.chance = torch.ones(b, self.end, dtype=torch.float64, device=device)  # q of each guess
        self.repeat = torch.zeros(b, self.end, dtype=torch.int64, device=device)  # passes that drew each place
        self.numbers = _Numbers(window, self.size)
        # the last given token (or BOV) is read by the first pass
        self.tokens = torch.cat((window.tokens.new_full((b, self.bov), network.vocab_size), window.tokens), dim=1)
        if window.given > 1 or (window.given == 1 and self.bov):
            window.decoder.prefill(window.tokens[:, : window.given - 1])

    def iterate(self) -> None:
        """Runs one pass and lets every sample keep what it can."""
        n = min(self.size, self.end - min(self.final))
        starts = [min(final, self.end - n) for final in self.final]  # near the end final tokens are read once more
        first = torch.tensor(starts, device=self.tokens.device)[:, None]
        places = first + torch.arange(n, device=first.device)
        self._guess(places)
        decoder, stats = self.w.decoder, self.w.stats
        decoder.truncate([start - 1 + self.bov for start in starts])
        hidden = decoder.step(self.tokens.gather(1, places - 1 + self.bov))
        p = self.rollout.distributions(decoder, hidden.flatten(0, 1))
        kept = self._couple(p, places)
        self.drawn = _Drawn(p, first, n)
        leading = kept.long().cumprod(dim=1).sum(dim=1).tolist()
        before = sum(self.final)
        stats.passes += sum(final < self.end for final in self.final)
        self.final = [min(start + min(count + 1, n), self.end) for start, count in zip(starts, leading, strict=True)]
        stats.tokens += sum(self.final) - before
        self.w.tokens.copy_(self.tokens[:, self.bov :])

    def _guess(self, places: Tensor) -> None:
        """Gives places that are new to the window their first guess: what lies one latent frame (or row) before."""
        back = self.w.frame if self.rollout.draft == "previous" else self.w.decoder.grid.width
        source = places - back * ((places - self.guessed).clamp(min=0) // back + 1)  # that has a token or a guess
        source = torch.where(source < 0, places[:, :1] - 1, source)
        codes = self.tokens.gather(1, source + self.bov)
        codes = torch.where(codes < self.w.decoder.network.vocab_size, codes, 0)  # BOV is no code
        where = places + self.bov
        self.tokens.scatter_(1, where, torch.where(places >= self.guessed, codes, self.tokens.gather(1, where)))
        self.guessed = torch.maximum(self.guessed, places[:, -1:] + 1)

    def _couple(self, p: Nucleus, places: Tensor) -> Tensor:
        """Draws the places anew, so that guesses drawn from q are draws from p and change as rarely as can be.

        Returns:
            Whether each stayed as it was, bool [b n].
        """
        where = places + self.bov
        old, q_old = self.tokens.gather(1, where), self.chance.gather(1, places)
        numbers = self.numbers(places, self.repeat.gather(1, places))
        self.repeat.scatter_add_(1, places, torch.ones_like(places))
        p_old = p.prob_of(old.flatten()).double().view_as(q_old)
        is_final = places < torch.tensor(self.final, device=places.device)[:, None]
        kept = self.rollout.keeps(p_old, q_old, numbers[..., 0]) | is_final
        new, p_new = old.flatten().clone(), p_old.flatten().clone()
        rejected = (~kept).flatten().nonzero().squeeze(-1)
        if len(rejected):
            sample, place = rejected // places.shape[1], places.flatten().index_select(0, rejected)
            q = self.drawn.before(sample, place, new.index_select(0, rejected))
            rows = p.rows(rejected)
            vocab = self.w.decoder.network.vocab_size
            codes = residual_draw(rows, q, numbers.flatten(0, 1).index_select(0, rejected)[:, 1:], vocab)
            new[rejected], p_new[rejected] = codes, rows.prob_of(codes).double()
        self.tokens.scatter_(1, where, new.view_as(old))
        self.chance.scatter_(1, places, p_new.view_as(p_old))
        return kept


@dataclass(frozen=True)
class _Drawn:
    """What the guesses of the last pass were drawn from: rows of `p`, for `count` places from `first` [b 1] on."""

    p: Nucleus | None
    first: Tensor
    count: int

    def before(self, sample: Tensor, place: Tensor, codes: Tensor) -> Before:
        """Returns q of some places of some samples, whose guesses are `codes`; all [m]."""
        offset = place - self.first.flatten().index_select(0, sample)
        is_copy = offset >= self.count
        rows = None if self.p is None else self.p.rows(sample * self.count + offset.clamp(max=self.count - 1))
        return Before(rows, is_copy, codes)


@dataclass(frozen=True)
class Before:
    """Distributions q of m guesses; that of a copy holds nothing else."""

    rows: Nucleus | None
    is_copy: Tensor
    codes: Tensor

    def prob_of(self, codes: Tensor) -> Tensor:
        """Returns the probabilities of codes [m k]."""
        copied = (codes == self.codes[:, None]).double()
        return copied if self.rows is None else torch.where(self.is_copy[:, None], copied, self.rows.prob_of(codes))

    def dense(self, index: Tensor, vocab: int) -> Tensor:
        """Returns the probabilities of all codes of some rows [m' vocab]."""
        copied = F.one_hot(self.codes[index], vocab).double()
        if self.rows is None:
            return copied
        return torch.where(self.is_copy[index, None], copied, self.rows.rows(index).dense(vocab).double())


def residual_draw(p: Nucleus, q: Before, numbers: Tensor, vocab: int) -> Tensor:
    """Returns draws from max(p - q, 0), normalised, int64 [m].

    A draw from p that is kept with probability max(1 - q/p, 0) is one. A few are tried; where none is kept, the
    residual is written out.

    Args:
        p: m rows.
        q: what was rejected, of these rows.
        numbers: uniform in (0, 1), float64 [m 2 x CANDIDATES + 1].
        vocab: number of codes.
    """
    codes = p.pick(numbers[:, :CANDIDATES])
    keep = numbers[:, CANDIDATES:-1] * p.prob_of(codes) >= q.prob_of(codes)
    found = keep.any(dim=-1)
    drawn = codes.gather(1, keep.to(torch.uint8).argmax(dim=-1, keepdim=True)).squeeze(1)
    missing = (~found).nonzero().squeeze(-1)
    if len(missing):
        probs = p.rows(missing).dense(vocab).double()
        left = (probs - q.dense(missing, vocab)).clamp(min=0)
        empty = left.sum(dim=-1, keepdim=True) <= 0  # p = q up to rounding: then any draw from p will do
        drawn[missing] = picked(torch.where(empty, probs, left), numbers[missing, -1])
    return drawn


class _Numbers:
    """Random numbers of places and passes: the same for a place whatever the other places and samples do."""

    def __init__(self, window: Window, most: int) -> None:
        self.w, self.most = window, most  # passes that can draw a place
        self.first = window.given // window.frame
        self.repeats = min(most, FIRST_REPEATS)
        self.table = torch.empty(len(window.tokens), 0, self.repeats, NUMBERS, dtype=torch.float64)

    def __call__(self, places: Tensor, repeat: Tensor) -> Tensor:
        """Returns the numbers of places [b n] that were drawn `repeat` times before, float64 [b n NUMBERS]."""
        stop = int(places[:, -1].max()) // self.w.frame + 1
        wanted = min(self.most, int(repeat.max()) + 1)
        drawn = self.first + self.table.shape[1] // self.w.frame
        if wanted > self.repeats:
            self.repeats, drawn = min(self.most, 2 * self.repeats), self.first
        if stop > drawn:
            kept = [] if drawn == self.first else [self.table]
            stop = max(stop, self.first + self.table.shape[1] // self.w.frame)
            new = [self._of(latent).to(places.device) for latent in range(drawn, stop)]
            self.table = torch.cat([*kept, *new], dim=1)
        sample = torch.arange(len(places), device=places.device)[:, None]
        # a final token that is read again near the end asks for numbers too, and does not use them
        return self.table[sample, places - self.first * self.w.frame, repeat.clamp(max=self.most - 1)]

    def _of(self, latent: int) -> Tensor:
        numbers = self.w.uniforms(latent, self.repeats * NUMBERS)  # [b (r n) frame]
        return numbers.unflatten(1, (self.repeats, NUMBERS)).permute(0, 3, 1, 2)
