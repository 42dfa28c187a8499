"""Pictures of videos: labelled tiles side by side, views in their places, strips and contact sheets.

Videos are uint8 [t h w c], images uint8 [h w c]. Small video is enlarged by whole factors without smoothing,
so that a tile shows the true pixels and its label can be read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE_WIDTH = 160
GAP = 4
TEXT_COLOUR = (235, 235, 235)
BAR_COLOUR = (32, 32, 36)
_FONT_SIZE = 12


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the video at another size: area averages where it gets smaller, nearest pixels where it grows.

    Args:
        frames: uint8 [t h w c].
        height: new pixel rows.
        width: new pixel columns.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    smaller = height < frames.shape[1] or width < frames.shape[2]
    method = Image.Resampling.BOX if smaller else Image.Resampling.NEAREST
    resized = [np.asarray(Image.fromarray(frame).resize((width, height), method)) for frame in frames]
    return np.stack(resized)


def fitted(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns frames [t h w c] cut to the wanted aspect ratio around the middle and resized, uint8."""
    rows, columns = frames.shape[1:3]
    scale = min(rows / height, columns / width)
    cut_rows, cut_columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
    return resize(frames[:, top : top + cut_rows, left : left + cut_columns], height, width)


def enlarge(frames: np.ndarray, min_width: int = TILE_WIDTH) -> np.ndarray:
    """Returns the video enlarged by the least whole factor that makes it `min_width` wide, uint8 [t h w c]."""
    factor = max(1, math.ceil(min_width / frames.shape[2]))
    return frames if factor == 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def label(frames: np.ndarray, text: str, *, min_width: int = TILE_WIDTH) -> np.ndarray:
    """Returns the video enlarged to a readable size under a bar with its name, uint8 [t h' w' c]."""
    return with_bar(enlarge(frames, min_width), text)


def with_bar(frames: np.ndarray, text: str) -> np.ndarray:
    """Returns the video with a bar with text on top; the text is cut with "..." where it does not fit."""
    bar = text_bar(text, frames.shape[2])
    return np.concatenate([np.broadcast_to(bar, (len(frames), *bar.shape)), frames], axis=1)


def hstack(videos: Sequence[np.ndarray], *, gap: int = GAP) -> np.ndarray:
    """Returns videos side by side on black, aligned at the top. A shorter one holds its last frame."""
    return _place(videos, [(0, column) for column in range(len(videos))], gap)


def vstack(videos: Sequence[np.ndarray], *, gap: int = GAP) -> np.ndarray:
    """Returns videos one above the other on black, aligned left. A shorter one holds its last frame."""
    return _place(videos, [(row, 0) for row in range(len(videos))], gap)


def side_by_side(videos: Mapping[str, np.ndarray], *, min_width: int = TILE_WIDTH) -> np.ndarray:
    """Returns labelled videos in a row, for instance {"true": ..., "generated": ...}, uint8 [t h w c]."""
    return hstack([label(frames, name, min_width=min_width) for name, frames in videos.items()])


def view_grid(
    views: Mapping[str, np.ndarray], placement: Mapping[str, tuple[int, int]], *, min_width: int = TILE_WIDTH
) -> np.ndarray:
    """Returns labelled views where they belong in space, cells without a view black, uint8 [t h w c].

    Args:
        views: video of each view.
        placement: (row, column) of each of them, both from 0.

    Raises:
        ValueError: a view without a place, or two in one place.
    """
    missing = [name for name in views if name not in placement]
    cells = [tuple(placement[name]) for name in views if name in placement]
    if missing or len(set(cells)) != len(cells):
        problem = f"views without a place: {', '.join(missing)}" if missing else f"two views in one place: {cells}"
        raise ValueError(f"{problem}; expected one (row, column) for each of {', '.join(views)}")
    return _place([label(frames, name, min_width=min_width) for name, frames in views.items()], cells, GAP)


