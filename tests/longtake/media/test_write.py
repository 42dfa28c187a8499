from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from longtake.errors import ConfigError, DataError
from longtake.media import decord_reader, write
from longtake.media.read import frame_times, probe_video, read_video
from longtake.media.write import VideoWriter, encode_video, save_image, write_bytes

ROOT = Path(__file__).parents[3]
FPS = Fraction(35, 3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BACKENDS = ("pyav", "decord") if decord_reader.load_decord() else ("pyav",)


@pytest.mark.parametrize("num_frames", [1, 2, 97])
def test_every_frame_comes_back(media_files: ModuleType, num_frames: int) -> None:
    frames = media_files.moving_frames(num_frames)
    data = encode_video(frames, fps=FPS, crf=10)
    for backend in BACKENDS:
        read = read_video(data, verified=True, backend=backend)
        assert read.shape == frames.shape
        assert min(media_files.psnr(a, b) for a, b in zip(read, frames, strict=True)) > 36


@pytest.mark.parametrize("rate", ["35/3", "30000/1001", "24000/1001", "25", "25/2", "1", "60", "1/2", "999/7"])
def test_frame_rates_survive_exactly(rate: str) -> None:
    fps = Fraction(rate)
    frames = np.zeros((7, 16, 16, 3), np.uint8)
    for count in (1, 7):
        data = encode_video(frames[:count], fps=fps)
        assert probe_video(data).fps == fps
        np.testing.assert_allclose(frame_times(data), np.arange(count) / float(fps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_colour_shift(media_files: ModuleType, backend: str) -> None:
    colours = [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
        (0, 255, 255),
        (255, 0, 255),
        (200, 50, 20),
    ]
    for colour in [*colours, (20, 160, 220), (0, 0, 0), (128, 128, 128), (255, 255, 255)]:
        frames = np.broadcast_to(np.array(colour, np.uint8), (3, 48, 64, 3))
        read = read_video(encode_video(frames, fps=FPS), verified=True, backend=backend)
        assert np.abs(read.reshape(-1, 3).mean(axis=0) - colour).max() <= 2.1, colour
    frames = media_files.moving_frames(20)
    read = read_video(encode_video(frames, fps=FPS), verified=True, backend=backend)
    for channel in range(3):
        assert media_files.psnr(read[..., channel], frames[..., channel]) > 35
    shift = (read.astype(np.float64) - frames).reshape(-1, 3).mean(axis=0)
    assert np.abs(shift).max() < 2, shift


def test_odd_sizes_are_padded_by_their_edge(media_files: ModuleType) -> None:
    frames = media_files.moving_frames(4, 47, 63)
    read = read_video(encode_video(frames, fps=FPS, crf=1))
    assert read.shape == (4, 48, 64, 3)
    assert media_files.psnr(read[:, :47, :63], frames) > 36
    assert media_files.psnr(read[:, 47, :63], frames[:, 46]) > 33


def test_equal_frames_give_equal_bytes(media_files: ModuleType) -> None:
    frames = media_files.moving_frames(33)
    data = encode_video(frames, fps=FPS)
    assert data == encode_video(np.asfortranarray(frames), fps=FPS)
    generator, alive = np.random.default_rng(0), []
    for _ in range(100):  # what an encoder reads beyond its buffers is different each time
        alive.append(generator.bytes(int(generator.integers(1, 20_000))))
        assert data == encode_video(frames, fps=FPS)
    assert not any(mark in data for mark in (b"Lavf", b"Lavc", b"creation_time"))
    code = """
import hashlib, sys
from fractions import Fraction
import numpy as np
from longtake.media.write import encode_video
frames = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(33, 48, 64, 3)
print(hashlib.sha256(encode_video(frames, fps=Fraction(35, 3))).hexdigest())
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), TZ="Asia/Tokyo")
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, input=frames.tobytes(), capture_output=True, timeout=60, env=environment, check=True
    )
    assert result.stdout.decode().strip() == hashlib.sha256(data).hexdigest()


def test_key_frames_come_every_gop_frames(media_files: ModuleType) -> None:
    import av

    data = encode_video(media_files.moving_frames(40), fps=FPS, gop=12)
    import io

    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 12, 24, 36]
    assert all(packet.pts == packet.dts for packet in packets)


def test_settings_that_cannot_be_encoded_are_named() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for settings in ({"fps": Fraction(0)}, {"fps": Fraction(5000)}, {"fps": Fraction(100003, 4001)}):
        with pytest.raises(ConfigError, match="video.fps"):
            encode_video(frames, **settings)
    with pytest.raises(ConfigError, match="crf=70"):
        encode_video(frames, fps=FPS, crf=70)
    for wrong in (frames[:0], frames[0], frames.astype(np.float32), frames[..., :1]):
        with pytest.raises(ValueError, match="expected uint8"):
            encode_video(wrong, fps=FPS)


def test_writer_streams_the_same_bytes(media_files: ModuleType, tmp_path: Path) -> None:
    frames = media_files.moving_frames(50)
    path = tmp_path / "new folder" / "video.mp4"
    with VideoWriter(path, fps=FPS, height=48, width=64) as writer:
        for start in range(0, 50, 7):
            writer.write(frames[start : start + 7])
        assert not path.exists()
    assert writer.num_frames == 50
    assert path.read_bytes() == encode_video(frames, fps=FPS)
    assert names(path.parent) == ["video.mp4"]


def test_an_exception_leaves_no_file_and_keeps_the_old_one(media_files: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), VideoWriter(path, fps=FPS, height=48, width=64) as writer:  # noqa: PT012
        writer.write(media_files.moving_frames(30))
        raise KeyError("stop")
    with (
        pytest.raises(ValueError, match="height, width"),
        VideoWriter(path, fps=FPS, height=48, width=64) as writer,
    ):
        writer.write(media_files.moving_frames(3, 32, 64))
    with pytest.raises(DataError, match="no frame"), VideoWriter(path, fps=FPS, height=48, width=64):
        pass
    with pytest.raises(ConfigError):
        VideoWriter(path, fps=Fraction(0), height=48, width=64)
    assert names(tmp_path) == ["video.mp4"]
    assert path.read_bytes() == b"old"


FULL_DISK = """
import resource, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from longtake.errors import DataError
from longtake.media.write import VideoWriter, save_image, write_bytes
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def video():
    with VideoWriter(folder / "video.mp4", fps=Fraction(10), height=64, width=96) as writer:
        for frame in noise:
            writer.write(frame[None])

for name, attempt in {
    "video": video,
    "image": lambda: save_image(folder / "image.png", noise[0]),
    "bytes": lambda: write_bytes(folder / "data.bin", bytes(500_000)),
}.items():
    try:
        attempt()
        print(name, "written")
    except DataError as error:
        print(name, "DataError", error)
"""


@pytest.mark.parametrize("limit", [0, 10, 4000, 40_000, 300_000])
def test_a_full_disk_is_one_message_and_no_file(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    for name in ("video", "bytes") if limit > 18_000 else ("video", "image", "bytes"):
        assert lines[name].startswith(f"DataError {tmp_path}"), lines
        assert "too large" in lines[name], lines
    assert {path.name for path in tmp_path.iterdir()} <= {"image.png"}


def test_disk_full_only_when_the_file_is_finished(
    media_files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write.os, "fsync", no_space)
    with (
        pytest.raises(DataError, match="No space left"),
        VideoWriter(tmp_path / "a.mp4", fps=FPS, height=48, width=64) as writer,
    ):
        writer.write(media_files.moving_frames(5))
    with pytest.raises(DataError, match="No space left"):
        save_image(tmp_path / "a.png", media_files.moving_frames(1)[0])
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for attempt in (
        lambda: VideoWriter(tmp_path / "file" / "a.mp4", fps=FPS, height=48, width=64),
        lambda: write_bytes(tmp_path / "file" / "a.bin", b"x"),
    ):
        with pytest.raises(DataError, match="cannot be written"):
            attempt()


def test_memory_of_the_writer_does_not_grow_with_length(tmp_path: Path) -> None:
    code = """
import resource, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from longtake.media.write import VideoWriter
noise = np.random.default_rng(0).integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with VideoWriter(Path(sys.argv[1]), fps=Fraction(10), height=96, width=128, crf=35) as writer:
    for _ in range(15):
        writer.write(noise)
    before = peak()
    for _ in range(150):
        writer.write(noise)
print(peak() - before)
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", code, str(tmp_path / "long.mp4")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert (tmp_path / "long.mp4").stat().st_size > 4 << 20  # what a growing writer would hold
    assert float(result.stdout) < 2  # MiB
    assert probe_video(tmp_path / "long.mp4").num_frames == 3300


def test_save_image(tmp_path: Path, media_files: ModuleType) -> None:
    frame = media_files.moving_frames(1)[0]
    save_image(tmp_path / "a.png", frame[:, ::-1])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), frame[:, ::-1])
    for wrong in (frame.astype(np.float32), frame[..., :2], frame[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            save_image(tmp_path / "b.png", wrong)
    assert names(tmp_path) == ["a.png"]
