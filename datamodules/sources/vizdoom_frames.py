"""From renders to frames of the clip: area-averaged colours, a fixed depth scale, pure label colours."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image

from datamodules.sources.vizdoom_engine import RENDER_SIZES, Observation, depth_cap
from longtake.errors import ConfigError

CONTROL_TYPES = ("depth", "labels")
RENDER_FOV = 90.0  # degrees, horizontal

# What a pixel of the `labels` control can be, and its colour. Structure comes from the engine's label and
# depth buffers: above the horizon a flat surface is a ceiling, below it a floor; "far" is the sky, and walls
# above the horizon that are beyond the depth scale.
LABEL_COLOURS = {
    "wall": (128, 128, 128),
    "floor": (128, 64, 0),
    "ceiling": (64, 64, 160),
    "far": (0, 200, 255),
    "monster": (255, 0, 0),
    "player": (255, 0, 255),
    "weapon": (255, 160, 0),
    "supply": (0, 255, 0),
    "obstacle": (255, 255, 0),
    "body": (128, 0, 64),
    "effect": (255, 255, 255),
    "other": (0, 0, 0),
}
_CLASS_OF_CATEGORY = {
    "Monster": "monster",
    "Player": "player",
    "Self": "player",
    "Weapon": "weapon",
    "Ammo": "weapon",
    "Health": "supply",
    "Armor": "supply",
    "Powerup": "supply",
    "Key": "supply",
    "Decoration": "obstacle",
    "LightSource": "obstacle",
    "Hazard": "obstacle",
    "Vegetation": "obstacle",
    "Gibs": "body",
    "Gore": "body",
    "Explosive": "effect",
    "SFX": "effect",
}
_CLASSES = tuple(LABEL_COLOURS)
_PALETTE = np.array([LABEL_COLOURS[name] for name in _CLASSES], dtype=np.uint8)


def render_size(height: int, width: int, given: tuple[int, int] | None, key: str) -> tuple[int, int]:
    """Returns the (height, width) to render at: `given`, or one of the engine's, thrice the frame or more.

    Raises ConfigError when the frame is not 4:3, or the given size is none of the engine's or smaller than
    the frame.
    """
    if height < 2 or height % 2 or width * 3 != height * 4:
        raise ConfigError(
            f"frames of {width}x{height} from the game; expected an even height and 4:3, such as 64x48 or "
            "256x192. Change `video.height` and `video.width`."
        )
    sizes = [size for size in RENDER_SIZES if size[0] >= height]
    listed = ", ".join(f"[{rows}, {columns}]" for rows, columns in sizes)
    if given is not None:
        if given not in sizes:
            raise ConfigError(
                f"the render size {list(given)} does not serve; expected one of {listed}. Change `{key}`."
            )
        return given
    if not sizes:
        raise ConfigError(
            f"frames {height} rows high are beyond the engine's {RENDER_SIZES[-1][0]}. Change `video.height`."
        )
    large_enough = [size for size in sizes if size[0] >= 3 * height]
    whole = [size for size in large_enough if size[0] % height == 0]
    return (whole or large_enough or sizes[-1:])[0]


def crop_box(size: tuple[int, int], fov: float) -> tuple[int, int, int, int]:
    """Returns the (left, top, right, bottom) of the middle of a render that a narrower lens would show."""
    height, width = size
    share = math.tan(math.radians(fov / 2)) / math.tan(math.radians(RENDER_FOV / 2))
    half_width, half_height = max(1, round(share * width / 2)), max(1, round(share * height / 2))
    return (
        width // 2 - half_width,
        height // 2 - half_height,
        width // 2 + half_width,
        height // 2 + half_height,
    )


def to_rgb(seen: Observation, size: tuple[int, int], fov: float = RENDER_FOV) -> np.ndarray:
    """Returns the colours as a frame, uint8 [h w 3], each pixel the mean of the area that it covers."""
    return _shrink(seen.rgb, size, fov)


def to_depth(seen: Observation, size: tuple[int, int], fov: float = RENDER_FOV) -> np.ndarray:
    """Returns the depth as a grey frame, uint8 [h w 3]: 0 at the eye, linear, 255 from its end on.

    The scale is the same in all frames and clips: it ends at 7.1 map units times 255/480 of the render's
    rows (724 map units at 192 rows), where the engine's depth of walls saturates.
    """
    grey = _shrink(seen.depth, size, fov).astype(np.float32) * (255.0 / depth_cap(seen.depth.shape[0]))
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)


def to_labels(seen: Observation, size: tuple[int, int], fov: float = RENDER_FOV) -> np.ndarray:
    """Returns what is seen as a frame of LABEL_COLOURS, uint8 [h w 3]; colours stay pure (nearest pixel)."""
    rows, columns = _nearest(seen.labels.shape, size, fov)
    values, depth = seen.labels[rows, columns], seen.depth[rows, columns]
    above = rows < seen.labels.shape[0] // 2
    classes = np.zeros(256, dtype=np.uint8)
    for thing in seen.things:
        classes[thing.value] = _CLASSES.index(_CLASS_OF_CATEGORY.get(thing.category, "other"))
    kinds = classes[values]
    kinds = np.where(values == 1, np.where(above, _CLASSES.index("ceiling"), _CLASSES.index("floor")), kinds)
    far = (values == 0) & above & (depth >= depth_cap(seen.depth.shape[0]))
    return _PALETTE[np.where(far, _CLASSES.index("far"), kinds)]


def _shrink(image: np.ndarray, size: tuple[int, int], fov: float) -> np.ndarray:
    height, width = size
    picture = Image.fromarray(image)
    rows = image.shape[0]
    if fov >= RENDER_FOV and rows % height == 0:
        return np.asarray(picture.reduce(rows // height))
    box = (0, 0, image.shape[1], rows) if fov >= RENDER_FOV else crop_box((rows, image.shape[1]), fov)
    resample = Image.Resampling.BOX if box[3] - box[1] >= height else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((width, height), resample, box=box))


@functools.lru_cache(maxsize=32)
def _nearest(shape: tuple[int, int], size: tuple[int, int], fov: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns row indices [h 1] and column indices [1 w] of the render for each pixel of the frame."""
    left, top, right, bottom = (0, 0, shape[1], shape[0]) if fov >= RENDER_FOV else crop_box(shape, fov)
    rows = top + ((np.arange(size[0]) + 0.5) * (bottom - top) / size[0]).astype(int)
    columns = left + ((np.arange(size[1]) + 0.5) * (right - left) / size[1]).astype(int)
    return rows[:, None], columns[None, :]
