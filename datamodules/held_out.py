"""Held-out clips one by one, whole and in order: what rollouts start from and are compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.loading.decoding import Draws, Window
from datamodules.loading.reading import Sample, SplitReader
from datamodules.shards import control_member, video_member
from datamodules.sources.control_frames import EDGE, check_control, is_extracted
from datamodules.video import VideoDataModule, VideoDecoder
from longtake.errors import BadSampleError, ConfigError, DataError
from longtake.media.window_reader import ControlReader, EdgeReader, FrameReader, ViewsReader, taken

logger = logging.getLogger("longtake")


@dataclass(frozen=True)
class HeldOutClip:
    """A clip that was not trained on.

    Attributes:
        key: its name.
        frames: uint8 [v t h w c].
        actions: what led to each frame, float32 [t a], or None.
        caption: its first caption, or None.
    """

    key: str
    frames: np.ndarray
    actions: np.ndarray | None
    caption: str | None


@dataclass(frozen=True)
class HeldOutViews:
    """A clip of several views that was not trained on, read window by window.

    Attributes:
        key: its name.
        num_frames: how many it has.
        views: numbers of its views in the rig.
        frames: of all views.
        actions: what led to each frame, float32 [t a], or None.
        caption: its first caption, or None.
        control: its control video, or None.
    """

    key: str
    num_frames: int
    views: tuple[int, ...]
    frames: ViewsReader
    actions: np.ndarray | None
    caption: str | None
    control: ControlReader | None


def held_out_clips(
    data: VideoDataModule, num_frames: int, count: int, *, split: str | None = None, first: int = 0
) -> Iterator[HeldOutClip]:
    """Yields clips, spread evenly over a split, from their first frame on. Bad samples are skipped and named.

    Args:
        data: of pixels; it is made where it does not exist yet.
        num_frames: pixel frames wanted; a shorter clip is yielded whole.
        count: how many clips, at most as many as the split has.
        split: name of the split; None: "predict" of `data.splits`, or validation where the set has no such split.
        first: leaves out this many of them.

    Raises:
        ConfigError: the set has no such split or holds no pixels.
        DataError: no clip can be used.
    """
    reader, decode = _split_of(data, split)
    wanted, used = min(first + count, len(reader)), 0
    for sample in _spread(reader, first, wanted):
        length = min(num_frames, sample.num_frames or num_frames)
        try:
            fields = decode(sample, Window(0, length), Draws(None))
        except BadSampleError as error:
            logger.warning("held-out clip %s (%s) is left out: %s", sample.key, sample.where, error)
            continue
        used += 1
        yield HeldOutClip(
            key=sample.key,
            frames=np.ascontiguousarray(fields["video"].permute(0, 1, 3, 4, 2).numpy()),
            actions=None if fields["actions"] is None else np.asarray(fields["actions"]),
            caption=fields["captions"],
        )
    if used == 0 and first == 0:
        raise _no_clip(reader)


def held_out_views(
    data: VideoDataModule, count: int, *, control: Sequence[str] = (), split: str | None = None
) -> Iterator[HeldOutViews]:
    """Yields clips of several views, spread evenly over a split, to be read window by window from their first frame on.

    Args:
        data: of pixels; it is made where it does not exist yet.
        count: how many clips, at most as many as the split has.
        control: control types to read; "edge" is extracted from the views where the set has none.
        split: see `held_out_clips`.

    Raises:
        ConfigError: the set has no such split or control, or holds no pixels.
        DataError: no clip can be used.
    """
    reader, decode = _split_of(data, split)
    check_control(control, reader.info.source, reader.info.root, "data.control")
    used = 0
    for sample in _spread(reader, 0, min(count, len(reader))):
        try:
            clip = _views_of(sample, decode, data.frame_stride, reader, control)
        except BadSampleError as error:
            logger.warning("held-out clip %s (%s) is left out: %s", sample.key, sample.where, error)
            continue
        used += 1
        yield clip
    if used == 0:
        raise _no_clip(reader)


def _views_of(
    sample: Sample, decode: VideoDecoder, stride: int, reader: SplitReader, control: Sequence[str]
) -> HeldOutViews:
    source, size = reader.info.source, (decode.height, decode.width)
    if sample.num_frames is None:
        raise BadSampleError("does not say how many frames it has")
    length = taken(sample.num_frames, 0, stride)
    ids = [decode.rig_names.index(view) for view in decode.views]
    told = decode.companions.read(sample, Window(0, length, stride), Draws(None), ids)

    def read(member: str) -> FrameReader:
        return FrameReader(sample.read(member), key="data.root", size=size, stride=stride)

    own = [video_member(view, decode.rig_names) for view in decode.views]
    readers: dict[str, list[FrameReader | EdgeReader | None]] = {}
    for kind in control:
        if is_extracted(kind, source):
            readers[EDGE] = [EdgeReader(read(member)) for member in own]
            continue
        members = [control_member(kind, view) for view in decode.views]
        readers[kind] = [read(member) if sample.has(member) else None for member in members]
    return HeldOutViews(
        key=sample.key,
        num_frames=length,
        views=tuple(ids),
        frames=ViewsReader([read(member) for member in own]),
        actions=told["actions"],
        caption=told["captions"],
        control=ControlReader(readers, size) if readers else None,
    )


def _split_of(data: VideoDataModule, split: str | None) -> tuple[SplitReader, VideoDecoder]:
    """Returns the samples of a split and what decodes them."""
    data.prepare_data()
    data.setup("predict")
    info = data.infos[0]
    if split is None:
        split = data.splits["predict"] if data.splits["predict"] in info.splits else data.splits["val"]
    decode = data.decoder(info, training=False)
    assert isinstance(decode, VideoDecoder), f"pixels are decoded by {type(decode).__name__}"
    return SplitReader(info, split, data.cache), decode


def _spread(reader: SplitReader, first: int, wanted: int) -> Iterator[Sample]:
    """Yields samples `first` to `wanted` of `wanted` ones that are spread evenly over a split."""
    yield from (reader[index * len(reader) // max(1, wanted)] for index in range(first, wanted))


def _no_clip(reader: SplitReader) -> DataError:
    return DataError(
        f"no clip of split {reader.split!r} of {reader.info.root} can be used. Make the set again, or give `input`."
    )


def pixel_data(data: object) -> VideoDataModule:
    """Returns a datamodule as one of pixels. Raises ConfigError where it is none."""
    if not isinstance(data, VideoDataModule):
        raise ConfigError(
            f"data is a {type(data).__name__}; expected clips of pixels to start from and to compare with. Set `data` "
            "to a set with videos, for example data=doom, or give `input`."
        )
    return data
