"""Edges on the fly: lines of one pixel where brightness jumps, strong ones drag weak ones along."""

from __future__ import annotations

import numpy as np
import pytest

from longtake.errors import ConfigError
from longtake.media.edges import PRESETS, canny, edge_video, grey


def test_a_step_is_one_line() -> None:
    frames = np.zeros((2, 12, 16, 3), np.uint8)
    frames[:, :, 8:] = 200
    edges = edge_video(frames)
    assert edges.dtype == np.uint8
    assert edges.shape == frames.shape
    columns = np.flatnonzero(edges[0, 5, :, 0])
    assert len(columns) == 1
    assert columns[0] in (7, 8)
    assert (edges[:, :, columns[0]] == 255).all()


def test_a_square_has_four_sides_and_no_inside() -> None:
    frames = np.zeros((1, 20, 20, 3), np.uint8)
    frames[:, 5:15, 5:15] = 255
    edges = edge_video(frames)[0, :, :, 0] > 0
    assert not edges[7:13, 7:13].any()
    assert not edges[:3].any()
    assert 30 <= edges.sum() <= 44


def test_weak_edges_count_only_where_they_touch_strong_ones() -> None:
    brightness = np.zeros((1, 20, 30), np.uint8)
    brightness[:, :, 10:] = 20  # magnitude 80 along the whole column
    alone = canny(brightness, 50, 100)
    assert not alone.any()
    brightness[:, 8:12, 10:] = 120  # and a strong piece in its middle
    assert canny(brightness, 50, 100)[0, :, 9:11].any(axis=1).all()
    brightness[:, :, 25:] += 20  # another weak column that touches nothing strong but the band's edges
    assert canny(brightness, 50, 1000).sum() == 0


def test_presets_go_from_many_to_few() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1, 40, 40, 3)).astype(np.uint8)
    counts = [int((edge_video(noise, preset) > 0).sum()) for preset in PRESETS]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_frames_do_not_depend_on_each_other() -> None:
    frames = np.random.default_rng(1).integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    together = edge_video(frames)
    assert np.array_equal(together[1], edge_video(frames[1:2])[0])


def test_brightness_is_that_of_rec_601() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    assert grey(colours).tolist() == [76, 150, 29, 255]


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match="'strong'; expected one of"):
        edge_video(np.zeros((1, 4, 4, 3), np.uint8), "strong")
