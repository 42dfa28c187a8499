"""The order in which samples are used: an endless list of plan positions, each a pure function of (seed, position).

A *stream* is the endless concatenation of permutations of one set of items, a new permutation each epoch. A plan of one
stream is that stream. Several streams (weighted data sets, length buckets) are interleaved in *cycles*: a cycle holds
each stream a fixed number of times, in an order drawn for that cycle. Where streams differ in shape the unit that is
interleaved is a run of positions instead of one, so that a batch never mixes shapes.

Of D data-parallel ranks, rank r takes the positions congruent to r modulo D. Neither the rank count, the batch size nor
the number of workers changes what stands at a position, so the whole state of the data is one number: the first
position that no finished optimiser step has used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from longtake.keyed import keyed_below, keyed_bits, permuted

CYCLE = 1000
"""Blocks a cycle: weights are honoured to one part in a thousand, and each cycle holds exactly these shares."""


@dataclass(frozen=True, eq=False)
class Stream:
    """One set of items of one shape, drawn without replacement, epoch after epoch.

    Attributes:
        name: for messages and as part of the key of its permutations; unique in a plan.
        samples: sample number (in its data set) of each item, int64.
        starts: first pixel frame of each item, int32, or None where the start is drawn by whoever decodes.
        dataset: index of the data set.
        num_frames: pixel frames of every item.
        shape: whatever must be equal within a batch; compared only.
        weight: share of the plan, relative to the other streams.
        groups: for order by shards, how many consecutive items each shard holds; None permutes items freely.
        groups_per_block: shards whose items are mixed with each other.
    """

    name: str
    samples: np.ndarray
    starts: np.ndarray | None
    dataset: int
    num_frames: int
    shape: tuple[object, ...]
    weight: float
    groups: tuple[int, ...] | None = None
    groups_per_block: int = 1

    def __len__(self) -> int:
        """Returns the number of items in an epoch."""
        return len(self.samples)

    def item(self, seed: int, epoch: int, index: int) -> int:
        """Returns which item stands at `index` of an epoch's permutation."""
        key = keyed_bits(seed, "order", self.name, epoch)
        if self.groups is None:
            return permuted(index, len(self), key)
        return _item_by_shards(self.groups, self.groups_per_block, key, index)


