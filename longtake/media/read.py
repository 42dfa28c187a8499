"""Reading videos: exactly the frames asked for, or BadSampleError with a reason. No crash and no guess.

Two readers. decord reads what was checked before (`verified=True`: bytes that this project wrote, or that
passed `check_video`, and whose checksum still fits). Everything else goes to PyAV in strict mode. There is no
cheaper guard for decord: damage inside the frames shows in no header and in no packet, decord then hands out
damaged frames as good ones, and once a strict decode has found the video whole, its frames are there and
decord has nothing left to do.

Limits, checked before anything of that size is allocated, are the constants of `containers.py`: frames of at
most 8192 pixels a side and 8192 x 4320 in all, 4 GiB a read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from longtake.errors import BadSampleError, ConfigError, unknown_choice
from longtake.media import decord_reader, images, pyav_reader
from longtake.media.containers import describe
from longtake.media.images import read_image

__all__ = ["VideoInfo", "check_video", "frame_times", "iter_video", "probe_video", "read_image", "read_video"]

BACKENDS = ("auto", "decord", "pyav")
_FASTEST, _SLOWEST = 1000, Fraction(1, 100)


@dataclass(frozen=True)
class VideoInfo:
    """What a video is.

    Attributes:
        num_frames: frames that `read_video` returns for all of it.
        fps: frames per second, exact where the file is; the mean where frames are not evenly spaced (see
            `frame_times`).
        height: pixel rows as shown, that is after rotation.
        width: pixel columns as shown.
    """

    num_frames: int
    fps: Fraction
    height: int
    width: int


def read_video(
    source: Path | bytes,
    *,
    frames: Sequence[int] | None = None,
    verified: bool = False,
    backend: str = "auto",
) -> np.ndarray:
    """Returns frames of a video, uint8 [t h w c] RGB, turned upright.

    Args:
        source: a video file (mp4, m4v, mov, webm, mkv, avi, gif), its bytes, or a folder of images in natural
            order.
        frames: indices into the order of presentation, in any order and with repeats; None means all.
        verified: the bytes were checked when they were written and have not changed since, so decord may have
            them.
        backend: "auto" is decord for verified bytes where it is installed, else PyAV. "decord" and "pyav"
            insist; unverified bytes are then checked by `check_video` before decord sees them.

    Raises:
        BadSampleError: the video is damaged, cut off, absurdly large, of an unknown kind, or lacks a wanted
            frame.
        ConfigError: the backend is unknown or not installed.
        ValueError: `frames` is empty.
    """
    if frames is not None and len(frames) == 0:
        raise ValueError("no frame was asked for: `frames` is empty; expected indices, or None for all frames")
    use_decord = _use_decord(backend, verified)
    if isinstance(source, Path) and source.is_dir():
        return images.read_folder(source, frames)
    if use_decord:
        if not verified:
            check_video(source)
        try:
            return decord_reader.read(source, frames)
        except decord_reader.DecordFailedError as error:
            if backend == "decord":
                raise
            # PyAV is strict: it either reads what decord could not, or says what is wrong with the video.
            reason = str(error).rpartition("decord: ")[2]
            _say_once(f"decord: {reason}. PyAV reads instead; `data.video_reader=pyav` saves the attempt")
    if frames is None:
        return pyav_reader.read_all(source)
    wanted = np.asarray(frames, dtype=np.int64)
    if wanted.min() < 0:
        raise BadSampleError(f"{describe(source)}: frame {wanted.min()} was asked for; the first is 0")
    if np.all(np.diff(wanted) > 0):
        return pyav_reader.read_some(source, wanted)
    ascending, inverse = np.unique(wanted, return_inverse=True)
    return pyav_reader.read_some(source, ascending)[inverse]


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("longtake").info(message)


def _use_decord(backend: str, verified: bool) -> bool:
    if backend not in BACKENDS:
        raise unknown_choice("video backend", backend, BACKENDS, "backend")
    if backend == "pyav" or (backend == "auto" and not verified):
        return False
    is_there = decord_reader.load_decord() is not None
    if backend == "decord" and not is_there:
        raise ConfigError("decord is not installed; install it (requirements.txt) or set `backend` to auto or pyav.")
    return is_there


def probe_video(source: Path | bytes, *, fps: Fraction | None = None) -> VideoInfo:
    """Returns the number of frames, their rate and size. Damage inside frames shows when they are read.

    Args:
        source: as in `read_video`.
        fps: frames per second of a folder of images, which does not say; ignored for files.

    Raises:
        BadSampleError: not a readable video, or a folder of images without `fps`.
    """
    if isinstance(source, Path) and source.is_dir():
        num_frames, height, width = images.probe_folder(source)
        return VideoInfo(num_frames, _checked_rate(fps, str(source)), height, width)
    index = pyav_reader.frame_index(source)
    with pyav_reader.open_video(source) as video:
        if next(video.frames(), None) is None:
            raise BadSampleError(f"{video.name}: it holds no video frames")
        height, width = video.size()
    return VideoInfo(len(index.pts), _checked_rate(index.rate(), describe(source)), height, width)


def frame_times(source: Path | bytes, *, fps: Fraction | None = None) -> np.ndarray:
    """Returns when each frame is shown, in seconds from the first, strictly ascending, float64 [t].

    Raises:
        BadSampleError: as `probe_video`.
    """
    if isinstance(source, Path) and source.is_dir():
        rate = _checked_rate(fps, str(source))
        return np.arange(len(images.list_images(source))) * rate.denominator / rate.numerator
    return pyav_reader.frame_index(source).seconds()


def iter_video(source: Path | bytes, *, fps: Fraction | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (seconds from the first frame, uint8 [h w c]) for all frames, holding one at a time.

    Raises:
        BadSampleError: as `read_video`, once the damaged place is reached.
    """
    if isinstance(source, Path) and source.is_dir():
        for time, path in zip(frame_times(source, fps=fps), images.list_images(source), strict=True):
            yield float(time), read_image(path)
        return
    times = frame_times(source)
    count = 0
    with pyav_reader.open_video(source) as video:
        for frame in video.frames():
            if count < len(times):
                yield float(times[count]), video.rgb(frame)
            count += 1
    if count != len(times):
        raise BadSampleError(f"{describe(source)}: {count} frames came out where its packets announce {len(times)}")


