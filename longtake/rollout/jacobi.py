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
from typing import Literal

import torch
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice
from longtake.rollout.sampling import Truncated, picked
from longtake.rollout.tokens import TokenRollout, Window

Draft = Literal["previous", "above"]


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
        window: int = 8,
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
        self.guessed = [window.given] * b  # places before these hold a token or a guess
        self.size = min(rollout.window, self.end - window.given)
        device = window.tokens.device
        self.rows = torch.arange(b, device=device)[:, None]
        # q of place j lies in row j % size, so that nothing moves when the window does
        self.q = torch.zeros(b, self.size, network.vocab_size, device=device)
        self.repeat = torch.zeros(b, self.end, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(b, 0, self.size, dtype=torch.float64, device=device)
        self.drawn = window.given // window.frame  # latents whose uniforms were drawn
        self.first_drawn = self.drawn
        # the last given token (or BOV) is read by the first pass
        self.tokens = torch.cat((window.tokens.new_full((b, self.bov), network.vocab_size), window.tokens), dim=1)
        if window.given > 1 or (window.given == 1 and self.bov):
            window.decoder.prefill(window.tokens[:, : window.given - 1])

    def iterate(self) -> None:
        """Runs one pass and lets every sample keep what it can."""
        places, starts = self._places()
        b, n = places.shape
        self._guess(places)
        decoder, stats = self.w.decoder, self.w.stats
        decoder.truncate([start - 1 + self.bov for start in starts])
        hidden = decoder.step(self.tokens.gather(1, places - 1 + self.bov))
        p = self.rollout.distributions(decoder, hidden.flatten(0, 1))
        old = self.tokens.gather(1, places + self.bov)
        is_final = places < torch.tensor(self.final, device=places.device)[:, None]
        new, kept = self._coupled(p, old, places)
        new, kept = torch.where(is_final, old, new), kept | is_final
        self.tokens.scatter_(1, places + self.bov, new)
        self._remember(p, places)
        leading = kept.long().cumprod(dim=1).sum(dim=1).tolist()
        before = sum(self.final)
        stats.passes += sum(final < self.end for final in self.final)
        self.final = [min(start + min(count + 1, n), self.end) for start, count in zip(starts, leading, strict=True)]
        stats.tokens += sum(self.final) - before
        self.w.tokens.copy_(self.tokens[:, self.bov :])

    def _places(self) -> tuple[Tensor, list[int]]:
        """Returns the places of this pass [b n]; near the end a sample reads some final tokens once more."""
        n = min(self.size, self.end - min(self.final))
        starts = [min(final, self.end - n) for final in self.final]
        first = torch.tensor(starts, device=self.tokens.device)[:, None]
        return first + torch.arange(n, device=self.tokens.device), starts

    def _guess(self, places: Tensor) -> None:
        """Gives places that are new to the window their first guess."""
        last = int(places[:, -1].max())
        back = self.w.frame if self.rollout.draft == "previous" else self.w.decoder.grid.width
        guessed = torch.tensor(self.guessed, device=places.device)[:, None]
        for part in places.split(back, dim=1):  # so that no source lies in its own part
            source = torch.where(part >= back, part - back, places[:, :1] - 1)
            codes = self.tokens.gather(1, source + self.bov)
            codes = torch.where(codes < self.q.shape[-1], codes, 0)  # BOV is no code
            row, column = torch.nonzero(part >= guessed, as_tuple=True)
            place, code = part[row, column], codes[row, column]
            self.tokens[row, place + self.bov] = code
            self.q[row, place % self.size] = 0.0
            self.q[row, place % self.size, code] = 1.0
        self.guessed = [max(old, stop + 1) for old, stop in zip(self.guessed, places[:, -1].tolist(), strict=True)]
        while self.drawn * self.w.frame <= last:
            numbers = self.w.uniforms(self.drawn, self.size).to(places.device)  # [b size frame]
            self.uniforms = torch.cat((self.uniforms, numbers.transpose(1, 2)), dim=1)
            self.drawn += 1

    def _coupled(self, p: Truncated, old: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Returns draws from p that equal `old`, drawn from q, as often as can be; and whether they do. Both [b n]."""
        slots = places % self.size
        count = self.repeat.gather(1, places)
        self.repeat.scatter_add_(1, places, torch.ones_like(places))
        # a final token that is read again near the end asks for numbers too, and does not use them
        u = self.uniforms[self.rows, places - self.first_drawn * self.w.frame, count.clamp(max=self.size - 1)]
        q_old = self.q[self.rows, slots, old].double()
        p_old = p.prob_of(old.flatten()).view_as(q_old).double()
        kept = self.rollout.keeps(p_old, q_old, u)
        chance = torch.where(q_old > 0, p_old / q_old, torch.ones_like(q_old)).clamp(max=1)
        fresh = ((u - chance) / (1 - chance).clamp(min=1e-12)).clamp(0, 1 - 2**-53)  # uniform again, given rejection
        rejected = (~kept).flatten().nonzero().squeeze(-1)
        new = old.flatten().clone()
        if len(rejected):
            q = self.q[self.rows, slots].flatten(0, 1).index_select(0, rejected)
            new[rejected] = _residual_draw(p, rejected, q, fresh.flatten().index_select(0, rejected))
        return new.view_as(old), kept

    def _remember(self, p: Truncated, places: Tensor) -> None:
        slots = places % self.size
        if p.ids is None:
            self.q[self.rows, slots] = p.probs.view(*places.shape, -1).float()
            return
        dense = torch.zeros(places.numel(), self.q.shape[-1], device=self.q.device)
        dense.scatter_add_(1, p.ids, p.probs.float())
        self.q[self.rows, slots] = dense.view(*places.shape, -1)


def _residual_draw(p: Truncated, rows: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
    """Returns draws from max(p - q, 0), normalised, for some rows of p; q is dense [rows vocab]."""
    probs = p.probs.index_select(0, rows)
    ids = None if p.ids is None else p.ids.index_select(0, rows)
    left = (probs - (q if ids is None else q.gather(1, ids))).clamp(min=0)
    empty = left.sum(dim=-1, keepdim=True) <= 0  # p = q up to rounding: then any draw from p will do
    places = picked(torch.where(empty, probs, left), uniform)
    return Truncated(ids, probs).codes(places)