@lru_cache(maxsize=8)
def _shard_order(groups: tuple[int, ...], per_block: int, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (shards in this epoch's order, items before each of them, first item of every shard)."""
    order = np.array([permuted(i, len(groups), key) for i in range(len(groups))])
    sizes = np.array(groups, dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(sizes[order])])
    return order, before, np.concatenate([[0], np.cumsum(sizes)])


def _item_by_shards(groups: tuple[int, ...], per_block: int, key: int, index: int) -> int:
    """Permutes shards, then items inside blocks of `per_block` shards: few shards are open at any time."""
    order, before, first = _shard_order(groups, per_block, key)
    slot = int(np.searchsorted(before, index, side="right")) - 1
    block = slot // per_block
    begin, end = int(before[block * per_block]), int(before[min((block + 1) * per_block, len(order))])
    inner = begin + permuted(index - begin, end - begin, keyed_bits(key, "block", block))
    slot = int(np.searchsorted(before, inner, side="right")) - 1
    return int(first[order[slot]] + inner - before[slot])


@dataclass(frozen=True)
class Draw:
    """What stands at one plan position.

    Attributes:
        position: the plan position.
        stream: index of the stream.
        dataset: index of the data set.
        sample: sample number in that data set.
        start: first pixel frame, or None where it is to be drawn.
        num_frames: pixel frames wanted.
    """

    position: int
    stream: int
    dataset: int
    sample: int
    start: int | None
    num_frames: int


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """The endless plan over one or several streams.

    Attributes:
        streams: at least one, none of them empty.
        seed: what every permutation is keyed by.
        run: positions drawn from one stream in a row where streams differ in shape (1 where all are alike).
    """

    streams: Sequence[Stream]
    seed: int
    run: int = 64
    counts: tuple[int, ...] = field(init=False)
    block: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.streams, "a plan needs at least one stream"
        assert all(len(stream) for stream in self.streams), f"empty stream among {[s.name for s in self.streams]}"
        object.__setattr__(self, "counts", cycle_counts([stream.weight for stream in self.streams]))
        alike = len({stream.shape for stream in self.streams}) == 1
        object.__setattr__(self, "block", 1 if alike else self.run)

    def __getitem__(self, position: int) -> Draw:
        """Returns what stands at a position, 0 or more."""
        index, drawn = self._stream_at(position)
        stream = self.streams[index]
        epoch, within = divmod(drawn, len(stream))
        return self._draw(position, index, stream.item(self.seed, epoch, within))

    def epoch(self, position: int) -> float:
        """Returns how many epochs of the whole plan lie before a position, by the size of all streams."""
        return position / sum(len(stream) for stream in self.streams)

    def substitute(self, position: int, attempt: int) -> Draw:
        """Returns what replaces a bad sample at a position on the `attempt`-th try, from the same stream."""
        index, _ = self._stream_at(position)
        item = keyed_below(len(self.streams[index]), self.seed, "substitute", position, attempt)
        return self._draw(position, index, item)

    def batches(self, start: int, batch_size: int, rank: int, size: int) -> Iterator[list[int]]:
        """Yields the positions of each batch of one rank, endlessly.

        Together the ranks use every position from `start` on exactly once. A batch ends early only where a run of one
        shape ends, and then on all ranks alike.

        Args:
            start: first position that is not used yet.
            batch_size: samples a rank and batch.
            rank: of this process among the data-parallel ones.
            size: number of data-parallel processes.
        """
        position = start
        while True:
            end = position + batch_size * size
            if self.block > 1:
                end = min(end, (position // self.block + 1) * self.block)
            yield list(range(position + rank, end, size))
            position = end

    def misfit(self, start: int, size: int) -> bool:
        """Returns whether runs of one shape cannot be shared evenly by `size` ranks from `start` on."""
        return self.block > 1 and (self.block % size != 0 or start % size != 0)

    def _stream_at(self, position: int) -> tuple[int, int]:
        """Returns (stream, how many draws of it lie before this position)."""
        if len(self.streams) == 1:
            return 0, position
        block, inside = divmod(position, self.block)
        cycle, slot = divmod(block, sum(self.counts))
        order, earlier = _cycle_order(self.counts, keyed_bits(self.seed, "cycle", cycle))
        index = int(order[slot])
        return index, (cycle * self.counts[index] + int(earlier[slot])) * self.block + inside

    def _draw(self, position: int, index: int, item: int) -> Draw:
        stream = self.streams[index]
        start = None if stream.starts is None else int(stream.starts[item])
        return Draw(position, index, stream.dataset, int(stream.samples[item]), start, stream.num_frames)


def cycle_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns how often each stream stands in a cycle: shares of CYCLE by largest remainder, at least one each."""
    exact = np.array(weights, dtype=np.float64) / float(sum(weights)) * CYCLE
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(counts - exact, kind="stable")[: CYCLE - int(counts.sum())]:
        counts[index] += 1
    return tuple(int(count) for count in np.maximum(counts, 1))


@lru_cache(maxsize=8)
def _cycle_order(counts: tuple[int, ...], key: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for every slot of one cycle, its stream and how often that stream stood in the cycle before."""
    plain = np.repeat(np.arange(len(counts)), counts)
    order = plain[[permuted(slot, len(plain), key) for slot in range(len(plain))]]
    earlier = np.zeros(len(order), dtype=np.int64)
    for index in range(len(counts)):
        where = order == index
        earlier[where] = np.arange(where.sum())
    return order, earlier
