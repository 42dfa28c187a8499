"""Reading with PyAV, strictly: a damaged packet, a frame that does not decode or a missing frame is an error.

Nothing is repeated, concealed or dropped. One decoding thread, so that an error belongs to the frame that
caused it and loader workers do not compete for cores.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from longtake.errors import BadSampleError
from longtake.media.containers import (
    CODECS,
    MAX_FRAMES,
    MAX_PIXELS,
    ONE_FRAME_A_PACKET,
    check_read,
    check_size,
    describe,
    open_file,
    sniff,
)

_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(MAX_PIXELS)}
# PyAV 17 and later convert colours on all cores by default: slower than one core for small frames.
ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

_UPRIGHT = (1, 0, 0, 1)


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of a video are in time.

    Attributes:
        pts: presentation time of each frame in units of `time_base`, ascending, int64 [t].
        keys: those of the frames that can be decoded without others.
        time_base: seconds.
        declared_rate: frames per second by the file's header, or None.
        last_duration: how long the last frame is shown in units of `time_base`, 0 if not known.
    """

    pts: np.ndarray
    keys: np.ndarray
    time_base: Fraction
    declared_rate: Fraction | None
    last_duration: int

    def seconds(self) -> np.ndarray:
        """Returns the presentation times counted from the first frame, float64 [t]."""
        ticks = self.pts - self.pts[0]
        return ticks * self.time_base.numerator / self.time_base.denominator

    def rate(self) -> Fraction | None:
        """Returns frames per second: the header's where the time stamps bear it out, else their mean."""
        if len(self.pts) > 1:
            span = int(self.pts[-1] - self.pts[0])
            measured = Fraction(len(self.pts) - 1) / (span * self.time_base)
            # Time stamps may be rounded (webm: to milliseconds), which moves the mean by at most a unit over
            # the span.
            tolerance = max(Fraction(1, 1000), Fraction(1, span))
            if self.declared_rate and abs(self.declared_rate / measured - 1) <= tolerance:
                return self.declared_rate
            return measured.limit_denominator(100_000)
        if self.declared_rate:
            return self.declared_rate
        return 1 / (self.last_duration * self.time_base) if self.last_duration > 0 else None


