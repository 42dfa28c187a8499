"""Where a film cuts from one scene to another, so that no clip straddles a cut.

A cut is a change between two neighbouring frames that is large in itself and several times as large as the
changes around it: a fast pan changes every frame by much and has no such peak. It is looked for at the frame
rate of the recording, where peaks are sharpest. Fades and dissolves are not found.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from datamodules.sources.frame_stream import TimedFrame
from longtake.errors import BadSampleError

_NEIGHBOURS = 8  # changes on either side to which one is compared
_THUMBNAIL = (32, 24)


def number_scenes(frames: Iterable[TimedFrame], *, min_change: float, min_ratio: float) -> Iterator[TimedFrame]:
    """Yields the frames with their `scene` set; holds back a few at a time.

    Args:
        frames: the frames of one recording in order.
        min_change: least mean absolute change of a colour value, of 255.
        min_ratio: least ratio of the change to the median change around it.

    Raises:
        BadSampleError: from the recording, after the frames held back.
    """
    waiting: deque[tuple[TimedFrame, float]] = deque()
    past: deque[float] = deque(maxlen=_NEIGHBOURS)
    before: np.ndarray | None = None
    failure: BadSampleError | None = None
    scene = 0

    def decide() -> TimedFrame:
        nonlocal scene
        frame, change = waiting.popleft()
        around = [*past, *(value for _, value in waiting)]
        usual = max(float(np.median(around)), 0.5) if around else 0.5
        past.append(change)
        scene += change >= min_change and change >= min_ratio * usual
        return dataclasses.replace(frame, scene=scene)

    try:
        for frame in frames:
            now = np.asarray(frame.load(_THUMBNAIL), np.float32)
            change = 0.0 if before is None else float(np.abs(now - before).mean())
            before = now
            waiting.append((frame, change))
            if len(waiting) > _NEIGHBOURS:
                yield decide()
    except BadSampleError as error:  # the frames held back came before the damage and are good
        failure = error
    while waiting:
        yield decide()
    if failure is not None:
        raise failure
