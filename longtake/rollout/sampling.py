"""Temperature, top-k and top-p on logits of large vocabularies, without sorting them.

The nucleus is what a full sort would give: codes from the likeliest on, as long as the mass before a code is at most
top_p, so the code that crosses the border is kept and one always survives. Of 64,000 codes the likeliest 256 are found
first. Where their mass does not exceed top_p, the border is found by histograms over the bits of all probabilities (the
bits of positive floats are ordered as the floats are), which is as exact as sorting them. Everything is float32 or
better: in bfloat16 a nucleus comes out a few per cent too large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.errors import ConfigError
from longtake.rollout.product import ProductNucleus, product_nucleus

PREFILTER = 256
WIDEN = 4.0
_STEPS, _BITS = 3, 10  # the 30 bits of probabilities up to 1.0 (0x3F800000), ten at a time


@dataclass(frozen=True)
class Truncated:
    """Distributions after temperature, top-k and top-p.

    Attributes:
        ids: the codes that are left, in rising order, int64 [n k]; None: all codes, k = vocabulary. The order is
            the same either way, so that a uniform number picks the same code however it was found what is left.
        probs: their probabilities, float [n k], of sum 1; 0 for codes that were cut off and where a row is filled up.
    """

    ids: Tensor | None
    probs: Tensor

    def pick(self, uniform: Tensor) -> Tensor:
        """Returns codes by inversion of the distribution function, int64, shaped as `uniform`.

        Args:
            uniform: numbers in (0, 1), float64 [n], or [n k] for k codes a row.
        """
        places = picked(self.probs, uniform)
        return places if self.ids is None else _of_rows(self.ids, places)

    def prob_of(self, codes: Tensor) -> Tensor:
        """Returns the probabilities of codes [n] or [n k]."""
        if self.ids is None:
            return _of_rows(self.probs, codes)
        equal = self.ids.unsqueeze(1) == codes.view(len(codes), -1, 1)
        return (self.probs.unsqueeze(1) * equal).sum(dim=-1).view(codes.shape)

    def rows(self, index: Tensor) -> Truncated:
        """Returns some of the rows, int64 [m]."""
        ids = None if self.ids is None else self.ids.index_select(0, index)
        return Truncated(ids, self.probs.index_select(0, index))

    def dense(self, vocab: int) -> Tensor:
        """Returns the probabilities of all codes, float [n vocab]."""
        if self.ids is None:
            return self.probs
        return self.probs.new_zeros(len(self.probs), vocab).scatter_add_(1, self.ids, self.probs)


Nucleus = Truncated | ProductNucleus


def picked(weights: Tensor, uniform: Tensor) -> Tensor:
    """Returns the places that uniform numbers [n] or [n k] fall on in the rows of weights [n w] (of any sum)."""
    total = weights.cumsum(dim=-1, dtype=torch.float64)
    wanted = uniform.to(total).view(len(total), -1) * total[:, -1:]
    places = torch.searchsorted(total, wanted, right=True).clamp_(max=weights.shape[-1] - 1)
    return places.view(uniform.shape)


class Sampler:
    """Turns logits into codes.

    Args:
        temperature: divides the logits; 0 takes the likeliest code.
        top_p: mass of the nucleus, in (0, 1]; 1 keeps all.
        top_k: how many codes are kept before that; None: all.

    Raises:
        ConfigError: a value outside of these.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None) -> None:
        if not 0 <= temperature < float("inf"):
            raise ConfigError(
                f"rollout.temperature is {temperature}; expected 0 (the likeliest token) or more. Change "
                "`rollout.temperature`."
            )
        if not 0 < top_p <= 1:
            raise ConfigError(
                f"rollout.top_p is {top_p}; expected more than 0 and at most 1 (1 keeps every token). Change "
                "`rollout.top_p`."
            )
        if top_k is not None and top_k < 1:
            raise ConfigError(
                f"rollout.top_k is {top_k}; expected 1 or more, or null for all tokens. Change `rollout.top_k`."
            )
        self.temperature, self.top_p, self.top_k = float(temperature), float(top_p), top_k

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Returns one code a row, int64 [n].

        Args:
            logits: float32 or better [n vocab].
            uniform: a number in (0, 1) a row, float64 [n]; unused at temperature 0.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return self.truncated(logits).pick(uniform)

    def truncated(self, logits: Tensor) -> Truncated:
        """Returns the distributions [n ...] that codes are drawn from."""
        assert logits.dtype in (torch.float32, torch.float64), f"logits are {logits.dtype}, not float32 or better"
        if self.temperature == 0:
            best = logits.argmax(dim=-1, keepdim=True)
            return Truncated(best, torch.ones_like(best, dtype=logits.dtype))
        probs = torch.softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)
        vocab = probs.shape[-1]
        if self.top_k is not None and self.top_k < vocab:
            kept, ids = torch.topk(probs, self.top_k, dim=-1)
            return _in_code_order(self.cut(kept / kept.sum(dim=-1, keepdim=True)), ids)
        if self.top_p == 1:
            return Truncated(None, probs)
        kept, ids = torch.topk(probs, min(PREFILTER, vocab), dim=-1)
        if kept.shape[-1] < vocab and bool((kept.sum(dim=-1, dtype=torch.float64) <= self.top_p).any()):
            return _padded([self._wide_nucleus(row, least) for row, least in zip(probs, kept[:, -1], strict=True)])
        return _in_code_order(self.cut(kept), ids)

    def truncated_product(self, first: Tensor, second: Tensor) -> Nucleus:
        """Returns what `truncated` would for the codes i + len(first) j, whose probability is p(i) p(j).

        Args:
            first: logits of the fastest factor, float32 or better [n L_0].
            second: logits of the other one [n L_1].
        """
        if self.temperature == 0:
            best = first.argmax(dim=-1, keepdim=True) + first.shape[-1] * second.argmax(dim=-1, keepdim=True)
            return Truncated(best, torch.ones_like(best, dtype=first.dtype))
        if self.top_k is None:
            p, q = (torch.softmax(logits / self.temperature, dim=-1) for logits in (first, second))
            return product_nucleus(p, q, self.top_p)
        joint = second.log_softmax(dim=-1).unsqueeze(-1) + first.log_softmax(dim=-1).unsqueeze(-2)
        return self.truncated(joint.flatten(1))

    def _wide_nucleus(self, probs: Tensor, least: Tensor) -> Truncated:
        """Returns the nucleus of one row [vocab] whose codes of probability `least` and more may not be all of it."""
        border, value = 0.0, float(least)
        while value > WIDEN * torch.finfo(torch.float32).tiny:
            value /= WIDEN
            if float(F.threshold(probs, value, 0.0).sum(dtype=torch.float64)) > self.top_p:
                border = value
                break
        ids = (probs > border).nonzero().squeeze(-1)  # the nucleus and some more, in the order of codes
        likely = probs.index_select(0, ids)[None]
        inside = nucleus_mask(likely.float(), self.top_p)[0].squeeze(0).nonzero().squeeze(-1)
        kept = likely.index_select(1, inside)
        return Truncated(ids.index_select(0, inside)[None], kept / kept.sum(dim=-1, keepdim=True))

    def cut(self, probs: Tensor) -> Tensor:
        """Returns rows [n k] that are sorted, the likeliest first, 0 outside of the nucleus: the border is kept."""
        before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
        return probs.masked_fill(before > self.top_p, 0.0) if self.top_p < 1 else probs


