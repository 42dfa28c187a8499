"""A recording on the clock of the set: which frame is on screen at each tick, and which rows belong to it.

The clock starts with the first frame of a recording. Tick k is at k / fps seconds, and output frame k shows
the source frame that is on screen at that time, by the true time stamps (so a variable frame rate comes out
right). Time stamps are trusted to within half a unit of the container's own clock, to which they were
rounded.

Actions: row j of a file is what led from frame j-1 to frame j. Output frame k then gets everything that
happened between the source frame shown at k-1 and the one shown at k, put together by a rule for each column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from datamodules.sources.frame_stream import TimedFrame
from longtake.errors import BadSampleError

ACTION_RULES = ("max", "mean", "sum", "last")
_LONGEST_HOLD = 60  # seconds; a picture that stands longer is a broken time stamp, and would be repeated without end


@dataclass(frozen=True)
class Span:
    """Where output frame k lies on the source: the frame shown at tick k and the one shown at the tick
    before.

    Attributes:
        index: source frame shown at this tick.
        time: when that frame came on screen, seconds after the first one.
        previous: the same two of the tick before, None at the first tick of a recording.
        scene: number of cuts before that frame.
    """

    index: int
    time: Fraction
    previous: tuple[int, Fraction] | None
    scene: int = 0


def on_clock(frames: Iterator[TimedFrame], *, fps: Fraction, slack: Fraction) -> Iterator[tuple[Span, TimedFrame]]:
    """Yields, for each tick of a clock of `fps`, the frame on screen and its span.

    Raises:
        BadSampleError: from the recording, or because one picture stands longer than a minute.
    """
    shown: TimedFrame | None = None
    start, tick = Fraction(0), 0
    previous: tuple[int, Fraction] | None = None

    def until(end: Fraction) -> Iterator[tuple[Span, TimedFrame]]:
        nonlocal tick, previous
        assert shown is not None, "ticks are counted only once a frame is on screen"
        if end - (shown.time - start) > _LONGEST_HOLD:
            raise BadSampleError(f"frame {shown.index} would stay on screen for more than {_LONGEST_HOLD} s")
        while tick / fps + slack < end:
            span = Span(shown.index, shown.time - start, previous, shown.scene)
            yield span, shown
            tick, previous = tick + 1, (span.index, span.time)

    for frame in frames:
        if shown is None:
            start = frame.time
        else:
            yield from until(frame.time - start)
        shown = frame
    if shown is not None:
        last = shown.time - start
        mean = last / shown.index if shown.index and last > 0 else 1 / fps
        stated = shown.duration
        yield from until(last + (stated if stated is not None and 0 < stated <= _LONGEST_HOLD else mean))


def resample_actions(
    rows: np.ndarray, spans: Sequence[Span], *, rules: Sequence[str], fps: Fraction | None
) -> np.ndarray:
    """Returns the actions of output frames, float32 [t a].

    Args:
        rows: float32 [n a]; row j produced source frame j or, with `fps`, acted in the last 1/fps seconds
            before j/fps.
        spans: one for each output frame.
        rules: for each column how several rows become one: "max" the value of largest size, "mean", "sum",
            "last". Where a source frame is shown again nothing new happened: "sum" gives 0, the others hold
            their value.
        fps: rows a second, or None for one row a source frame.
    """
    out = np.zeros((len(spans), rows.shape[1]), np.float32)
    for k, span in enumerate(spans):
        if span.previous is None:
            continue  # nothing produced the first frame
        part, weights = _rows_between(rows, span, fps)
        held = rows[_row_at(span, fps, len(rows))]
        for column, rule in enumerate(rules):
            values = part[:, column]
            if len(values) == 0:
                out[k, column] = 0 if rule == "sum" else held[column]
            elif rule == "max":
                out[k, column] = values[np.argmax(np.abs(values))]
            elif rule == "mean":
                out[k, column] = np.average(values, weights=weights)
            elif rule == "sum":
                out[k, column] = np.sum(values * weights)
            else:
                out[k, column] = values[-1]
    return out


def resample_states(rows: np.ndarray, spans: Sequence[Span], *, fps: Fraction | None) -> np.ndarray:
    """Returns the states of output frames, float32 [t s]: the last row when the source frame appeared."""
    return rows[[_row_before(span, fps, len(rows)) for span in spans]]


def check_rows(what: str, rows: np.ndarray, *, num_frames: int, seconds: Fraction, fps: Fraction | None) -> None:
    """Raises BadSampleError when a file of rows does not fit its recording.

    Args:
        what: name of the file, for the message.
        rows: [n columns].
        num_frames: frames of the recording.
        seconds: its length.
        fps: rows a second, or None for one row a frame.
    """
    if fps is None:
        if len(rows) != num_frames:
            raise BadSampleError(
                f"{what} has {len(rows)} rows, the recording {num_frames} frames; expected one row a frame"
            )
        return
    expected = round(seconds * fps)
    if abs(len(rows) - expected) > 1:
        raise BadSampleError(
            f"{what} has {len(rows)} rows; {float(seconds):.2f} s at {float(fps):g} rows a second make {expected}"
        )


def _rows_between(rows: np.ndarray, span: Span, fps: Fraction | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that act between two shown frames, and the share of each that lies between them."""
    assert span.previous is not None, "the first frame of a recording has no action"
    if fps is None:
        part = rows[span.previous[0] + 1 : span.index + 1]
        return part, np.ones(len(part))
    begin, end = span.previous[1] * fps, span.time * fps
    indices = np.arange(int(begin) + 1, -int(-end // 1) + 1)  # row r acts in (r - 1, r] units of its clock
    weights = np.minimum(indices, float(end)) - np.maximum(indices - 1, float(begin))
    return rows[np.minimum(indices, len(rows) - 1)], weights


def _row_at(span: Span, fps: Fraction | None, count: int) -> int:
    row = span.index if fps is None else -int(-(span.time * fps) // 1)
    return min(row, count - 1)


def _row_before(span: Span, fps: Fraction | None, count: int) -> int:
    return min(span.index if fps is None else int(span.time * fps), count - 1)