class Video:
    """One open video file. Use `open_video`, which also turns whatever goes wrong into BadSampleError."""

    def __init__(self, file: Any, name: str, *, ignore_edits: bool) -> None:
        self.name = name
        kind = sniff(file, name)
        options = dict(_STRICT, ignore_editlist="1") if ignore_edits and kind == "mov" else _STRICT
        self.container: Any = av.open(file, "r", format=kind, options=options, metadata_errors="ignore")
        self.stream = _video_stream(self.container, name)
        context = self.stream.codec_context
        codec = context.codec.canonical_name
        if codec not in CODECS:
            raise BadSampleError(
                f"{name}: video codec {codec!r} is not read; expected one of {', '.join(sorted(CODECS))}"
            )
        check_size(context.height, context.width, name)
        context.options = dict(_STRICT)
        context.thread_count = 1
        self.kind = kind
        self.is_indexed = kind in ("mov", "matroska") and codec in ONE_FRAME_A_PACKET
        self.num_packets = 0
        self._reformatter = VideoReformatter()
        self._shape: tuple[int, int] | None = None
        self._orientation = _UPRIGHT

    def rewind(self, pts: int | None = None) -> None:
        """Goes back to the last key frame at or before `pts`, or to the start."""
        try:
            self.container.seek(self.stream.start_time or 0 if pts is None else pts, stream=self.stream)
        except FFmpegError as error:
            raise BadSampleError(f"{self.name}: cannot go to time {pts}: {_text(error)}") from error

    def frames(self) -> Iterator[av.VideoFrame]:
        """Yields the frames from here to the end. Raises BadSampleError at the first that is not whole."""
        count = shown = 0
        try:
            for packet in self.packets():
                shown += packet.size > 0 and not packet.is_discard
                for frame in packet.decode():
                    self._check(frame, count)
                    yield frame
                    count += 1
        except FFmpegError as error:
            raise BadSampleError(f"{self.name}: cannot be decoded after {count} frames: {_text(error)}") from error
        if count != shown and (self.kind == "mov" or self.is_indexed):
            raise BadSampleError(f"{self.name}: damaged: {count} frames came out of {shown} packets")

    def packets(self) -> Iterator[Any]:
        """Yields the packets of the video from here to the end, last an empty one."""
        self.num_packets = 0
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt or self.num_packets >= MAX_FRAMES:
                what = "damaged data" if packet.is_corrupt else "too many frames: the limit is"
                raise BadSampleError(f"{self.name}: {what} at packet {self.num_packets}")
            self.num_packets += packet.size > 0
            yield packet

    def check_count(self, source: Path | bytes) -> None:
        """Raises BadSampleError if an mp4's header says another number of packets than came from start to end."""
        declared = self.stream.frames if self.kind == "mov" else 0
        if declared and declared != self.num_packets:
            # An edit list (of a clip trimmed on a phone) may hide some: without it, all must be there.
            with open_video(source, ignore_edits=True) as video:
                stored = sum(1 for packet in video.packets() if packet.size)
            if stored != declared:
                raise BadSampleError(f"{self.name}: its header says {declared} frames, but it has {stored}")

    def _check(self, frame: av.VideoFrame, count: int) -> None:
        if frame.is_corrupt:
            raise BadSampleError(f"{self.name}: damaged frame {count}")
        if self._shape is None:
            check_size(frame.height, frame.width, self.name)
            self._shape = (frame.height, frame.width)
            self._orientation = _orientation(frame, self.name)
        elif self._shape != (frame.height, frame.width):
            raise BadSampleError(
                f"{self.name}: the size changes from {self._shape[1]}x{self._shape[0]} to "
                f"{frame.width}x{frame.height} at frame {count}"
            )

    def size(self) -> tuple[int, int]:
        """Returns (height, width) as shown, that is after rotation. A frame must have been decoded."""
        assert self._shape is not None, "no frame was decoded yet"
        height, width = self._shape
        return (height, width) if self._orientation[0] else (width, height)

    def is_upright(self) -> bool:
        """Returns whether frames are stored as they are shown."""
        return self._orientation == _UPRIGHT

    def rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns the pixels of a frame as shown, uint8 [h w c]."""
        pixels = self._reformatter.reformat(frame, format="rgb24", **ONE_THREAD).to_ndarray()
        if self.is_upright():
            return pixels
        a, b, c, d = self._orientation
        return pixels[::d, ::a] if a else pixels.transpose(1, 0, 2)[::b, ::c]


@contextmanager
def open_video(source: Path | bytes, *, ignore_edits: bool = False) -> Iterator[Video]:
    """Yields the open video; every error of the file inside the block becomes a BadSampleError."""
    name = describe(source)
    with open_file(source) as file:
        try:
            video = Video(file, name, ignore_edits=ignore_edits)
            with video.container:
                yield video
        except BadSampleError:
            raise
        except FFmpegError as error:
            raise BadSampleError(f"{name}: not a readable video: {_text(error)}") from error
        except (OSError, EOFError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
            raise BadSampleError(f"{name}: not a readable video: {error or type(error).__name__}") from error


def frame_index(source: Path | bytes) -> FrameIndex:
    """Returns when each frame is shown: from the packets where they tell, else by decoding. Kept for a few files.

    Raises:
        BadSampleError: damaged, cut off, no video, fewer or more packets than the header says, or time stamps
            that are missing or repeat.
    """
    if isinstance(source, Path) and source.is_file():
        status = source.stat()
        return _index_of_file(source, status.st_size, status.st_mtime_ns)
    with open_video(source) as video:
        return _build_index(source, video)


@functools.lru_cache(maxsize=16)
def _index_of_file(path: Path, size: int, time_ns: int) -> FrameIndex:
    with open_video(path) as video:
        return _build_index(path, video)


def _build_index(source: Path | bytes, video: Video) -> FrameIndex:
    times, duration = _frame_times(video)
    video.check_count(source)
    rate, time_base = video.stream.average_rate, video.stream.time_base
    if not times:
        raise BadSampleError(f"{video.name}: it holds no video frames")
    if any(pts is None for pts, _ in times) or not time_base:
        raise BadSampleError(f"{video.name}: frames without a time stamp")
    times.sort()
    pts = np.array([pts for pts, _ in times], np.int64)
    if np.any(np.diff(pts) <= 0):
        raise BadSampleError(f"{video.name}: two frames with the time stamp {pts[:-1][np.diff(pts) <= 0][0]}")
    keys = np.array([pts for pts, is_key in times if is_key], np.int64)
    return FrameIndex(pts, keys, Fraction(time_base), Fraction(rate) if rate else None, duration)


def _frame_times(video: Video) -> tuple[list[tuple[Any, bool]], int]:
    """Returns (pts, is it a key frame) of every frame, and how long the last one is shown (0: not known)."""
    if not video.is_indexed:
        return [(frame.pts, bool(frame.key_frame)) for frame in video.frames()], 0
    times, duration = [], 0
    for packet in video.packets():
        if packet.size and not packet.is_discard:  # hidden by the edit list: the decoder does not show these either
            times.append((packet.pts, packet.is_keyframe))
            duration = packet.duration or 0
    return times, duration


def read_all(source: Path | bytes) -> np.ndarray:
    """Returns every frame, uint8 [t h w c]."""
    count = 0
    store: np.ndarray | None = None
    with open_video(source) as video:
        for frame in video.frames():
            pixels = video.rgb(frame)
            if store is None:
                # The header of an mp4 can be checked against the rest of it; others may say anything.
                expected = (video.stream.frames if video.kind == "mov" else 0) or 64
                check_read(expected, pixels.shape[0], pixels.shape[1], video.name)
                store = np.empty((expected, *pixels.shape), np.uint8)
            elif count == len(store):
                check_read(2 * count, pixels.shape[0], pixels.shape[1], video.name)
                store = np.concatenate([store, np.empty_like(store)])
            store[count] = pixels
            count += 1
        video.check_count(source)
    if store is None:
        raise BadSampleError(f"{describe(source)}: it holds no video frames")
    return store if count == len(store) else store[:count].copy()


def read_some(source: Path | bytes, ascending: np.ndarray) -> np.ndarray:
    """Returns the frames of these indices (ascending, without repeats), uint8 [t h w c]."""
    with open_video(source) as video:
        if video.is_indexed:
            index = frame_index(source) if isinstance(source, Path) else _build_index(source, video)
            if ascending[-1] >= len(index.pts):
                raise BadSampleError(f"{video.name}: frame {ascending[-1]} was asked for, it has {len(index.pts)}")
            key = index.keys[: np.searchsorted(index.keys, index.pts[ascending[0]], side="right")][-1:]
            start = int(np.searchsorted(index.pts, key[0])) if len(key) else 0
            try:
                video.rewind(int(index.pts[start]))
                return _collect(video, ascending - start, index.pts[start:])
            except BadSampleError:
                pass  # a key frame that is none, or that needs others before it: decode from the start instead
    with open_video(source) as video:
        return _collect(video, ascending, None)


def _collect(video: Video, ascending: np.ndarray, pts: np.ndarray | None) -> np.ndarray:
    """Decodes from here and keeps the frames of these indices.

    With `pts`, each frame must be the next of these times, so that a seek that went elsewhere cannot pass
    unnoticed.
    """
    store: np.ndarray | None = None
    count = kept = 0
    for frame in video.frames():
        if pts is not None:
            if count == 0 and frame.pts is not None and frame.pts < pts[0]:
                continue
            if count >= len(pts) or frame.pts != pts[count]:
                raise BadSampleError(f"{video.name}: a frame at time {frame.pts} that its packets do not announce")
        if count == ascending[kept]:
            if store is None:
                check_read(len(ascending), *video.size(), video.name)
                store = np.empty((len(ascending), *video.size(), 3), np.uint8)
            store[kept] = video.rgb(frame)
            kept += 1
            if kept == len(ascending):
                return store
        count += 1
    raise BadSampleError(f"{video.name}: frame {ascending[kept]} was asked for, but {count} frames came out")


def _video_stream(container: Any, name: str) -> Any:
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    streams = [stream for stream in streams if stream.codec_context is not None]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise BadSampleError(f"{name}: no video stream that can be decoded; it holds {', '.join(kinds) or 'nothing'}")
    return max(streams, key=lambda stream: stream.codec_context.height * stream.codec_context.width)


def _is_cover(stream: Any) -> bool:
    """A picture of the album, say, that an audio file carries."""
    return bool(stream.disposition & Disposition.attached_pic)


def _orientation(frame: av.VideoFrame, name: str) -> tuple[int, int, int, int]:
    """Returns the signs (a, b, c, d) of the display matrix: column = a x + c y, row = b x + d y."""
    try:
        side_data: Any = frame.side_data
        data = side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # some other side data that this PyAV does not know yet
        quarter = {
            0: (1, 0, 0, 1),
            90: (0, -1, 1, 0),
            -90: (0, 1, -1, 0),
            180: (-1, 0, 0, -1),
            -180: (-1, 0, 0, -1),
        }
        signs = quarter.get(frame.rotation)
    else:
        matrix = struct.unpack("=9i", bytes(data)) if data is not None else (1, 0, 0, 0, 1)
        entries = (matrix[0], matrix[1], matrix[3], matrix[4])
        a, b, c, d = ((value > 0) - (value < 0) for value in entries)
        signs = (a, b, c, d)
        is_quarter = (a and d and not b and not c) or (b and c and not a and not d)
        if not is_quarter or len({abs(value) for value in entries} - {0}) != 1:
            signs = None
    if signs is None:
        raise BadSampleError(f"{name}: shown turned or skewed; expected a turn by 0, 90, 180 or 270 degrees")
    return signs


def _text(error: FFmpegError) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
