"""Pixel frames, latent frames and chunks."""

from __future__ import annotations

import pytest
import torch

from longtake.errors import ConfigError
from longtake.geometry import (
    covering_latent_frames,
    group_by_latent,
    latent_frames,
    pixel_frames,
    pixel_range,
    whole_chunks,
)


@pytest.mark.parametrize(("px", "lat"), [(1, 1), (5, 2), (81, 21), (141, 36), (165, 42), (333, 84)])
def test_latent_frames_and_back(px: int, lat: int) -> None:
    assert latent_frames(px, 4, "num_frames") == lat
    assert pixel_frames(lat, 4) == px


def test_off_the_lattice_names_the_two_nearest_and_the_key() -> None:
    with pytest.raises(ConfigError, match=r"num_frames is 80.*77 or 81.*`num_frames`"):
        latent_frames(80, 4, "num_frames")


def test_covering_latent_frames_is_the_smallest_that_holds_them() -> None:
    for px in range(200):
        lat = covering_latent_frames(px, 4)
        assert pixel_frames(lat, 4) >= px
        assert lat == 0 or pixel_frames(lat - 1, 4) < px


def test_pixel_ranges_follow_each_other_without_gap() -> None:
    assert pixel_range(0, 1, 4) == (0, 1)
    assert pixel_range(2, 3, 4) == (5, 9)  # latent k codes 4k-3..4k
    edges = [pixel_range(start, start + 3, 4) for start in range(0, 21, 3)]
    assert edges[0] == (0, 9)
    assert all(a[1] == b[0] for a, b in zip(edges, edges[1:], strict=False))
    assert edges[-1][1] == 81


def test_whole_chunks() -> None:
    assert whole_chunks(81, 3, 4, "video.num_frames") == 7
    with pytest.raises(ConfigError, match=r"video.num_frames is 97 frames.*93 or 105.*`video.chunk_lat`"):
        whole_chunks(97, 3, 4, "video.num_frames")


def test_actions_of_a_latent_frame_are_those_of_its_pixels() -> None:
    actions = torch.arange(1.0, 10.0)[None, :, None] * torch.tensor([1.0, 100.0])  # 9 frames, 2 columns
    grouped = group_by_latent(actions, 4)
    assert grouped.shape == (1, 3, 8)
    assert grouped[0, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 100]  # pixel 0 in the last place
    assert grouped[0, 1].tolist() == [2, 200, 3, 300, 4, 400, 5, 500]  # pixels 1..4
    assert grouped[0, 2].tolist() == [6, 600, 7, 700, 8, 800, 9, 900]


# Blocks that are causal starts of their own


@pytest.mark.parametrize(("px", "lat"), [(1, 1), (5, 2), (9, 3), (10, 4), (14, 5), (18, 6), (81, 27), (243, 81)])
def test_latent_frames_of_blocks_and_back(px: int, lat: int) -> None:
    assert latent_frames(px, 4, "num_frames", 3) == lat
    assert pixel_frames(lat, 4, 3) == px


def test_covering_latent_frames_of_blocks_is_the_smallest_that_holds_them() -> None:
    for px in range(100):
        lat = covering_latent_frames(px, 4, 3)
        assert pixel_frames(lat, 4, 3) >= px
        assert lat == 0 or pixel_frames(lat - 1, 4, 3) < px


def test_off_the_lattice_of_blocks_names_the_two_nearest() -> None:
    with pytest.raises(ConfigError, match=r"num_frames is 12; expected blocks of 9 frames.*10 or 14.*`num_frames`"):
        latent_frames(12, 4, "num_frames", 3)
    with pytest.raises(ConfigError, match=r"num_frames is 0.*`num_frames`"):
        latent_frames(0, 4, "num_frames", 3)


def test_every_block_begins_with_the_action_that_led_to_it() -> None:
    actions = torch.arange(1.0, 19.0)[None, :, None]  # 18 frames
    grouped = group_by_latent(actions, 4, 3)
    assert grouped.shape == (1, 6, 4)
    assert grouped[0, 3].tolist() == [0, 0, 0, 10]  # the first frame of the second block
    assert grouped[0, 4].tolist() == [11, 12, 13, 14]
