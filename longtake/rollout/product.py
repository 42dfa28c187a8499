"""The nucleus of a product of two distributions, p(i) q(j) over the codes i + L_0 j, without multiplying them out.

With the fastest factor sorted, a border t leaves in column j the likeliest i of p(i) >= t / q(j). So a column is a
count, and its mass a look into the running sums of p: 125 of them for 512 x 125 codes. The border is searched by
secants on the logarithm. It is the rule of a full sort: codes are kept from the likeliest on, as long as the mass
before a code is at most top_p.

    q(j)   p(i) sorted: 0.4 0.3 0.2 0.1
    0.7                  x   x   x   .     counts 3 2 0
    0.2                  x   x   .   .
    0.1                  .   .   .   .
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

_EQUAL = 1e-6  # logarithms nearer than this are equal: the border falls inside of such codes in their order
_MOST_STEPS = 64  # of the search for the border; it takes about 5
_LISTED = 64  # codes around the border that are written out and sorted


@dataclass(frozen=True)
class ProductNucleus:
    """Distributions over the codes of two factors, as `Truncated`.

    Attributes:
        first: probabilities of the fastest factor, float [n L_0].
        second: those of the other one [n L_1].
        order: the fastest factor's values, the likeliest first, int64 [n L_0].
        rank: place of each value in `order`, int64 [n L_0].
        sums: mass of its likeliest 0, 1, ... values, float64 [n L_0 + 1].
        counts: how many of its values are left for each value of the other one, int64 [n L_1].
        until: mass that is left in the columns up to each one, float64 [n L_1].
    """

    first: Tensor
    second: Tensor
    order: Tensor
    rank: Tensor
    sums: Tensor
    counts: Tensor
    until: Tensor

    def pick(self, uniform: Tensor) -> Tensor:
        """Returns codes by inversion of the distribution function, int64, shaped as `uniform`.

        Args:
            uniform: numbers in (0, 1), float64 [n], or [n k] for k codes a row.
        """
        numbers = uniform.view(len(self.first), -1).to(self.until)
        wanted = numbers * self.until[:, -1:]
        column = torch.searchsorted(self.until, wanted, right=True).clamp_(max=self.until.shape[-1] - 1)
        counts = self.counts.gather(1, column)
        mass = self.sums.gather(1, counts)  # of the column, before it is multiplied with q
        above = self.until.gather(1, column) - wanted  # what is left of the column behind the number
        inside = mass - above / self.second.gather(1, column)
        place = torch.searchsorted(self.sums, inside, right=True) - 1
        value = self.order.gather(1, torch.minimum(place.clamp_(min=0), (counts - 1).clamp_(min=0)))
        return (value + self.first.shape[-1] * column).view(uniform.shape)

    def prob_of(self, codes: Tensor) -> Tensor:
        """Returns the probabilities of codes [n] or [n k]."""
        flat, size = codes.view(len(self.first), -1), self.first.shape[-1]
        i, j = flat % size, flat // size
        probs = self.first.gather(1, i) * self.second.gather(1, j) / self.until[:, -1:].to(self.first)
        return (probs * (self.rank.gather(1, i) < self.counts.gather(1, j))).view(codes.shape)

    def rows(self, index: Tensor) -> ProductNucleus:
        """Returns some of the rows, int64 [m]."""
        return ProductNucleus(*(getattr(self, name).index_select(0, index) for name in self.__dataclass_fields__))

    def dense(self, vocab: int) -> Tensor:
        """Returns the probabilities of all codes, float [n vocab], vocab = L_0 L_1."""
        kept = self.rank.unsqueeze(1) < self.counts.unsqueeze(2)
        joint = self.second.unsqueeze(2) * self.first.unsqueeze(1) / self.until[:, -1:, None].to(self.first)
        return (joint * kept).flatten(1)


def product_nucleus(first: Tensor, second: Tensor, top_p: float) -> ProductNucleus:
    """Returns the nucleus of p(i) q(j).

    Args:
        first: p, float32 or better [n L_0].
        second: q [n L_1].
        top_p: its mass, in (0, 1]; 1 keeps all.
    """
    ordered, order = first.sort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(first.shape[-1], device=first.device).expand_as(order)
    )
    sums = F.pad(ordered.cumsum(dim=-1, dtype=torch.float64), (1, 0))
    if top_p < 1:
        counts = _counts(ordered, second, sums, top_p)
    else:
        counts = torch.full_like(second, first.shape[-1], dtype=torch.int64)
    until = (sums.gather(1, counts) * second).cumsum(dim=-1)
    return ProductNucleus(first, second, order, rank, sums, counts, until)


def _counts(ordered: Tensor, second: Tensor, sums: Tensor, top_p: float) -> Tensor:
    """Returns how many of the likeliest i are in the nucleus for each j, int64 [n L_1].

    The border lies between `low`, whose codes hold more than top_p, and `high`, whose codes do not.
    """
    below, offset = -ordered.double().log(), second.double().log()
    mass_of = second.double().unsqueeze(1)

    def codes_above(border: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.searchsorted(below, offset - border, right=True)
        return counts, (mass_of @ sums.gather(1, counts).unsqueeze(2)).squeeze(2) - top_p

    # codes of less than this hold less than 1 - top_p together; none is above the likeliest
    low = torch.full_like(offset[:, :1], math.log((1 - top_p) / (ordered.shape[-1] * second.shape[-1])))
    high = offset.amax(dim=-1, keepdim=True) - below[:, :1] + _EQUAL
    at_low, over_low = codes_above(low)
    at_high, over_high = torch.zeros_like(at_low), torch.full_like(over_low, -top_p)
    border, spread = _first_guess(ordered, below, second, offset, top_p)
    for step in range(_MOST_STEPS):
        border = torch.maximum(torch.minimum(border, high), low)
        counts, over = codes_above(border)
        is_low = over > 0
        low, over_low = torch.where(is_low, border, low), torch.where(is_low, over, over_low)
        high, over_high = torch.where(is_low, high, border), torch.where(is_low, over_high, over)
        at_low, at_high = torch.where(is_low, counts, at_low), torch.where(is_low, at_high, counts)
        between = (at_low - at_high).sum(dim=-1, keepdim=True)
        if bool(((between <= _LISTED) | (high - low < _EQUAL)).all()):
            break
        if step < 1:
            border = border + 1.2 * over * spread
            continue
        # by the line through both ends, and a little to either side in turn, so that both ends come nearer
        aside = (1.0 / between + 0.03).clamp(max=0.25)
        share = over_low / (over_low - over_high) + (aside if step % 2 else -aside)
        border = low + (high - low) * share.clamp(0.1, 0.9)
    return at_high + _kept(at_low - at_high, at_high, -below, offset, -over_high, (low + high) / 2)


def _kept(between: Tensor, above: Tensor, logs: Tensor, offset: Tensor, room: Tensor, border: Tensor) -> Tensor:
    """Returns how many codes of each column are kept of the few around the border, int64 [n L_1].

    Args:
        between: how many of these each column has, int64 [n L_1].
        above: how many likelier ones.
        logs: log p, sorted [n L_0].
        offset: log q [n L_1].
        room: mass that the likelier ones leave, at least 0, [n 1].
        border: logarithm of codes that are equally likely, where there are more than can be listed, [n 1].
    """
    until = between.cumsum(dim=-1)
    total = until[:, -1:]
    place = torch.arange(_LISTED, device=until.device).expand(len(until), -1).contiguous()
    column = torch.searchsorted(until, place, right=True).clamp_(max=until.shape[-1] - 1)
    rank = above.gather(1, column) + place - (until - between).gather(1, column)
    log = logs.gather(1, rank.clamp(max=logs.shape[-1] - 1)) + offset.gather(1, column)
    log, order = log.masked_fill(place >= total, -math.inf).sort(dim=-1, descending=True, stable=True)
    mass = log.exp()
    is_kept = (mass.cumsum(dim=-1) - mass <= room) & (log > -math.inf)
    listed = torch.zeros_like(between).scatter_add_(1, column.gather(1, order), is_kept.long())
    if bool((total <= _LISTED).all()):
        return listed
    first = (room / border.exp()).floor().long() + 1  # so many of equally likely ones
    return torch.where(total <= _LISTED, listed, torch.minimum((first - (until - between)).clamp(min=0), between))


def _first_guess(ordered: Tensor, below: Tensor, second: Tensor, offset: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Returns the border if log p + log q were normal, and how far it moves per mass there, both [n 1]."""
    mean, variance = torch.zeros_like(below[:, :1]), torch.zeros_like(below[:, :1])
    for probs, logs in ((ordered, -below), (second, offset)):
        logs = logs.clamp(min=-80.0)
        own = (probs * logs).sum(dim=-1, keepdim=True)
        variance = variance + (probs * logs.square()).sum(dim=-1, keepdim=True) - own.square()
        mean = mean + own
    spread = variance.clamp(min=1e-6).sqrt()
    quantile = NormalDist().inv_cdf(min(max(top_p, 1e-6), 1 - 1e-6))
    return mean - quantile * spread, spread / NormalDist().pdf(quantile)