def check_video(source: Path | bytes) -> VideoInfo:
    """Decodes every frame and returns what the video is, if it is whole and decord may read it from now on.

    This is what makes `verified=True` true for a video that this project did not encode.

    Raises:
        BadSampleError: a frame does not decode, or the video is of a kind that decord may read wrongly: other
            than H.264 in an mp4, frames that are decoded in another order than shown (decord takes the wrong
            key frames), frames hidden by an edit list, turned or mirrored pictures.
    """
    info = probe_video(source)
    with pyav_reader.open_video(source) as video:
        _check_packets(video)
        video.rewind()
        count = sum(1 for _ in video.frames())
        if not video.is_upright():
            raise BadSampleError(f"{video.name}: decord is only trusted with frames that are stored upright")
    if count != info.num_frames:
        raise BadSampleError(
            f"{describe(source)}: {count} frames came out where its packets announce {info.num_frames}"
        )
    return info


def _check_packets(video: pyav_reader.Video) -> None:
    """Raises BadSampleError unless decord finds the frames of such a file where they are."""
    context = video.stream.codec_context
    kind = (video.kind, context.codec.canonical_name, context.pix_fmt)
    if kind not in (("mov", "h264", "yuv420p"), ("mov", "h264", "yuvj420p")):
        raise BadSampleError(f"{video.name}: decord is only trusted with h264 in yuv420p in an mp4, this is {kind}")
    if len(video.container.streams.video) != 1:
        raise BadSampleError(f"{video.name}: decord is only trusted with one video stream in a file")
    previous, count = None, 0
    for packet in video.packets():
        if packet.size == 0:
            continue
        if packet.pts is None or (previous is not None and packet.pts <= previous):
            raise BadSampleError(f"{video.name}: decord is only trusted with frames stored in the order shown")
        previous, count = packet.pts, count + (not packet.is_discard)
    if count != video.stream.frames:
        raise BadSampleError(f"{video.name}: decord is only trusted with files whose edit list hides no frames")


def _checked_rate(fps: Fraction | None, name: str) -> Fraction:
    if fps is None:
        raise BadSampleError(f"{name}: it does not say how many frames a second it has; give it with `fps`")
    if not _SLOWEST <= fps <= _FASTEST:
        raise BadSampleError(f"{name}: {float(fps):g} frames a second; expected {float(_SLOWEST):g} to {_FASTEST}")
    return Fraction(fps)
