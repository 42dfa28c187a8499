"""Frames of one recording (a video, its bytes, a list of images) in order, each with its true time.

Only one frame is decoded at a time and nothing is turned into RGB unless it is asked for, so a recording of
any length is read in constant memory. Decoding is strict: the first frame that the decoder had to patch up
ends the recording with a BadSampleError, and so does a file that holds less than its header promises. What
came before is good.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps

from longtake.errors import BadSampleError

VIDEO_EXTENSIONS = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".gif", ".m4v")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Demuxers that only ever read the file they are given: no playlists, no subtitles that draw themselves, no
# raw text.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif",
    "protocol_whitelist": "file",
}
_COUNTED_DEMUXER = "mov,mp4,m4a,3gp,3g2,mj2"  # the one whose header states the exact number of frames
_MAX_PIXELS = 2**26
_DECODE_ERRORS = (FFmpegError, OSError, ValueError, EOFError, MemoryError, OverflowError)


@dataclass(frozen=True)
class TimedFrame:
    """One frame of a recording.

    Attributes:
        index: its number in the recording, from 0.
        time: seconds on the recording's own clock, when it comes on screen.
        duration: seconds that it is meant to stay, or None where the recording does not say.
        pixel_aspect: width of a pixel over its height.
        load: returns the picture, RGB; `load((width, height))` a small one, not turned upright, at less cost.
        scene: number of cuts before it, where they are looked for.
    """

    index: int
    time: Fraction
    duration: Fraction | None
    pixel_aspect: Fraction
    load: Callable[..., Image.Image]
    scene: int = 0


@dataclass(frozen=True)
class Summary:
    """What is known of a recording without decoding it.

    Attributes:
        num_frames: exact number of frames, or None where only decoding would tell.
        fps: mean frames per second by the time stamps, or None for a single frame.
        slack: seconds by which a time stamp may be off, because the container rounds it to its clock.
    """

    num_frames: int | None
    fps: Fraction | None
    slack: Fraction


class FrameReader(ABC):
    """A recording that can be read from its beginning, any number of times."""

    @abstractmethod
    def summary(self) -> Summary:
        """Returns what the headers say. Raises BadSampleError when the recording cannot be opened."""

    @abstractmethod
    def frames(self) -> Iterator[TimedFrame]:
        """Yields every frame in the order of its time. Raises BadSampleError at the first thing wrong."""

    def count_frames(self) -> int:
        """Returns the exact number of frames, by decoding all of them where nothing else would tell."""
        known = self.summary().num_frames
        return sum(1 for _ in self.frames()) if known is None else known


class VideoReader(FrameReader):
    """A video file (a path or its bytes), decoded by PyAV on one thread."""

    def __init__(self, source: Path | bytes) -> None:
        self._source = source

    def summary(self) -> Summary:
        times: list[int] = []
        discarded = 0
        with self._open() as (container, stream):
            base = stream.time_base
            for packet in container.demux(stream):
                stamp = packet.pts if packet.pts is not None else packet.dts
                if packet.size and packet.is_discard:
                    discarded += 1  # outside the edit list: stored, never shown
                elif packet.size and stamp is not None:
                    times.append(stamp)
            exact = container.format.name == _COUNTED_DEMUXER and stream.frames > 0
            num_frames = stream.frames - discarded if exact else None
        if not times or base is None:
            raise BadSampleError("it holds no video frame")
        times.sort()
        span = (times[-1] - times[0]) * base
        interval = span / (len(times) - 1) if len(times) > 1 else Fraction(0)
        # A clock that ticks at least twice a frame is one to which the true times were rounded; one that
        # ticks once a frame (avi) is the frame rate itself and exact.
        slack = base / 2 if 2 * base <= interval else Fraction(0)
        return Summary(num_frames, 1 / interval if interval > 0 else None, slack)

    def frames(self) -> Iterator[TimedFrame]:
        index, last, packets = 0, None, 0
        with self._open() as (container, stream):
            if container.format.name == "gif" and not _gif_is_whole(self._source):
                raise BadSampleError("the file was cut")  # its decoder would fill up the last frame in silence
            base, rate = stream.time_base or Fraction(0), stream.average_rate or stream.guessed_rate
            for packet in container.demux(stream):
                packets += packet.size > 0
                if packet.is_corrupt:
                    raise BadSampleError(f"the data after frame {index} is damaged")
                for frame in packet.decode():
                    time = self._time(frame, base, last, rate)
                    if frame.is_corrupt:
                        raise BadSampleError(f"frame {index} is damaged")
                    if last is not None and time < last:
                        raise BadSampleError(
                            f"the time of frame {index} ({float(time):.3f} s) lies before that of the one before"
                        )
                    duration = frame.duration * base if frame.duration else None
                    yield TimedFrame(index, time, duration, _pixel_aspect(stream), _loader(frame))
                    index, last = index + 1, time
            self._check_end(container, stream, packets, index, last)

    @staticmethod
    def _time(frame: Any, base: Fraction, last: Fraction | None, rate: Fraction | None) -> Fraction:
        if frame.pts is not None:
            return frame.pts * base
        if last is None:
            return Fraction(0)
        if not rate:
            raise BadSampleError("its frames carry no time and the file states no frame rate")
        return last + 1 / Fraction(rate)

    def _check_end(self, container: Any, stream: Any, packets: int, index: int, last: Fraction | None) -> None:
        """Raises BadSampleError where less came than was promised: a cut file may decode without an error."""
        if index == 0:
            raise BadSampleError("it holds no video frame that can be decoded")
        if container.format.name == _COUNTED_DEMUXER and packets < stream.frames:
            raise BadSampleError(f"the file was cut: {packets} of {stream.frames} frames are there")
        promised = _seconds(stream.duration, stream.time_base) or _seconds(
            container.duration, Fraction(1, av.time_base)
        )
        start = _seconds(stream.start_time, stream.time_base) or Fraction(0)
        if promised is None or last is None:
            return
        shown = last - start
        interval = shown / (index - 1) if index > 1 else Fraction(1, 2)
        # With sound the length in the header may be that of the sound, so that only a gross difference
        # counts.
        slack = max(Fraction(1), promised / 20) if len(container.streams) > 1 else 3 * interval + Fraction(1, 50)
        if promised - shown - interval > slack:
            raise BadSampleError(
                f"the file was cut: its header promises {float(promised):.2f} s, the pictures end at "
                f"{float(shown + interval):.2f} s"
            )

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source.absolute())
        try:
            with av.open(source, mode="r", options=_OPEN_OPTIONS, metadata_errors="replace") as container:
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams:
                    raise BadSampleError("it holds no video")
                stream = streams[0]
                if stream.codec_context is None or stream.width * stream.height == 0:
                    raise BadSampleError("its video has no size, or a codec that is not supported")
                if stream.width * stream.height > _MAX_PIXELS:
                    raise BadSampleError(
                        f"its frames of {stream.width}x{stream.height} are larger than {_MAX_PIXELS} pixels"
                    )
                stream.codec_context.thread_count = 1
                # A damaged header may name another size half-way: the decoder refuses it before it allocates.
                stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
                yield container, stream
        except BadSampleError:
            raise
        except _DECODE_ERRORS as error:
            raise BadSampleError(f"it cannot be decoded ({reason_of(error)})") from error


class ImageSequenceReader(FrameReader):
    """Image files of one size, shown one after the other at a fixed rate."""

    def __init__(self, paths: Sequence[Path], fps: Fraction) -> None:
        self._paths = list(paths)
        self._fps = fps

    def summary(self) -> Summary:
        return Summary(len(self._paths), self._fps, Fraction(0))

    def frames(self) -> Iterator[TimedFrame]:
        size: tuple[int, int] | None = None
        for index, path in enumerate(self._paths):
            image = load_image(path)
            if size is not None and image.size != size:
                raise BadSampleError(
                    f"{path.name} is {image.width}x{image.height}, the images before it {size[0]}x{size[1]}"
                )
            size = image.size
            yield TimedFrame(index, index / self._fps, 1 / self._fps, Fraction(1), _constant(image))


def load_image(path: Path) -> Image.Image:
    """Returns an image file as 8-bit RGB, upright; transparent parts are black. Raises BadSampleError."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise BadSampleError(f"{path.name} is {opened.width}x{opened.height}, larger than {_MAX_PIXELS} pixels")
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
                return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert(
                    "RGB"
                )
            if image.has_transparency_data:
                black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
            return image.convert("RGB")
    except BadSampleError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise BadSampleError(f"{path.name} cannot be read ({reason_of(error)})") from error


