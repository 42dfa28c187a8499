"""Still images, and folders of them taken for a video."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from longtake.errors import BadSampleError
from longtake.media.containers import check_read, check_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_MODES_8_BIT = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"))


def read_image(source: Path | bytes) -> np.ndarray:
    """Returns an image, uint8 [h w c] RGB. A camera's orientation mark is honoured, transparency dropped.

    Raises:
        BadSampleError: missing, damaged, cut off, not one of PNG, JPEG, BMP, WebP, more than 8 bits a
            channel, or absurdly large (see `containers.MAX_SIDE`).
    """
    name = str(source) if isinstance(source, Path) else f"an image of {len(source)} bytes in memory"
    with _opened(source, name) as image:
        check_size(image.height, image.width, name)
        if image.mode not in _MODES_8_BIT:
            raise BadSampleError(f"{name}: pixels of kind {image.mode!r}; expected 8 bits a channel")
        try:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
        except (
            Exception
        ) as error:  # Pillow's decoders raise whatever the damage leads to (SyntaxError, struct.error, ...)
            raise BadSampleError(f"{name}: damaged image: {error or type(error).__name__}") from error


def list_images(folder: Path) -> list[Path]:
    """Returns the images of a folder in natural order (frame2 before frame10).

    Raises:
        BadSampleError: there are none.
    """
    try:
        paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    except OSError as error:
        raise BadSampleError(f"{folder}: cannot be listed: {error.strerror}") from error
    if not paths:
        raise BadSampleError(f"{folder}: a folder without images; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(paths, key=lambda path: (_natural(path.stem), path.name))


def probe_folder(folder: Path) -> tuple[int, int, int]:
    """Returns (number of frames, height, width) of a folder of images, from the files' headers.

    Raises:
        BadSampleError: no images, one cannot be opened, or their sizes differ.
    """
    paths = list_images(folder)
    first = _size(paths[0])
    for path in paths[1:]:
        if _size(path) != first:
            raise BadSampleError(f"{path}: {_text(_size(path))} pixels, but {paths[0].name} has {_text(first)}")
    return len(paths), *first


def read_folder(folder: Path, frames: Sequence[int] | None) -> np.ndarray:
    """Returns the wanted images of a folder as a video, uint8 [t h w c]."""
    paths = list_images(folder)
    wanted = list(range(len(paths)) if frames is None else frames)
    if min(wanted) < 0 or max(wanted) >= len(paths):
        raise BadSampleError(
            f"{folder}: frames {min(wanted)} to {max(wanted)} were asked for, it has {len(paths)} images"
        )
    first = read_image(paths[wanted[0]])
    check_read(len(wanted), first.shape[0], first.shape[1], str(folder))
    video = np.empty((len(wanted), *first.shape), np.uint8)
    for row, index in enumerate(wanted):
        image = first if row == 0 else read_image(paths[index])
        if image.shape != first.shape:
            raise BadSampleError(
                f"{paths[index]}: {_text(image.shape)} pixels, but {paths[wanted[0]].name} has {_text(first.shape)}"
            )
        video[row] = image
    return video


def _opened(source: Path | bytes, name: str) -> Image.Image:
    if isinstance(source, Path) and not source.is_file():
        raise BadSampleError(f"{name}: no such file" if not source.exists() else f"{name}: not a regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` has the stated limit
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    except Exception as error:
        raise BadSampleError(f"{name}: not a readable image ({', '.join(_FORMATS)}): {error}") from error


def _size(path: Path) -> tuple[int, int]:
    with _opened(path, str(path)) as image:
        check_size(image.height, image.width, str(path))
        sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: these swap rows and columns
        return (image.width, image.height) if sideways else (image.height, image.width)


def _text(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"


def _natural(text: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", text)]
