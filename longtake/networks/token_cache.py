"""What decoding of tokens keeps: a static cache of rotated keys and values with a cursor for each sample.

    capacity   0 1 2 3 4 5 6 7 8 9        append writes at each sample's cursor and moves it on;
    sample 0   k k k k k k . . . .        truncate moves cursors back (rejected drafts, the padding of a shorter
    sample 1   k k k . . . . . . .        prompt); what lies behind a cursor is never read

Keys are stored turned: a token keeps its position for as long as it is here, so nothing is turned twice. While all
cursors are equal no mask exists; a pass reads exactly the keys that are there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepPlan:
    """What all layers of one pass share.

    Attributes:
        count: tokens of the pass, for each sample.
        start: place of the first one, where it is the same for all samples; else None.
        stop: keys that are read.
        rows: sample indices [b 1], where cursors differ.
        places: place of each new token [b n], where cursors differ.
        mask: True where a key counts, bool [1 or b, 1, groups*n, m]; None: all count, or `causal`.
        causal: the pass is the whole sequence so far, each token sees itself and those before it.
    """

    count: int
    start: int | None
    stop: int
    rows: Tensor | None = None
    places: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False


class TokenCache:
    """Keys and values of all layers, in place.

    Args:
        num_layers: layers.
        batch: samples.
        kv_heads: heads of keys and values.
        capacity: tokens that fit, BOV included.
        head_dim: channels of a head.
        dtype: of keys and values.
        device: where they lie.
        groups: query heads a key head, for the masks.

    Attributes:
        keys: [layers b kv_heads capacity hd].
        values: as `keys`.
        lengths: each sample's cursor.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        groups: int = 1,
    ) -> None:
        shape = (num_layers, batch, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # zeros: a masked NaN would still spread
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch
        self.capacity, self.groups = capacity, groups
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))

    @property
    def num_bytes(self) -> int:
        """Bytes that keys and values take."""
        return self.keys.nbytes + self.values.nbytes

    def plan(self, count: int) -> StepPlan:
        """Returns how a pass of `count` more tokens a sample writes and reads. It writes nothing.

        Raises:
            ValueError: the cache is full.
        """
        longest = max(self.lengths)
        stop = longest + count
        if stop > self.capacity:
            raise ValueError(
                f"{count} tokens after {longest} do not fit a cache of {self.capacity}; expected a window of at most "
                "so many tokens (the caller sets `capacity`)"
            )
        device = self.keys.device
        if min(self.lengths) == longest:
            if count == 1 or longest == 0:
                return StepPlan(count, longest, stop, causal=count > 1)
            mask = _causal_mask(count, stop, device).repeat(self.groups, 1)
            return StepPlan(count, longest, stop, mask=mask[None, None])
        starts = torch.tensor(self.lengths, device=device)
        places = starts[:, None] + torch.arange(count, device=device)
        mask = torch.arange(stop, device=device) <= places.unsqueeze(-1)  # [b n m]
        mask = mask.repeat(1, self.groups, 1)[:, None]
        rows = torch.arange(len(self.lengths), device=device)[:, None]
        return StepPlan(count, None, stop, rows=rows, places=places, mask=mask)

    def extend(self, layer: int, k: Tensor, v: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Writes a pass's keys and values [b n kv_heads hd]; returns all that are read, [b kv_heads m hd]."""
        keys, values = self._layers[layer]
        if plan.start is not None:
            keys[:, :, plan.start : plan.stop] = k.transpose(1, 2)
            values[:, :, plan.start : plan.stop] = v.transpose(1, 2)
        else:
            keys.transpose(1, 2)[plan.rows, plan.places] = k
            values.transpose(1, 2)[plan.rows, plan.places] = v
        return keys[:, :, : plan.stop], values[:, :, : plan.stop]

    def advance(self, count: int) -> None:
        """Moves every cursor on over the tokens that a pass wrote."""
        self.lengths = [length + count for length in self.lengths]

    def truncate(self, lengths: Sequence[int] | Tensor) -> None:
        """Moves cursors back.

        Args:
            lengths: one for each sample, none above its present one.
        """
        wanted = [int(length) for length in lengths]
        assert len(wanted) == len(self.lengths), f"{len(wanted)} cursors for {len(self.lengths)} samples"
        assert all(0 <= new <= old for new, old in zip(wanted, self.lengths, strict=True)), (
            f"cursors {self.lengths} cannot be truncated to {wanted}"
        )
        self.lengths = wanted


@functools.lru_cache(maxsize=8)
def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Returns True where a key counts, bool [n m]: queries are the last n of the m keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
