"""Held-out clips one by one, whole and in order: what rollouts start from and are compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from datamodules.loading.decoding import Draws, Window
from datamodules.loading.reading import SplitReader
from datamodules.video import VideoDataModule
from longtake.errors import BadSampleError, ConfigError, DataError

logger = logging.getLogger("longtake")


@dataclass(frozen=True)
class HeldOutClip:
    """A clip that was not trained on.

    Attributes:
        key: its name.
        frames: uint8 [v t h w c].
        actions: what led to each frame, float32 [t a], or None.
        caption: its first caption, or None.
    """

    key: str
    frames: np.ndarray
    actions: np.ndarray | None
    caption: str | None


def held_out_clips(
    data: VideoDataModule, num_frames: int, count: int, *, split: str | None = None, first: int = 0
) -> Iterator[HeldOutClip]:
    """Yields clips, spread evenly over a split, from their first frame on. Bad samples are skipped and named.

    Args:
        data: of pixels; it is made where it does not exist yet.
        num_frames: pixel frames wanted; a shorter clip is yielded whole.
        count: how many clips, at most as many as the split has.
        split: name of the split; None: "predict" of `data.splits`, or validation where the set has no such split.
        first: leaves out this many of them.

    Raises:
        ConfigError: the set has no such split or holds no pixels.
        DataError: no clip can be used.
    """
    data.prepare_data()
    data.setup("predict")
    info = data.infos[0]
    if split is None:
        split = data.splits["predict"] if data.splits["predict"] in info.splits else data.splits["val"]
    reader = SplitReader(info, split, data.cache)
    decode = data.decoder(info, training=False)
    wanted, used = min(first + count, len(reader)), 0
    for number in (index * len(reader) // max(1, wanted) for index in range(first, wanted)):
        sample = reader[number]
        length = min(num_frames, sample.num_frames or num_frames)
        try:
            fields = decode(sample, Window(0, length), Draws(None))
        except BadSampleError as error:
            logger.warning("held-out clip %s (%s) is left out: %s", sample.key, sample.where, error)
            continue
        used += 1
        yield HeldOutClip(
            key=sample.key,
            frames=np.ascontiguousarray(fields["video"].permute(0, 1, 3, 4, 2).numpy()),
            actions=None if fields["actions"] is None else np.asarray(fields["actions"]),
            caption=fields["captions"],
        )
    if used == 0 and first == 0:
        raise DataError(f"no clip of split {split!r} of {info.root} can be used. Make the set again, or give `input`.")


def pixel_data(data: object) -> VideoDataModule:
    """Returns a datamodule as one of pixels. Raises ConfigError where it is none."""
    if not isinstance(data, VideoDataModule):
        raise ConfigError(
            f"data is a {type(data).__name__}; expected clips of pixels to start from and to compare with. Set `data` "
            "to a set with videos, for example data=doom, or give `input`."
        )
    return data
