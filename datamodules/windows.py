"""Windows of held-out (or training) clips one by one, in order: what token models are scored on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from datamodules.base import ClipsDataModule
from datamodules.loading.decoding import Draws, Fields, Window
from datamodules.loading.reading import Sample, SplitReader
from datamodules.tokens import TokensDataModule, members_by_start
from datamodules.video import VideoDataModule
from longtake.errors import BadSampleError, ConfigError, DataError

logger = logging.getLogger("longtake")


@dataclass(frozen=True)
class ClipWindow:
    """A window of a clip, from a causal start on.

    Attributes:
        key: name of the clip, and where the window begins.
        frames: uint8 [v t h w c], or None where there are tokens.
        tokens: int64 [v t' h w], or None where there are pixels.
        actions: what led to each frame, float32 [t a], the first row null; or None.
    """

    key: str
    frames: np.ndarray | None
    tokens: np.ndarray | None
    actions: np.ndarray | None


def clip_windows(data: ClipsDataModule, num_frames: int, count: int | None, *, split: str) -> Iterator[ClipWindow]:
    """Yields windows that do not overlap, spread evenly over the clips of a split. Bad samples are skipped and named.

    Args:
        data: of pixels or tokens; the set is made where it does not exist yet.
        num_frames: pixel frames of a window.
        count: at most so many; None: all.
        split: name of the split.

    Raises:
        ConfigError: the set has no such split, or holds neither pixels nor tokens.
        DataError: no clip can be used.
    """
    if not isinstance(data, VideoDataModule | TokensDataModule):
        raise ConfigError(
            f"data is a {type(data).__name__}; expected clips of pixels or of tokens. Change `data` (data=doom)."
        )
    data.prepare_data()
    data.setup("predict")
    info = data.infos[0]
    reader = SplitReader(info, split, data.cache)
    decode = data.decoder(info, training=False)
    num_clips = len(reader) if count is None else min(len(reader), count)
    each = None if count is None else -(-count // max(1, num_clips))
    used = 0
    for number in (index * len(reader) // max(1, num_clips) for index in range(num_clips)):
        sample = reader[number]
        for start in _starts(sample, data, num_frames)[:each]:
            if used == count:
                return
            try:
                fields = decode(sample, Window(start, num_frames), Draws(None))
            except BadSampleError as error:
                logger.warning("clip %s (%s) is left out: %s", sample.key, sample.where, error)
                break
            used += 1
            yield _window(f"{sample.key}-{start}", fields)
    if used == 0:
        raise DataError(f"no clip of split {split!r} of {info.root} has {num_frames} frames. Make the set again.")


def _starts(sample: Sample, data: ClipsDataModule, num_frames: int) -> list[int]:
    """Returns where windows begin that do not overlap."""
    there = range(0, max(1, (sample.num_frames or num_frames) - num_frames + 1))
    candidates = sorted(members_by_start(sample)) if isinstance(data, TokensDataModule) else [*there]
    starts: list[int] = []
    for start in candidates:
        if start in there and (not starts or start >= starts[-1] + num_frames):
            starts.append(start)
    return starts


def _window(key: str, fields: Fields) -> ClipWindow:
    video, tokens, actions = (fields.get(name) for name in ("video", "tokens", "actions"))
    return ClipWindow(
        key=key,
        frames=None if video is None else np.ascontiguousarray(video.permute(0, 1, 3, 4, 2).numpy()),
        tokens=None if tokens is None else tokens.numpy(),
        actions=None if actions is None else np.asarray(actions),
    )
