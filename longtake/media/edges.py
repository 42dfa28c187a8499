"""Edges of a video (Canny 1986), as control where no edge video is given.

The steps are those of OpenCV's `Canny` without blur: grey by Rec. 601, 3x3 Sobel in both directions, magnitude |gx| +
|gy|, thinning across the edge, and every pixel above the low threshold that touches, through others such, one above the
high threshold. The presets are those of Cosmos Transfer.
"""

from __future__ import annotations

import numpy as np

from longtake.errors import unknown_choice

PRESETS = {
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}
_TAN_22_5 = 0.4142135623730951


def edge_video(frames: np.ndarray, preset: str = "medium") -> np.ndarray:
    """Returns white edges on black, uint8 [t h w 3].

    Args:
        frames: uint8 [t h w 3].
        preset: how strong an edge must be, from "very_low" (many edges) to "very_high" (few).

    Raises:
        ConfigError: an unknown preset.
    """
    if preset not in PRESETS:
        raise unknown_choice("edge preset", preset, PRESETS, "edge_preset")
    edges = canny(grey(frames), *PRESETS[preset])
    return np.repeat((edges * np.uint8(255))[..., None], 3, axis=-1)


def grey(frames: np.ndarray) -> np.ndarray:
    """Returns the brightness of RGB frames [... 3], uint8 [...]."""
    weights = np.array([4899, 9617, 1868], dtype=np.int32)  # of 2**14: 0.299, 0.587, 0.114
    return ((frames.astype(np.int32) @ weights + (1 << 13)) >> 14).astype(np.uint8)


def canny(brightness: np.ndarray, low: int, high: int) -> np.ndarray:
    """Returns which pixels are edges, bool [t h w].

    Args:
        brightness: uint8 [t h w].
        low: magnitude above which a pixel continues an edge.
        high: magnitude above which a pixel begins one.
    """
    gx, gy = _sobel(brightness)
    magnitude = np.abs(gx) + np.abs(gy)
    thin = _is_ridge(magnitude, gx, gy)
    strong, weak = thin & (magnitude > high), thin & (magnitude > low)
    while True:  # grow the strong edges along the weak ones
        grown = _touching(strong) & weak
        if np.array_equal(grown, strong):
            return strong
        strong = grown


def _sobel(brightness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    padded = np.pad(brightness.astype(np.int32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2]


def _is_ridge(magnitude: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> np.ndarray:
    """Returns where the magnitude is largest across the edge; on a plateau only its first pixel."""
    padded = np.pad(magnitude, ((0, 0), (1, 1), (1, 1)))

    def at(rows: int, columns: int) -> np.ndarray:
        height, width = magnitude.shape[1:]
        return padded[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    ax, ay = np.abs(gx), np.abs(gy)
    level, steep = ay < ax * _TAN_22_5, ax < ay * _TAN_22_5
    across = (magnitude > at(0, -1)) & (magnitude >= at(0, 1))
    along = (magnitude > at(-1, 0)) & (magnitude >= at(1, 0))
    falling = (magnitude > at(-1, -1)) & (magnitude > at(1, 1))
    rising = (magnitude > at(-1, 1)) & (magnitude > at(1, -1))
    diagonal = np.where((gx < 0) != (gy < 0), rising, falling)
    return np.where(level, across, np.where(steep, along, diagonal))


def _touching(mask: np.ndarray) -> np.ndarray:
    """Returns the mask and its eight neighbours."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]
