"""The streams of a plan: which windows of which samples there are, by shape."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.loading.plan import Stream
from datamodules.loading.reading import SplitReader
from longtake.errors import ConfigError, unknown_choice

log = logging.getLogger("longtake")


@dataclass(frozen=True)
class StreamOptions:
    """How samples become windows; the fields are those of `ClipsDataModule`, `num_frames` always a tuple."""

    num_frames: tuple[int, ...]
    frame_stride: int
    subclips: str
    subclip_stride: int | None
    limit_samples: int | None
    order: str
    shards_per_block: int

    def __post_init__(self) -> None:
        if self.subclips not in ("random", "strided"):
            raise unknown_choice("choice", self.subclips, ["random", "strided"], "data.subclips")
        if self.order not in ("samples", "shards"):
            raise unknown_choice("choice", self.order, ["samples", "shards"], "data.order")
        if not self.num_frames or min(self.num_frames) < 1 or len(set(self.num_frames)) < len(self.num_frames):
            raise ConfigError(
                f"data.num_frames is {list(self.num_frames)}; expected different lengths of 1 frame or more."
            )
        for name in ("frame_stride", "subclip_stride", "limit_samples", "shards_per_block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}; expected 1 or more. Change `data.{name}`.")

    def span(self, num_frames: int) -> int:
        """Returns the frames of a sample that a window covers."""
        return (num_frames - 1) * self.frame_stride + 1


def make_streams(
    readers: list[SplitReader],
    shapes: list[tuple[object, ...]],
    weights: list[float | None],
    options: StreamOptions,
) -> list[Stream]:
    """Returns the streams of a training plan, one for each (set or group of sets, length).

    Without weights, sets of one shape form one stream: a permutation of all their samples together would need a common
    numbering, so each set stays a stream of its own with its size as weight, which draws it in proportion.

    Raises:
        ConfigError: no sample is long enough.
    """
    streams: list[Stream] = []
    for dataset, (reader, shape, weight) in enumerate(zip(readers, shapes, weights, strict=True)):
        parts = _streams_of(reader, dataset, shape, options)
        total = sum(len(part) for part in parts)
        share = (weight if weight is not None else float(total)) / total
        streams += [Stream(**{**part.__dict__, "weight": share * len(part)}) for part in parts]
    return streams


def _streams_of(reader: SplitReader, dataset: int, shape: tuple[object, ...], options: StreamOptions) -> list[Stream]:
    """Returns the streams of one set, by rising length, their weight still 1."""
    available = reader.num_frames()
    numbers = np.arange(len(available))[: options.limit_samples]
    available = available[: options.limit_samples]
    lengths = sorted(options.num_frames)
    spans = np.array([options.span(length) for length in lengths])
    bucket = np.searchsorted(spans, available, side="right") - 1
    report_short(reader, available, int(spans[0]))
    streams = []
    for index, num_frames in enumerate(lengths):
        chosen = numbers[bucket == index]
        if len(chosen) == 0:
            continue
        samples, starts = _windows(chosen, available[bucket == index], int(spans[index]), options)
        groups = _groups(reader, samples) if options.order == "shards" else None
        streams.append(
            Stream(
                name=f"{dataset}:{num_frames}",
                samples=samples,
                starts=starts,
                dataset=dataset,
                num_frames=num_frames,
                shape=(*shape, num_frames),
                weight=1.0,
                groups=groups,
                groups_per_block=options.shards_per_block,
            )
        )
    return streams


def _windows(
    samples: np.ndarray, available: np.ndarray, span: int, options: StreamOptions
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns (sample, start) of every window; the starts are None where each sample is one item with a drawn start."""
    if options.subclips == "random":
        return samples.astype(np.int64), None
    stride = options.subclip_stride or span
    counts = 1 + (available - span) // stride
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(int(counts.sum())) - first) * stride
    return np.repeat(samples, counts).astype(np.int64), starts.astype(np.int32)


def _groups(reader: SplitReader, samples: np.ndarray) -> tuple[int, ...]:
    """Returns how many of the items, which are in order of samples, each shard holds."""
    ends = np.cumsum(reader.shard_sizes())
    upto = np.searchsorted(samples, ends, side="left")
    counts = np.diff(np.concatenate([[0], upto]))
    return tuple(int(count) for count in counts if count)


def report_short(reader: SplitReader, available: np.ndarray, needed: int) -> None:
    """Warns of clips with fewer than `needed` frames, which are left out; `available` is what each has.

    Raises:
        ConfigError: no clip has enough.
    """
    root: Path = reader.info.root
    num_short = int((available < needed).sum())
    if num_short == len(available):
        raise ConfigError(
            f"no clip has the {needed} frames needed (longest: {int(available.max())}) in split {reader.split!r} of "
            f"{root}; expected clips at least as long as data.num_frames times data.frame_stride. Change "
            "`data.num_frames`, or make the set with longer clips."
        )
    if num_short:
        log.warning(
            "%d of %d clips of split %r in %s are shorter than the %d frames needed and are left out",
            num_short,
            len(available),
            reader.split,
            root,
            needed,
        )
