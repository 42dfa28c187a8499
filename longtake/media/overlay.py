"""Actions drawn under the frames that they produced: lit boxes for buttons, signed bars for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from longtake.media.grid import TEXT_COLOUR, TILE_WIDTH, enlarge, fit_text, font, line_height

_BACKGROUND = (18, 18, 22)
_OFF, _OFF_TEXT = (44, 44, 50), (120, 120, 128)
_ON, _ON_TEXT = (250, 190, 40), (10, 10, 10)
_POSITIVE, _NEGATIVE, _AXIS = (80, 200, 120), (240, 100, 90), (110, 110, 118)
_MARGIN = 3


@dataclass(frozen=True)
class _Bar:
    """Where the bar of a continuous column goes in the panel, and the value that fills half of it."""

    column: int
    top: int
    bottom: int
    left: int
    right: int
    scale: float


class ActionPanel:
    """Actions drawn below the frames that they produced, for videos that come in parts.

    A column that only holds 0 and 1 is a box that lights up. Any other is a bar from the middle, to the right
    for positive values, which fills its half at the largest magnitude of the column's range.

    Args:
        actions: of the whole video, numbers [t a]; row t is what produced frame t.
        names: names of the columns.
        ranges: (least, largest) value of columns by name; without it, those of these actions.
        min_width: least width of the result.
    """

    def __init__(
        self,
        actions: np.ndarray,
        names: Sequence[str],
        *,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        min_width: int = TILE_WIDTH,
    ) -> None:
        self._values = np.nan_to_num(np.asarray(actions, np.float64))
        self._names, self._ranges, self._min_width = tuple(names), dict(ranges or {}), min_width
        self._parts: tuple[Any, ...] | None = None

    def under(self, frames: np.ndarray, start: int) -> np.ndarray:
        """Returns frames from number `start` on, enlarged to a readable size, with the panel, uint8 [t h' w' c]."""
        tiles = enlarge(frames, self._min_width)
        if not self._names:
            return tiles
        if self._parts is None:
            self._parts = _layout(self._values, self._names, self._ranges, tiles.shape[2])
        off, on, boxes, bars = self._parts
        values = self._values[start : start + len(frames)]
        panel = np.repeat(off[None], len(frames), axis=0)
        for column, (top, bottom, left, right) in boxes.items():
            lit = values[:, column] > 0.5
            panel[lit, top:bottom, left:right] = on[top:bottom, left:right]
        for bar in bars:
            _draw_bar(panel, values[:, bar.column], bar)
        return np.concatenate([tiles, panel], axis=1)


def draw_actions(
    frames: np.ndarray,
    actions: np.ndarray,
    names: Sequence[str],
    *,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    min_width: int = TILE_WIDTH,
) -> np.ndarray:
    """Returns a whole video with its actions below each frame, as `ActionPanel` draws them, uint8 [t h' w' c].

    Args:
        frames: uint8 [t h w c].
        actions: see `ActionPanel`.
        names: see `ActionPanel`.
        ranges: see `ActionPanel`.
        min_width: see `ActionPanel`.

    Raises:
        ValueError: the lengths do not fit each other.
    """
    if actions.ndim != 2 or len(actions) != len(frames) or actions.shape[1] != len(names):
        raise ValueError(
            f"actions of shape {actions.shape} for {len(frames)} frames and {len(names)} names; expected [t a]"
        )
    return ActionPanel(actions, names, ranges=ranges, min_width=min_width).under(frames, 0)


def _draw_bar(panel: np.ndarray, values: np.ndarray, bar: _Bar) -> None:
    middle = (bar.left + bar.right) // 2
    half = middle - bar.left
    for row, value in enumerate(values):
        length = min(half, round(abs(value) / bar.scale * half))
        if value > 0:
            panel[row, bar.top : bar.bottom, middle + 1 : middle + 1 + length] = _POSITIVE
        elif value < 0:
            panel[row, bar.top : bar.bottom, middle - length : middle] = _NEGATIVE


def _layout(
    values: np.ndarray, names: Sequence[str], ranges: Mapping[str, tuple[float, float]], width: int
) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[int, int, int, int]], list[_Bar]]:
    """Returns the panel with every box dark and with every box lit, the box of each button, and the bars."""
    is_button = [
        bool(np.isin(values[:, column], (0, 1)).all()) and _unit(ranges.get(name)) for column, name in enumerate(names)
    ]
    line = line_height() + 2
    top, left = _MARGIN, _MARGIN
    boxes: dict[int, tuple[int, int, int, int]] = {}
    for column in (index for index, button in enumerate(is_button) if button):
        needed = min(int(font().getlength(names[column])) + 8, width - 2 * _MARGIN)
        if left > _MARGIN and left + needed > width - _MARGIN:
            top, left = top + line + _MARGIN, _MARGIN
        boxes[column] = (top, top + line, left, left + needed)
        left += needed + _MARGIN
    if boxes:
        top += line + _MARGIN
    bars, text_width = [], int(width * 0.45)
    for column in (index for index, button in enumerate(is_button) if not button):
        least, most = ranges.get(names[column], (values[:, column].min(), values[:, column].max()))
        scale = max(abs(least), abs(most)) or 1.0
        bars.append(_Bar(column, top + 2, top + line - 2, text_width, width - _MARGIN, scale))
        top += line
    height = top + (_MARGIN if bars else 0)
    off, on = (_panel(height, width, names, boxes, bars, lit) for lit in (False, True))
    return off, on, boxes, bars


def _unit(given: tuple[float, float] | None) -> bool:
    return given is None or tuple(given) == (0, 1)


def _panel(
    height: int,
    width: int,
    names: Sequence[str],
    boxes: dict[int, tuple[int, int, int, int]],
    bars: list[_Bar],
    lit: bool,
) -> np.ndarray:
    image = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for column, (top, bottom, left, right) in boxes.items():
        draw.rectangle((left, top, right - 1, bottom - 1), fill=_ON if lit else _OFF)
        text = fit_text(names[column], right - left - 6)
        draw.text(
            ((left + right) // 2, (top + bottom) // 2),
            text,
            font=font(),
            fill=_ON_TEXT if lit else _OFF_TEXT,
            anchor="mm",
        )
    for bar in bars:
        middle, centre = (bar.left + bar.right) // 2, (bar.top + bar.bottom) // 2
        draw.text(
            (_MARGIN, centre),
            fit_text(names[bar.column], bar.left - 2 * _MARGIN),
            font=font(),
            fill=TEXT_COLOUR,
            anchor="lm",
        )
        draw.rectangle((bar.left, bar.top, bar.right - 1, bar.bottom - 1), fill=_OFF)
        draw.line((middle, bar.top - 1, middle, bar.bottom), fill=_AXIS)
    return np.asarray(image)
