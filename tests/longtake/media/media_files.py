"""Video files of many kinds for the tests, made with PyAV; and the frames that go into them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image


def moving_frames(num_frames: int, height: int = 48, width: int = 64, *, seed: int = 0) -> np.ndarray:
    """A window that glides over a smooth, mildly coloured picture with a little grain: uint8 [t h w c]."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 216, (3 * height // 16 + 2, 3 * width // 16 + 2, 3)).astype(np.float64)
    coarse = 0.4 * coarse + 0.6 * coarse.mean(axis=2, keepdims=True)
    picture = Image.fromarray(coarse.astype(np.uint8)).resize((3 * width, 3 * height), Image.Resampling.BICUBIC)
    grain = generator.integers(-3, 4, (3 * height, 3 * width, 1))
    pixels = np.clip(np.asarray(picture).astype(np.int64) + grain, 0, 255).astype(np.uint8)
    step = np.arange(num_frames)
    tops = (height * (1 + 0.9 * np.cos(step / 11))).astype(int)
    lefts = (width * (1 + 0.9 * np.sin(step / 17))).astype(int)
    return np.stack([pixels[y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 arrays in dB."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def make_video(
    frames: np.ndarray,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    fps: Fraction = Fraction(25),
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    audio: bool = False,
) -> bytes:
    """An encoded file; `times` are presentation times in milliseconds where frames are not evenly spaced."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"  # FFmpeg opens the file a second time to move the header to the front
        _write_video(path, frames, container, codec, pixels, fps, times, options, container_options, audio)
        return path.read_bytes()


def _write_video(
    path: Path,
    frames: np.ndarray,
    container: str,
    codec: str,
    pixels: str,
    fps: Fraction,
    times: Sequence[int] | None,
    options: dict[str, str] | None,
    container_options: dict[str, str] | None,
    audio: bool,
) -> None:
    with av.open(str(path), "w", format=container, container_options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        time_base = Fraction(1, 1000) if times is not None else 1 / fps
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        sound = output.add_stream("aac", rate=44100) if audio else None
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (index if times is None else times[index]), time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            for packet in _silence(sound):
                output.mux(packet)


def make_audio() -> bytes:
    """An mp4 that holds sound only."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        for packet in _silence(stream):
            output.mux(packet)
    return target.getvalue()


def _silence(stream: Any) -> Iterator[Any]:
    for index in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 1024 * index
        yield from stream.encode(frame)
    yield from stream.encode(None)


def find_box(data: bytes, path: str) -> tuple[int, int]:
    """The first and the last + 1 byte of the contents of an mp4 box, for instance "moov/trak/tkhd"."""
    start, end = 0, len(data)
    for name in path.split("/"):
        position = start
        while data[position + 4 : position + 8] != name.encode():
            position += int.from_bytes(data[position : position + 4], "big")
            assert position < end, f"no box {name} of {path}"
        start, end = position + 8, position + int.from_bytes(data[position : position + 4], "big")
    return start, end


def patched(data: bytes, position: int, new: bytes) -> bytes:
    """The same bytes with some replaced."""
    return data[:position] + new + data[position + len(new) :]


def rotated(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The mp4 with the display matrix (a, b, c, d) in its track header, as phones write it."""
    start, end = find_box(data, "moov/trak/tkhd")
    a, b, c, d = (value * 65536 for value in matrix)
    numbers = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return patched(data, end - 44, b"".join(number.to_bytes(4, "big", signed=True) for number in numbers))
