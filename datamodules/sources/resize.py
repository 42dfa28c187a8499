"""Any picture to the one size of a set, with an antialiased filter."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from PIL import Image

RESIZE_MODES = ("crop", "pad", "stretch")


def fit_frame(
    image: Image.Image,
    *,
    height: int,
    width: int,
    mode: str,
    pixel_aspect: Fraction = Fraction(1),
    nearest: bool = False,
) -> np.ndarray:
    """Returns the picture at exactly the given size, uint8 [h w c].

    Args:
        image: RGB picture.
        height: rows of the result.
        width: columns of the result.
        mode: "crop" fills the frame and cuts what stands over, evenly on both sides; "pad" shows all of it
            between black bars; "stretch" ignores the aspect ratio.
        pixel_aspect: width of a source pixel over its height; pixels of the result are square.
        nearest: no filter, for pictures whose colours are labels.
    """
    # Pillow's bicubic filter widens with the reduction, so that shrinking averages and does not alias.
    resample = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    if image.size == (width, height) and (pixel_aspect == 1 or mode == "stretch"):
        return np.asarray(image)
    if mode == "stretch":
        return np.asarray(image.resize((width, height), resample))
    shown_width, shown_height = float(image.width * pixel_aspect), float(image.height)
    if mode == "crop":
        scale = max(width / shown_width, height / shown_height)
        box_width = min(width / scale / float(pixel_aspect), image.width)
        box_height = min(height / scale, image.height)
        left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
        return np.asarray(image.resize((width, height), resample, (left, top, left + box_width, top + box_height)))
    scale = min(width / shown_width, height / shown_height)
    inner = (min(width, max(1, round(shown_width * scale))), min(height, max(1, round(shown_height * scale))))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.asarray(canvas)
