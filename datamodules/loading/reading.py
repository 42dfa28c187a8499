"""Random access to the samples of a set: one seek a member, whichever worker asks for whichever sample."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datamodules.loading.remote import ShardCache
from datamodules.shards import (
    DatasetInfo,
    SampleEntry,
    ShardInfo,
    index_path,
    read_index,
    read_index_bytes,
    read_member,
)
from longtake.errors import BadSampleError, DataError

MAX_OPEN_SHARDS = 64


class Sample(ABC):
    """One sample, its members still bytes.

    Attributes:
        key: its name.
        where: the shard that holds it, for messages.
        num_frames: pixel frames, or None where that is only known after decoding.
        verified: whether `read` returns exactly the bytes that were checked when the shard was written.
    """

    key: str
    where: str
    num_frames: int | None
    verified: bool

    @abstractmethod
    def has(self, member: str) -> bool:
        """Returns whether the sample has a member."""

    @property
    @abstractmethod
    def members(self) -> Iterable[str]:
        """Names of all its members."""

    @abstractmethod
    def read(self, member: str) -> bytes:
        """Returns the bytes of a member. Raises BadSampleError if it is missing or damaged."""


class IndexedSample(Sample):
    """A sample found through a shard's index; every member is checked against its checksum when read."""

    verified = True

    def __init__(self, shard: BinaryIO, where: str, entry: SampleEntry) -> None:
        self.key = entry.key
        self.where = where
        self.num_frames = entry.num_frames
        self._shard = shard
        self._entry = entry

    def has(self, member: str) -> bool:
        return member in self._entry.members

    @property
    def members(self) -> Iterable[str]:
        return self._entry.members

    def read(self, member: str) -> bytes:
        try:
            return read_member(self._shard, self._entry, member)
        except OSError as error:
            raise BadSampleError(f"member {member!r} cannot be read from {self.where}: {error}") from error


class StreamedSample(Sample):
    """A sample that arrived in a stream of tar members (`mode=resampled`); nothing vouches for its bytes."""

    verified = False
    num_frames = None

    def __init__(self, members: dict[str, Any]) -> None:
        self.key = str(members["__key__"])
        self.where = str(members.get("__url__", "a stream"))
        self._members = members

    def has(self, member: str) -> bool:
        return member.lower() in self._members

    @property
    def members(self) -> Iterable[str]:
        return [name for name in self._members if not name.startswith("__")]

    def read(self, member: str) -> bytes:
        content = self._members.get(member.lower())
        if not isinstance(content, bytes):
            raise BadSampleError(f"member {member!r} is missing")
        return content


class _Index:
    """The index of one shard, memory-mapped: a line is parsed when its sample is asked for, 8 bytes a sample stay."""

    def __init__(self, shard: Path, info: ShardInfo) -> None:
        path = index_path(shard)
        content = read_index_bytes(path, info)
        ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
        if len(ends) != info.num_samples:
            raise DataError(f"{path} lists {len(ends)} samples; dataset.json states {info.num_samples}")
        self._ends = np.concatenate([[-1], ends])
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, row: int) -> SampleEntry:
        line = self._map[int(self._ends[row]) + 1 : int(self._ends[row + 1])]
        return SampleEntry.from_line(line.decode("utf-8"))


class SplitReader:
    """The samples of one split by number, in the order of its shards. Cheap to pickle; opens files when asked.

    Args:
        info: the set.
        split: name of the split.
        cache: fetches remote shards to this machine; None where the tars lie beside `dataset.json`.
    """

    def __init__(self, info: DatasetInfo, split: str, cache: ShardCache | None = None) -> None:
        self.info = info
        self.split = split
        self.cache = cache
        self._shards = info.split(split).shards
        self._first = np.concatenate([[0], np.cumsum([shard.num_samples for shard in self._shards])])
        self._indices: dict[int, _Index] = {}
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> IndexedSample:
        """Returns a sample. Raises DataError if its shard or index is missing."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        entry = self._index(shard)[number - int(self._first[shard])]
        return IndexedSample(self._file(shard), self._shards[shard].file, entry)

    def num_frames(self) -> np.ndarray:
        """Returns the pixel frames of every sample, int32, without opening an index where all are of one length."""
        lengths = self.info.split(self.split).lengths
        if len(lengths) == 1:
            return np.full(len(self), next(iter(lengths)), dtype=np.int32)
        entries = (
            entry.num_frames
            for shard, path in zip(self._shards, self.info.shard_paths(self.split), strict=True)
            for entry in read_index(path, shard)
        )
        return np.fromiter(entries, dtype=np.int32, count=len(self))

    def shard_sizes(self) -> tuple[int, ...]:
        """Returns the number of samples in each shard."""
        return tuple(shard.num_samples for shard in self._shards)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": {}, "_open": OrderedDict()}

    def _index(self, shard: int) -> _Index:
        if shard not in self._indices:
            self._indices[shard] = _Index(self.info.root / self._shards[shard].file, self._shards[shard])
        return self._indices[shard]

    def _file(self, shard: int) -> BinaryIO:
        file = self._open.pop(shard, None)
        if file is None:
            file = self._open_shard(self._shards[shard])
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open[shard] = file
        return file

    def _open_shard(self, shard: ShardInfo) -> BinaryIO:
        path = self.info.root / shard.file if self.cache is None else self.cache.fetch(shard)
        try:
            return path.open("rb", buffering=0)  # members are read whole, by position
        except OSError as error:
            raise DataError(
                f"shard {path} cannot be opened ({error.strerror}); dataset.json lists it. Run "
                f"`python -m scripts.check_shards input={self.info.root}`, or make the set again."
            ) from error
