"""The webdataset pipelines: positions -> samples -> decoded clips -> batches, inside loader workers.

Rank and number of ranks are plain arguments, captured in the main process: a worker that was spawned or came from a
fork server has no process group to ask, and would read what every other rank reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import get_worker_info
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import ResampledShards
from webdataset.tariterators import tarfile_to_samples

from datamodules.loading.bad_samples import BadSample
from datamodules.loading.decoding import Decoder, Draws, Fields, Window, collate
from datamodules.loading.plan import Draw, SamplePlan
from datamodules.loading.reading import Sample, SplitReader, StreamedSample
from longtake.errors import BadSampleError, DataError
from longtake.keyed import keyed_bits
from longtake.types import Clip

MAX_SUBSTITUTES = 32
SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Shard:
    """Which part of the batches this process makes.

    Attributes:
        rank: among the data-parallel processes.
        size: number of data-parallel processes.
    """

    rank: int
    size: int


@dataclass
class Delivery:
    """What a worker hands over: a batch, what went wrong on the way, or the error that ended the work."""

    clip: Clip | None
    num_drawn: int = 0
    bad: list[BadSample] = field(default_factory=list)
    failure: str | None = None
    small: dict[str, np.ndarray] = field(default_factory=dict)

    def packed(self) -> Delivery:
        """Returns this with small tensors as arrays, for the way between processes.

        A tensor travels as shared memory with a file descriptor of its own, which for a few bytes costs more than the
        bytes; arrays travel inside the message.
        """
        if self.clip is None:
            return self
        fields = {name: value for name, value in vars(self.clip).items() if isinstance(value, torch.Tensor)}
        small = {name: value.numpy() for name, value in fields.items() if value.nbytes <= SMALL_BYTES}
        return replace(self, clip=replace(self.clip, **dict.fromkeys(small)), small=small)

    def unpacked(self) -> Delivery:
        """Returns this with all tensors in the clip again."""
        if self.clip is None:
            return self
        tensors = {name: torch.from_numpy(value) for name, value in self.small.items()}
        return replace(self, clip=replace(self.clip, **tensors), small={})

    def pin_memory(self) -> Delivery:
        """Returns this with the clip in page-locked memory (called by torch's DataLoader)."""
        whole = self.unpacked()
        return whole if whole.clip is None else replace(whole, clip=whole.clip.pin_memory())


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


@dataclass
class PlannedPositions:
    """Pipeline source: the positions of every batch this worker makes, endlessly.

    The loader takes batches from its workers in turn, so batch k is made by worker k modulo their number and the order
    of batches does not depend on that number.
    """

    plan: SamplePlan
    start: int
    batch_size: int
    shard: Shard

    def __call__(self) -> Iterator[list[int]]:
        worker, num_workers = _worker()
        for number, batch in enumerate(
            self.plan.batches(self.start, self.batch_size, self.shard.rank, self.shard.size)
        ):
            if number % num_workers == worker:
                yield batch


@dataclass
class SplitData:
    """What is needed to decode the samples of one data set."""

    reader: SplitReader
    decoder: Decoder
    stride: int


def _decode(data: SplitData, draw: Draw, draws: Draws, bad: list[BadSample]) -> Fields | None:
    """Returns the fields of one clip, or None after noting why there are none."""
    sample: Sample = data.reader[draw.sample]
    try:
        fields = data.decoder(sample, Window(draw.start, draw.num_frames, data.stride), draws)
    except BadSampleError as error:
        bad.append(BadSample(sample.key, sample.where, str(error)))
        return None
    return {**fields, "key": sample.key, "position": draw.position}


@dataclass
class DecodePlanned:
    """Pipeline stage: positions of a batch -> a batch. A bad sample is replaced by a substitute of the same stream."""

    plan: SamplePlan
    data: list[SplitData]

    def __call__(self, source: Iterable[list[int]]) -> Iterator[Delivery]:
        for positions in source:
            bad: list[BadSample] = []
            try:
                fields = [self._clip(position, bad) for position in positions]
                yield Delivery(collate(fields), len(positions), bad)
            except (DataError, BadSampleError) as error:
                yield Delivery(None, len(positions), bad, str(error))
                return

    def _clip(self, position: int, bad: list[BadSample]) -> Fields:
        draw = self.plan[position]
        for attempt in range(MAX_SUBSTITUTES):
            fields = _decode(self.data[draw.dataset], draw, Draws((self.plan.seed, "clip", position)), bad)
            if fields is not None:
                return fields
            draw = self.plan.substitute(position, attempt)
        last = bad[-1]
        raise DataError(
            f"plan position {position} and {MAX_SUBSTITUTES - 1} substitutes for it are all bad; the last was "
            f"{last.key} "
            f"in {last.where}: {last.reason}"
        )


@dataclass
class FixedPositions:
    """Pipeline source of validation: the same numbered samples every time, each on one rank, padded to equal length.

    Yields lists of (number in the fixed list, sample number, whether it only fills up the batch).
    """

    samples: list[int]
    batch_size: int
    shard: Shard

    def __len__(self) -> int:
        """Returns the number of batches, the same on every rank."""
        return -(-len(self.samples) // (self.batch_size * self.shard.size))

    def __call__(self) -> Iterator[list[tuple[int, int, bool]]]:
        worker, num_workers = _worker()
        for number in range(worker, len(self), num_workers):
            first = number * self.batch_size * self.shard.size + self.shard.rank
            positions = range(first, first + self.batch_size * self.shard.size, self.shard.size)
            count = len(self.samples)
            yield [(p, self.samples[p % count], p >= count) for p in positions]


@dataclass
class DecodeFixed:
    """Pipeline stage of validation: a bad sample is replaced by the next good one, as filling (`frame_mask` False)."""

    data: SplitData
    num_frames: int

    def __call__(self, source: Iterable[list[tuple[int, int, bool]]]) -> Iterator[Delivery]:
        for positions in source:
            bad: list[BadSample] = []
            try:
                clip = collate([self._clip(*item, bad) for item in positions])
                yield Delivery(clip, sum(not filling for _, _, filling in positions), bad)
            except (DataError, BadSampleError) as error:
                yield Delivery(None, len(positions), bad, str(error))
                return

    def _clip(self, position: int, number: int, filling: bool, bad: list[BadSample]) -> Fields:
        count = len(self.data.reader)
        for attempt in range(min(MAX_SUBSTITUTES, count)):
            draw = Draw(position, 0, 0, (number + attempt) % count, 0, self.num_frames)
            # What fills up a batch was, or will be, counted where it stands by itself.
            noted = [] if filling or attempt else bad
            fields = _decode(self.data, draw, Draws(None), noted)
            if fields is not None:
                if filling or attempt:
                    fields["frame_mask"] = np.zeros_like(fields["frame_mask"])
                return fields
        raise DataError(f"no usable sample among {min(MAX_SUBSTITUTES, count)} from number {number} on in validation")


@dataclass
class ResampledBatches:
    """Pipeline of `mode=resampled`: shards drawn with replacement and streamed whole, samples mixed in a buffer.

    Approximate: a sample may come twice or never in an epoch, and a resumed run continues with fresh draws.
    """

    urls: list[str]
    data: SplitData
    num_frames: int
    batch_size: int
    shard: Shard
    seed: int
    buffer: int

    def __call__(self) -> Iterator[Delivery]:
        worker, num_workers = _worker()
        seed = keyed_bits(self.seed, "resampled", self.shard.rank * num_workers + worker) % 2**31
        bad: list[BadSample] = []

        def note(error: Exception) -> bool:
            bad.append(BadSample("?", str(error.args[-1] if error.args else "?"), f"{type(error).__name__}: {error}"))
            return True

        samples = DataPipeline(
            ResampledShards(self.urls, seed=seed, worker_seed=lambda: seed, deterministic=True),
            tarfile_to_samples(handler=note),
            shuffle(self.buffer, initial=self.buffer, seed=seed),
        )
        batch: list[Fields] = []
        drawn = 0
        for number, members in enumerate(samples):
            drawn += 1
            fields = self._clip(StreamedSample(members), number, seed, bad)
            if fields is not None:
                batch.append(fields)
            if len(batch) == self.batch_size or len(bad) >= MAX_SUBSTITUTES:
                yield Delivery(collate(batch) if len(batch) == self.batch_size else None, drawn, bad.copy())
                batch = batch if len(batch) < self.batch_size else []
                drawn = 0
                bad.clear()

    def _clip(self, sample: Sample, number: int, seed: int, bad: list[BadSample]) -> Fields | None:
        try:
            fields = self.data.decoder(sample, Window(None, self.num_frames, self.data.stride), Draws((seed, number)))
        except BadSampleError as error:
            bad.append(BadSample(sample.key, sample.where, str(error)))
            return None
        return {**fields, "key": sample.key, "position": number * self.shard.size + self.shard.rank}


def planned(positions: PlannedPositions, data: list[SplitData]) -> DataPipeline:
    """Returns the training pipeline: endless, in plan order."""
    return DataPipeline(positions, DecodePlanned(positions.plan, data))


def fixed(positions: FixedPositions, data: SplitData, num_frames: int) -> DataPipeline:
    """Returns the validation pipeline: finite, the same samples every time."""
    return DataPipeline(positions, DecodeFixed(data, num_frames))


def clip_filling(clip: Clip) -> torch.Tensor:
    """Returns which clips of a validation batch only fill it up and must not count in a metric, bool [b]."""
    assert clip.frame_mask is not None, "every loaded clip has a frame_mask"
    return ~clip.frame_mask.any(dim=1)
