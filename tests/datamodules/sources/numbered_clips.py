"""Videos for tests whose every frame carries its own number, and sources built from their yaml."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from datamodules.sources.base import RawSample, Skipped, Source

CONF = Path(__file__).parents[3] / "conf" / "source"
BITS = 8
VIDEO = {"fps": 10, "height": 16, "width": 64, "num_frames": 5}


def numbered_frame(number: int, height: int = 32, width: int = 128) -> np.ndarray:
    """Returns a picture of 8 upright bars that spell `number` in binary, uint8 [h w c]."""
    bars = np.array([(number >> bit) & 1 for bit in range(BITS)], np.uint8) * 235 + 10
    row = np.repeat(bars, width // BITS)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_number(picture: np.ndarray) -> int:
    """Returns the number that a picture spells, whatever its size."""
    columns = picture.mean(axis=(0, 2)).reshape(BITS, -1).mean(axis=1)
    return sum(int(value > 128) << bit for bit, value in enumerate(columns))


def numbers(sample: RawSample, view: str = "main") -> list[int]:
    """Returns the numbers of all frames of a view."""
    return [read_number(picture) for picture in sample.views[view]]


def encode(
    frames: list[np.ndarray],
    *,
    rate: Fraction | int = 10,
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
) -> bytes:
    """Returns an encoded video; with `pts` (in units of `time_base`) one of variable frame rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], pix_fmt
        if time_base is not None:
            stream.codec_context.time_base = time_base
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def write_numbered(path: Path, count: int, **settings: Any) -> Path:
    """Writes a video of `count` numbered frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode([numbered_frame(number) for number in range(count)], **settings))
    return path


def build(name: str, *, video: dict[str, Any] | None = None, **changes: Any) -> Source:
    """Returns the source of `conf/source/<name>.yaml`; changes are keys of it or of the top level."""
    top = {
        "input": changes.pop("input", None),
        "seed": changes.pop("seed", 0),
        "num_clips": changes.pop("num_clips", None),
    }
    config = OmegaConf.create({**top, "video": {**VIDEO, **(video or {})}})
    config.source = OmegaConf.load(CONF / f"{name}.yaml")
    OmegaConf.set_struct(config, True)
    for key, value in changes.items():
        OmegaConf.update(config, f"source.{key}", value)
    if isinstance(top["input"], Path):
        config.input = str(top["input"])
    OmegaConf.resolve(config)
    try:
        return instantiate(config.source)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def collect(source: Source) -> tuple[dict[str, RawSample], list[Skipped], dict[str, str]]:
    """Returns all samples by key, everything that was skipped, and the split of each sample."""
    samples: dict[str, RawSample] = {}
    skipped: list[Skipped] = []
    splits: dict[str, str] = {}
    for task in source.tasks():
        for item in source.samples(task):
            if isinstance(item, Skipped):
                skipped.append(item)
            else:
                assert item.key not in samples
                samples[item.key] = item
                splits[item.key] = task.split
    return samples, skipped, splits