def reason_of(error: BaseException) -> str:
    """Returns the message of an error in one line, without the path that the caller names anyway."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


def _constant(image: Image.Image) -> Callable[..., Image.Image]:
    return lambda size=None: image if size is None else image.resize(size, Image.Resampling.BOX)


def _loader(frame: Any) -> Callable[..., Image.Image]:
    def load(size: tuple[int, int] | None = None) -> Image.Image:
        try:
            if size is not None:
                small = frame.reformat(width=size[0], height=size[1], format="rgb24", interpolation=Interpolation.AREA)
                return Image.fromarray(small.to_ndarray())
            picture = frame.to_ndarray(format="rgb24")
        except _DECODE_ERRORS as error:
            raise BadSampleError(f"a frame cannot be converted to RGB ({reason_of(error)})") from error
        turns = round((frame.rotation or 0) / 90) % 4  # phones store the picture lying and a note to turn it
        return Image.fromarray(np.ascontiguousarray(np.rot90(picture, turns)))

    return load


def _pixel_aspect(stream: Any) -> Fraction:
    aspect = stream.sample_aspect_ratio
    return Fraction(aspect) if aspect and aspect > 0 else Fraction(1)


def _seconds(count: int | None, base: Fraction | None) -> Fraction | None:
    return count * base if count is not None and count > 0 and base else None


def _gif_is_whole(source: Path | bytes) -> bool:
    if isinstance(source, Path):
        with source.open("rb") as file:
            file.seek(max(0, source.stat().st_size - 64))
            tail = file.read()
    else:
        tail = source[-64:]
    return tail.rstrip(b"\0").endswith(b";")
