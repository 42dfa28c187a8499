"""Generated | truth | difference in one picture, and animated GIFs of any frames, with pillow only."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from longtake.errors import ConfigError
from longtake.media.grid import TILE_WIDTH, side_by_side
from longtake.media.write import check_frames, write_bytes

_LEAST_DELAY = 2  # hundredths of a second; players show a shorter one as ten


def comparison(generated: np.ndarray, truth: np.ndarray, *, min_width: int = TILE_WIDTH) -> np.ndarray:
    """Returns labelled tiles "generated", "truth" and "difference" (of each colour value, in size), uint8 [t h w c].

    Args:
        generated: uint8 [t h w c].
        truth: of the same shape.
        min_width: of a tile.

    Raises:
        ValueError: the two differ in shape or are no such arrays.
    """
    check_frames(generated)
    check_frames(truth)
    if generated.shape != truth.shape:
        raise ValueError(f"generated frames {generated.shape} and true ones {truth.shape} differ in shape")
    difference = np.abs(generated.astype(np.int16) - truth.astype(np.int16)).astype(np.uint8)
    tiles = {"generated": generated, "truth": truth, "difference": difference}
    return side_by_side(tiles, min_width=min_width)


def save_gif(path: Path, frames: np.ndarray, *, fps: Fraction) -> None:
    """Writes an endless GIF that appears under its name when it is whole.

    A GIF counts in hundredths of a second: delays are rounded so that the film as a whole keeps its time, and above 50
    frames a second frames are left out. Equal neighbours become one frame of their common length.

    Args:
        path: of the file.
        frames: uint8 [t h w c].
        fps: frames per second.

    Raises:
        ConfigError: `fps` is not positive.
        DataError: the file cannot be written.
        ValueError: not such an array.
    """
    check_frames(frames)
    if fps <= 0:
        raise ConfigError(f"{fps} frames per second cannot be shown; expected more than 0. Change `fps`.")
    kept, delays = frame_delays(len(frames), Fraction(fps))
    images = [Image.fromarray(frames[index]).quantize(256, dither=Image.Dither.NONE) for index in kept]
    target = io.BytesIO()
    images[0].save(
        target,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=[10 * delay for delay in delays],
        loop=0,
        optimize=False,
    )
    write_bytes(path, target.getvalue())


def frame_delays(num_frames: int, fps: Fraction) -> tuple[list[int], list[int]]:
    """Returns which frames are shown, and for how many hundredths of a second each; their sum is that of the film."""
    kept, starts = [], []
    for index in range(num_frames):
        start = round(index * 100 / fps)
        if not starts or start - starts[-1] >= _LEAST_DELAY:
            kept.append(index)
            starts.append(start)
    end = max(round(num_frames * 100 / fps), starts[-1] + _LEAST_DELAY)
    return kept, [later - start for start, later in zip(starts, [*starts[1:], end], strict=True)]
