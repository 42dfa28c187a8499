"""Reading videos strictly: what is whole comes out exactly, what is not ends with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from datamodules.sources.frame_stream import ImageSequenceReader, TimedFrame, VideoReader, load_image
from datamodules.sources.scene_cuts import number_scenes
from longtake.errors import BadSampleError
from tests.datamodules.sources.numbered_clips import encode, numbered_frame, read_number

KINDS = [
    ("mp4", "libx264", "yuv420p"),
    ("mov", "libx264", "yuv420p"),
    ("matroska", "libx264", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "mjpeg", "yuvj420p"),
    ("gif", "gif", "gray"),
]


def clip(kind: tuple[str, str, str], count: int = 30) -> bytes:
    return encode([numbered_frame(i) for i in range(count)], container=kind[0], codec=kind[1], pix_fmt=kind[2])


def decoded(source: bytes | Path) -> tuple[list[int], str]:
    """Returns the numbers of the frames that came before the end, and the reason of the end."""
    found: list[int] = []
    try:
        for frame in VideoReader(source).frames():
            found.append(read_number(np.asarray(frame.load())))
    except BadSampleError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_every_frame_comes_back_with_its_time(kind: tuple[str, str, str]) -> None:
    data = clip(kind)
    assert decoded(data) == (list(range(30)), "")
    times = [frame.time for frame in VideoReader(data).frames()]
    assert np.allclose([float(time - times[0]) for time in times], np.arange(30) / 10, atol=1e-3)
    summary = VideoReader(data).summary()
    assert summary.fps is not None
    assert abs(summary.fps - 10) < 0.01
    assert VideoReader(data).count_frames() == 30


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_a_cut_file_says_so_and_gives_only_good_frames(kind: tuple[str, str, str], share: float) -> None:
    data = clip(kind)
    found, reason = decoded(data[: int(len(data) * share)])
    assert reason
    assert found == list(range(len(found)))


def test_a_cut_fast_start_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "fast.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(40):
            picture = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    whole = path.read_bytes()
    for source in (whole[: len(whole) // 2], whole[: len(whole) - 400]):
        frames, error = 0, ""
        try:
            for _ in VideoReader(source).frames():
                frames += 1
        except BadSampleError as caught:
            error = str(caught)
        assert error
        assert frames < 40


def test_flipped_bytes_never_pass_as_a_whole_h264_file() -> None:
    data = clip(KINDS[0], 60)
    rng = np.random.default_rng(0)
    caught = 0
    for _ in range(25):
        damaged = np.frombuffer(data, np.uint8).copy()
        begin, end = data.index(b"mdat") + 800, data.rindex(b"moov") - 8
        at = rng.integers(begin, end, 20)
        damaged[at] ^= rng.integers(1, 256, 20).astype(np.uint8)
        found, reason = decoded(damaged.tobytes())
        caught += bool(reason)
        assert len(found) <= 60
    assert caught >= 24, "a flip may fall on a byte that no frame uses; nearly all must be noticed"


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\0" * 2000,
        b"plain text\n" * 50,
        b"GIF89a",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    ],
    ids=["empty", "zeros", "text", "gif-head", "playlist", "concat", "png-head"],
)
def test_what_is_no_video_is_refused(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(junk)
    for source in (junk, path):
        with pytest.raises(BadSampleError):
            VideoReader(source).summary()
        assert decoded(source)[1]


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(clip(KINDS[0], 5))
    assert decoded(path) == ([0, 1, 2, 3, 4], "")


def test_images_of_every_kind_become_rgb(tmp_path: Path) -> None:
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 0], deep >> 8)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert not np.asarray(load_image(tmp_path / "clear.png")).any()
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 6)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    with pytest.raises(BadSampleError, match=r"bad\.png"):
        load_image(tmp_path / "bad.png")


def test_images_of_different_sizes_are_no_recording(tmp_path: Path) -> None:
    for index, size in enumerate([(8, 8), (8, 8), (9, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    reader = ImageSequenceReader(sorted(tmp_path.iterdir()), Fraction(10))
    with pytest.raises(BadSampleError, match="9x8"):
        list(reader.frames())


def scene(seed: int, count: int, speed: int) -> list[np.ndarray]:
    """Returns a camera moving over a picture of soft blobs."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 40, 3)).astype(np.uint8))
    wide = np.asarray(small.resize((800, 48), Image.Resampling.BICUBIC))
    return [wide[:, i * speed : i * speed + 64] for i in range(count)]


def scenes_of(frames: list[np.ndarray]) -> list[int]:
    reader = VideoReader(encode(frames, rate=25))
    found = [frame.scene for frame in number_scenes(reader.frames(), min_change=12.0, min_ratio=3.0)]
    assert len(found) == len(frames)
    return found


def test_cuts_are_found_to_the_frame_and_a_fast_pan_is_none() -> None:
    lengths = [30, 20, 40]
    parts = [scene(1, lengths[0], 1), scene(2, lengths[1], 6), scene(3, lengths[2], 3)]
    found = scenes_of([frame for part in parts for frame in part])
    assert found == [0] * 30 + [1] * 20 + [2] * 40
    assert set(scenes_of(scene(4, 60, 10))) == {0}
    assert set(scenes_of([scene(5, 1, 0)[0]] * 30)) == {0}, "a still has no cut"


def test_damage_after_a_cut_still_gives_the_frames_before() -> None:
    data = encode(scene(1, 30, 2) + scene(2, 30, 2), container="matroska", rate=25)
    reader = VideoReader(data[: int(len(data) * 0.8)])
    whole, reason = until_error(reader.frames())
    found, same_reason = until_error(number_scenes(reader.frames(), min_change=12.0, min_ratio=3.0))
    assert reason == same_reason != ""
    assert len(found) == len(whole) > 30
    assert [frame.scene for frame in found[29:31]] == [0, 1]


def until_error(frames: Iterator[TimedFrame]) -> tuple[list[TimedFrame], str]:
    found: list[TimedFrame] = []
    try:
        found.extend(frames)
    except BadSampleError as error:
        return found, str(error)
    return found, ""