def nucleus_mask(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Returns which of the codes are in the nucleus, bool [n k], and the probability on its border [n]; no sorting.

    Of codes that are exactly as likely as the one on the border, the first ones are kept.

    Args:
        probs: in any order, float32 [n k], of a sum above top_p (or all there is).
        top_p: mass of the nucleus, less than 1.
    """
    mass, bits = probs.double(), probs.view(torch.int32).long()
    above, border = torch.zeros_like(mass[:, 0]), torch.zeros_like(bits[:, 0])
    left = mass
    for step in reversed(range(_STEPS)):
        digits = bits >> (step * _BITS) & ((1 << _BITS) - 1)
        digit, above = _crossing(digits, left, above, top_p)
        border = (border << _BITS) + digit
        if step > 0:
            left = left * (digits == digit.unsqueeze(-1))
    likely = border.to(torch.int32).view(torch.float32)
    equal = probs == likely.unsqueeze(-1)
    keep = probs > likely.unsqueeze(-1)
    room = ((top_p - above) / likely.double()).floor() + 1
    return keep | (equal & (equal.cumsum(dim=-1) <= room.unsqueeze(-1))), likely


def _of_rows(values: Tensor, places: Tensor) -> Tensor:
    """Returns values [n w] at places [n] or [n k]."""
    return values.gather(1, places.view(len(values), -1)).view(places.shape)


def _padded(rows: list[Truncated]) -> Truncated:
    """Returns rows of different widths as one, filled up with codes of probability 0."""
    width = max(row.probs.shape[-1] for row in rows)
    probs = [F.pad(row.probs, (0, width - row.probs.shape[-1])) for row in rows]
    ids = [F.pad(row.ids, (0, width - row.probs.shape[-1])) for row in rows if row.ids is not None]
    return Truncated(torch.cat(ids), torch.cat(probs))


def _in_code_order(probs: Tensor, ids: Tensor) -> Truncated:
    """Returns sorted rows [n k], 0 for what is cut off, in the order of codes and of sum 1."""
    width = int((probs > 0).sum(dim=-1).max())
    ids, order = ids[:, :width].sort(dim=-1)
    return Truncated(ids, (probs / probs.sum(dim=-1, keepdim=True)).gather(-1, order))


def _crossing(digits: Tensor, mass: Tensor, above: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Returns for each row the largest digit at which the mass from the top on exceeds top_p, and the mass above it.

    If no digit does (the sum of all was rounded down), it is the smallest one that has any mass.
    """
    bins = torch.zeros(len(mass), 1 << _BITS, dtype=mass.dtype, device=mass.device).scatter_add_(1, digits, mass)
    from_top = bins.flip(-1).cumsum(dim=-1) + above.unsqueeze(-1)
    crossed = (from_top > top_p) | (from_top >= from_top[:, -1:])
    place = crossed.to(torch.uint8).argmax(dim=-1)
    before = torch.where(place > 0, from_top.gather(-1, (place - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1), above)
    return (1 << _BITS) - 1 - place, before
