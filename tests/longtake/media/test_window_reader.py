"""Videos read window by window: the frames of a video read at once, with one window held."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from longtake.errors import ConfigError
from longtake.media.edges import edge_video
from longtake.media.read import read_video
from longtake.media.window_reader import ControlReader, EdgeReader, FrameReader, probe, stride_of, taken
from longtake.media.write import encode_video


def video(folder: Path, count: int = 30, size: tuple[int, int] = (16, 24), name: str = "a.mp4") -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    (folder / name).write_bytes(encode_video(frames, fps=Fraction(30)))
    return folder / name


@pytest.mark.parametrize(("first", "stride"), [(0, 1), (3, 1), (0, 3), (4, 2)])
@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_windows_are_those_of_the_whole_video(tmp_path: Path, first: int, stride: int, overlap: int) -> None:
    path = video(tmp_path)
    whole = read_video(path)[first::stride]
    assert len(whole) == taken(30, first, stride)
    for source in (path, path.read_bytes()):
        reader = FrameReader(source, key="a", size=(16, 24), first=first, stride=stride)
        for start in range(0, 40, 9 - overlap):  # the last windows lie past the end
            wanted = whole[np.minimum(np.arange(start, start + 9), len(whole) - 1)]
            assert np.array_equal(reader.window(start, start + 9), wanted)


def test_reading_may_begin_anywhere(tmp_path: Path) -> None:
    path = video(tmp_path)
    whole = read_video(path)
    reader = FrameReader(path, key="a", size=(16, 24), first=2)
    assert np.array_equal(reader.window(7, 12), whole[9:14])
    assert np.array_equal(reader.window(11, 16), whole[13:18])


def test_edges_are_those_of_each_frame(tmp_path: Path) -> None:
    path = video(tmp_path)
    edges = EdgeReader(FrameReader(path, key="a", size=(16, 24)), "very_high")
    wanted = edge_video(read_video(path), "very_high")
    assert np.array_equal(edges.window(0, 9), wanted[:9])
    assert np.array_equal(edges.window(8, 17), wanted[8:17])
    assert 0 < wanted.mean() < 128


def test_a_mask_says_where_control_counts(tmp_path: Path) -> None:
    frames = np.zeros((9, 16, 24, 3), np.uint8)
    frames[4:, :, 12:] = 255
    (tmp_path / "mask.mp4").write_bytes(encode_video(frames, fps=Fraction(10)))
    read = {"depth": [FrameReader(video(tmp_path), key="a", size=(16, 24)), None]}
    masks = {"depth": [FrameReader(tmp_path / "mask.mp4", key="b", size=(16, 24)), None]}
    found = ControlReader(read, (16, 24), masks).where(0, 9)["depth"]
    assert found.shape == (2, 9, 16, 24)
    assert np.abs(found[0] - frames[..., 0] / 255).mean() < 0.02
    assert found[1].min() == 1  # a view without a mask: everywhere
    assert ControlReader(read, (16, 24)).where(0, 9) == {}


def test_frames_of_another_size_are_fitted(tmp_path: Path) -> None:
    reader = FrameReader(video(tmp_path, 3, (32, 64)), key="a", size=(16, 16))
    assert reader.window(0, 3).shape == (3, 16, 16, 3)


def test_views_without_a_video_are_black(tmp_path: Path) -> None:
    path = video(tmp_path)
    readers = {"depth": [None, FrameReader(path, key="a", size=(16, 24))]}
    control = ControlReader(readers, (16, 24))
    found = control.window(0, 9)["depth"]
    assert (control.types, control.there("depth"), found.shape) == (("depth",), [False, True], (2, 9, 16, 24, 3))
    assert not found[0].any()
    assert np.array_equal(found[1], read_video(path)[:9])


def test_what_cannot_be_read_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="`rear.control_path`"):
        probe(tmp_path / "b.mp4", "rear.control_path")
    with pytest.raises(ConfigError, match="`rear.control_path`"):
        FrameReader(tmp_path / "b.mp4", key="rear.control_path", size=(16, 24)).window(0, 3)
    with pytest.raises(ConfigError, match="has no frames there.*`rear.control_path`"):
        FrameReader(video(tmp_path, 3), key="rear.control_path", size=(16, 24), first=5).window(0, 3)


@pytest.mark.parametrize(
    ("found", "wanted", "stride"),
    [("30", "10", 3), ("10", "10", 1), ("10", "7", None), ("10", "20", None), ("35/3", "35/6", 2)],
)
def test_rates_must_divide(found: str, wanted: str, stride: int | None) -> None:
    assert stride_of(Fraction(found), Fraction(wanted)) == stride