def strip(frames: np.ndarray, count: int = 8, *, gap: int = 2) -> np.ndarray:
    """Returns `count` frames, first and last among them, evenly spaced in time, in a row, uint8 [h w c]."""
    return hstack([frames[index : index + 1] for index in evenly(len(frames), count)], gap=gap)[0]


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], *, columns: int = 8, min_width: int = 96, numbers: bool = True
) -> np.ndarray:
    """Returns one image of many videos: a labelled strip for each, uint8 [h w c].

    Args:
        rows: (label, video) pairs; lengths and sizes may differ.
        columns: frames shown of each video; a shorter one shows fewer.
        min_width: least width of a frame in the sheet.
        numbers: whether the label also says which frames are shown.
    """
    if not rows:
        raise ValueError("no videos for the contact sheet; expected at least one")
    strips = []
    for text, frames in rows:
        picked = evenly(len(frames), min(columns, len(frames)))
        image = hstack([enlarge(frames[index : index + 1], min_width) for index in picked], gap=2)
        if numbers:
            text = f"{text}   frames {', '.join(str(index) for index in picked)} of {len(frames)}"
        strips.append((text, image))
    # Labels may be wider than the strips; the sheet makes room, up to twice its width.
    width = max(image.shape[2] for _, image in strips)
    width = max(width, min(2 * width, max(_text_width(text) + 8 for text, _ in strips)))
    return vstack([with_bar(_padded(image, image.shape[1], width), text) for text, image in strips])[0]


def evenly(length: int, count: int) -> list[int]:
    """Returns `count` indices below `length`, evenly spaced, first and last among them."""
    return [int(index) for index in np.rint(np.linspace(0, length - 1, count))]


def text_bar(text: str, width: int, *, background: tuple[int, int, int] = BAR_COLOUR) -> np.ndarray:
    """Returns a bar of this width with text at its left, uint8 [h w c]."""
    height = line_height() + 4
    image = Image.new("RGB", (width, height), background)
    fitting = fit_text(text, width - 6)
    ImageDraw.Draw(image).text((3, height // 2), fitting, font=font(), fill=TEXT_COLOUR, anchor="lm")
    return np.asarray(image)


def fit_text(text: str, width: int) -> str:
    """Returns the text, cut with "..." to at most `width` pixels."""
    if _text_width(text) <= width:
        return text
    while text and _text_width(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""


@functools.cache
def font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns the font that comes with Pillow."""
    return ImageFont.load_default(size)


@functools.cache
def line_height() -> int:
    """Returns the pixel rows of a line of text."""
    box = font().getbbox("Agjy|")
    return int(math.ceil(box[3] - min(0, box[1])))


def _text_width(text: str) -> int:
    return int(math.ceil(font().getlength(text)))


def _padded(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = height - frames.shape[1], width - frames.shape[2]
    return np.pad(frames, ((0, 0), (0, rows), (0, columns), (0, 0))) if rows or columns else frames


def _place(videos: Sequence[np.ndarray], cells: Sequence[tuple[int, ...]], gap: int) -> np.ndarray:
    """Returns the videos at their (row, column) on black; rows and columns fit their largest video."""
    if not videos:
        raise ValueError("no videos to put side by side; expected at least one")
    heights, widths = [0] * (1 + max(row for row, _ in cells)), [0] * (1 + max(column for _, column in cells))
    for video, (row, column) in zip(videos, cells, strict=True):
        heights[row] = max(heights[row], video.shape[1])
        widths[column] = max(widths[column], video.shape[2])
    # An empty row or column keeps the room that a view would take there.
    heights = [height or max(heights) for height in heights]
    widths = [width or max(widths) for width in widths]
    length = max(len(video) for video in videos)
    total = (sum(heights) + gap * (len(heights) - 1), sum(widths) + gap * (len(widths) - 1))
    canvas = np.zeros((length, *total, 3), np.uint8)
    for video, (row, column) in zip(videos, cells, strict=True):
        top, left = sum(heights[:row]) + gap * row, sum(widths[:column]) + gap * column
        part = canvas[:, top : top + video.shape[1], left : left + video.shape[2]]
        part[: len(video)] = video
        part[len(video) :] = video[-1]
    return canvas
