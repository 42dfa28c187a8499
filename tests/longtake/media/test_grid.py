from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from longtake.media import grid
from longtake.media.overlay import draw_actions


@pytest.fixture(scope="module")
def frames(media_files: ModuleType) -> np.ndarray:
    return media_files.moving_frames(20)


def test_enlarge_repeats_pixels_by_a_whole_factor(frames: np.ndarray) -> None:
    large = grid.enlarge(frames)
    assert large.shape == (20, 144, 192, 3)
    np.testing.assert_array_equal(large[:, ::3, ::3], frames)
    np.testing.assert_array_equal(large[:, 2::3, 1::3], frames)
    assert grid.enlarge(large) is large


def test_resize_averages_when_smaller_and_repeats_when_larger(frames: np.ndarray) -> None:
    half = grid.resize(frames, 24, 32).astype(np.float64)
    blocks = frames.reshape(20, 24, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(half - blocks).max() <= 1
    np.testing.assert_array_equal(grid.resize(frames, 96, 128)[:, ::2, ::2], frames)


def test_label_adds_a_bar_and_leaves_the_picture_alone(frames: np.ndarray) -> None:
    labelled = grid.label(frames, "front")
    bar = labelled.shape[1] - 144
    np.testing.assert_array_equal(labelled[:, bar:], grid.enlarge(frames))
    assert 12 <= bar <= 30
    text = np.abs(labelled[0, :bar].astype(int) - grid.BAR_COLOUR).sum(axis=2) > 200
    assert 20 < text.sum() < 600
    assert not np.array_equal(labelled[0, :bar], grid.label(frames, "rear")[0, :bar])
    long_text = grid.label(frames, "a name that is far too long for a tile of this width")
    assert long_text.shape == labelled.shape


def test_side_by_side_holds_the_last_frame_of_the_shorter(frames: np.ndarray) -> None:
    both = grid.side_by_side({"true": frames, "generated": frames[:5]})
    assert both.shape[0] == 20
    assert both.shape[2] == 2 * 192 + grid.GAP
    right = both[:, -144:, -192:]
    np.testing.assert_array_equal(right[:5], grid.enlarge(frames[:5]))
    np.testing.assert_array_equal(right[19], grid.enlarge(frames)[4])
    assert not both[:, :, 192 : 192 + grid.GAP].any()


def test_view_grid_puts_views_in_their_places(frames: np.ndarray) -> None:
    views = {"front": frames, "left": 255 - frames, "rear": frames[::-1]}
    image = grid.view_grid(views, {"front": (0, 1), "left": (1, 0), "rear": (2, 1)})
    height, width = grid.label(frames, "x").shape[1:3]
    rows = [row * (height + grid.GAP) for row in range(3)]
    columns = [column * (width + grid.GAP) for column in range(2)]
    assert image.shape == (20, rows[2] + height, columns[1] + width, 3)
    for name, (row, column) in {"front": (0, 1), "left": (1, 0), "rear": (2, 1)}.items():
        cell = image[:, rows[row] : rows[row] + height, columns[column] : columns[column] + width]
        np.testing.assert_array_equal(cell, grid.label(views[name], name))
    for row, column in ((0, 0), (1, 1), (2, 0)):
        assert not image[:, rows[row] : rows[row] + height, columns[column] : columns[column] + width].any()
    with pytest.raises(ValueError, match="without a place: left"):
        grid.view_grid(views, {"front": (0, 0), "rear": (0, 1)})
    with pytest.raises(ValueError, match="two views in one place"):
        grid.view_grid(views, {"front": (0, 0), "left": (0, 0), "rear": (0, 1)})


def test_strip_shows_first_and_last(frames: np.ndarray) -> None:
    image = grid.strip(frames, 4, gap=2)
    assert image.shape == (48, 4 * 64 + 3 * 2, 3)
    for place, index in enumerate((0, 6, 13, 19)):
        np.testing.assert_array_equal(image[:, place * 66 : place * 66 + 64], frames[index])


def test_contact_sheet(frames: np.ndarray) -> None:
    sheet = grid.contact_sheet([("one", frames), ("two", frames[:3]), ("three", frames[:1])], columns=6)
    one = grid.contact_sheet([("one", frames)], columns=6)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3
    np.testing.assert_array_equal(sheet[: one.shape[0], : one.shape[1]], one)
    bar = one.shape[0] - 96
    np.testing.assert_array_equal(one[bar:, :128], grid.enlarge(frames[:1], 96)[0])
    with pytest.raises(ValueError, match="no videos"):
        grid.contact_sheet([])


def test_buttons_light_up_and_bars_have_a_side_and_a_length(frames: np.ndarray) -> None:
    actions = np.zeros((20, 3), np.float32)
    actions[5:9, 0] = 1
    actions[:, 1] = np.linspace(-4, 8, 20)
    actions[:, 2] = 0.5
    drawn = draw_actions(frames, actions, ["attack", "turn", "speed"], ranges={"speed": (0, 1)})
    np.testing.assert_array_equal(drawn[:, :144], grid.enlarge(frames))
    panel = drawn[:, 144:].astype(int)

    def count(colour: tuple[int, int, int]) -> np.ndarray:
        return (panel == colour).all(axis=3).sum(axis=(1, 2))

    lit = count((250, 190, 40)) > 0
    np.testing.assert_array_equal(lit, actions[:, 0] > 0)
    red, green = count((240, 100, 90)), count((80, 200, 120))
    np.testing.assert_array_equal(red > 0, actions[:, 1] < -0.1)
    assert (np.diff(green) >= 0).all()
    assert green[-1] > 2.5 * green[0] > 0
    assert red[0] == pytest.approx((green[-1] - green[0]) / 2, rel=0.1)  # -4 against 8


def test_actions_of_other_lengths_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected \[t a\]"):
        draw_actions(frames, np.zeros((19, 2)), ["a", "b"])
    with pytest.raises(ValueError, match="1 names"):
        draw_actions(frames, np.zeros((20, 2)), ["a"])
    assert draw_actions(frames, np.zeros((20, 0)), []).shape == (20, 144, 192, 3)
    assert draw_actions(frames, np.full((20, 1), np.nan), ["broken"]).shape[1] > 144
