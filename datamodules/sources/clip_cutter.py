"""From a recording of any length to clips: one clock, one size, all cameras in step, memory for one clip.

Shared by every source that starts from encoded video.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from datamodules.sources.base import RawSample, Skipped
from datamodules.sources.clip_settings import ClipSettings
from datamodules.sources.frame_stream import FrameReader, Summary, TimedFrame
from datamodules.sources.resample import (
    Span,
    check_rows,
    on_clock,
    resample_actions,
    resample_states,
)
from datamodules.sources.resize import fit_frame
from datamodules.sources.scene_cuts import number_scenes
from longtake.errors import BadSampleError

# 29.97 frames a second may serve as 30: one frame in 200 is shown twice. More than that is upsampling.
_UPSAMPLING_TOLERANCE = Fraction(1005, 1000)


@dataclass(frozen=True)
class Recording:
    """Everything that belongs to one recording.

    Attributes:
        name: how the user knows it, for messages.
        key: unique in the set, `[A-Za-z0-9_-]+`; also its episode unless one is given.
        episode: what the split was drawn by.
        views: a reader for each camera, in rig order.
        control: a reader for each control type and camera.
        actions: float32 [n a] or None, one row a frame of the first camera or a tick of `actions_fps`.
        states: float32 [n s] or None, likewise.
        captions: captions of the whole recording.
        meta: kept with every clip.
    """

    name: str
    key: str
    episode: str
    views: dict[str, FrameReader]
    control: dict[str, dict[str, FrameReader]] = field(default_factory=dict)
    actions: np.ndarray | None = None
    states: np.ndarray | None = None
    captions: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Instant:
    """A tick: for each stream, (control type or "", view), its picture and its cuts so far; and the span."""

    tick: int
    span: Span
    pictures: dict[tuple[str, str], np.ndarray]
    scenes: tuple[int, ...]


def cut_clips(
    recording: Recording, settings: ClipSettings, action_names: Sequence[str]
) -> Iterator[RawSample | Skipped]:
    """Yields the clips of a recording in order, then Skipped with the reason if some or all of it could not
    be used.

    A recording that is damaged half-way gives the clips before the damage. A tail too short for a clip is
    dropped and counted in the last clip's `meta["dropped_frames"]`, or kept as a shorter clip with
    `keep_short`.
    """
    cutter = _Cutter(recording, settings, settings.action_rules(action_names))
    reason = ""
    try:
        streams = {("", view): reader for view, reader in recording.views.items()}
        for kind, readers in recording.control.items():
            streams |= {(kind, view): reader for view, reader in readers.items()}
        summaries = {name: _check_stream(name, reader, settings) for name, reader in streams.items()}
        _check_numbers(recording, settings, next(iter(summaries.values())))
        if settings.on_length_mismatch == "skip":
            _check_lengths(streams, summaries, settings.video.fps)
        instants = _instants(streams, summaries, settings)
        for instant in instants:
            yield from cutter.add(instant)
    except BadSampleError as error:
        reason = str(error)
    yield from cutter.finish()
    if reason:
        kept = f" (its first {cutter.num_clips} clips are kept)" if cutter.num_clips else ""
        yield Skipped(recording.name, reason + kept)
    elif not cutter.num_clips:
        yield Skipped(recording.name, cutter.too_short())


class _Cutter:
    """Collects instants and gives out clips; holds one back until it is known whether it is the last."""

    def __init__(self, recording: Recording, settings: ClipSettings, rules: list[str]) -> None:
        self._recording, self._settings, self._rules = recording, settings, rules
        self._buffer: list[_Instant] = []
        self._fresh = 0  # instants at the end of the buffer that stand in no clip yet
        self._gap = 0  # instants still to be left out, where the stride is longer than a clip
        self._scenes: tuple[int, ...] = ()
        self._held: RawSample | None = None
        self._longest = self._total = self._dropped = 0
        self.num_clips = 0

    def add(self, instant: _Instant) -> Iterator[RawSample]:
        self._total += 1
        if instant.scenes != self._scenes:
            yield from self._end_scene()
        self._scenes = instant.scenes
        if self._gap:
            self._gap -= 1
            return
        self._buffer.append(instant)
        self._fresh += 1
        self._longest = max(self._longest, len(self._buffer))
        if len(self._buffer) == self._settings.clip_frames:
            yield from self._emit()
            stride = self._settings.stride
            self._gap = max(0, stride - len(self._buffer))
            self._buffer = self._buffer[stride:]

    def finish(self) -> Iterator[RawSample]:
        yield from self._end_scene()
        if self._held is not None:
            if self._dropped:
                self._held.meta["dropped_frames"] = self._dropped
            yield self._held
            self._held = None

    def too_short(self) -> str:
        rate, settings = float(self._settings.video.fps), self._settings
        scene = f", the longest scene {self._longest}" if self._longest < self._total else ""
        return (
            f"{self._total} frames at {rate:g} fps{scene}; a clip needs {settings.clip_frames} "
            "(source.clip_frames; source.keep_short=true keeps shorter ones)"
        )

    def _end_scene(self) -> Iterator[RawSample]:
        if self._fresh and self._settings.keep_short:
            yield from self._emit()
        self._dropped += self._fresh
        self._buffer, self._fresh, self._gap = [], 0, 0

    def _emit(self) -> Iterator[RawSample]:
        if self._held is not None:
            yield self._held
        self._held = self._clip(self._buffer)
        self.num_clips += 1
        self._fresh = 0

    def _clip(self, instants: list[_Instant]) -> RawSample:
        recording, spans = self._recording, [instant.span for instant in instants]
        views: dict[str, np.ndarray] = {}
        control: dict[str, dict[str, np.ndarray]] = {}
        for kind, view in instants[0].pictures:
            frames = np.stack([instant.pictures[kind, view] for instant in instants])
            if kind:
                control.setdefault(kind, {})[view] = frames
            else:
                views[view] = frames
        actions = states = None
        if recording.actions is not None:
            actions = resample_actions(recording.actions, spans, rules=self._rules, fps=self._settings.actions_fps)
        if recording.states is not None:
            states = resample_states(recording.states, spans, fps=self._settings.states_fps)
        first = instants[0]
        where = {
            "first_frame": first.tick,
            "start_seconds": round(float(first.tick / self._settings.video.fps), 6),
        }
        return RawSample(
            key=f"{recording.key}_{first.tick:06d}",
            episode=recording.episode,
            views=views,
            control=control,
            actions=actions,
            states=states,
            captions=list(recording.captions),
            meta={"source": recording.name, **where, **recording.meta},
            num_frames=len(instants),
        )


def _instants(
    streams: Mapping[tuple[str, str], FrameReader],
    summaries: Mapping[tuple[str, str], Summary],
    settings: ClipSettings,
) -> Iterator[_Instant]:
    """Yields the ticks of all streams in step, up to the end of the shortest."""
    pictures = {name: _pictures(name, streams[name], summaries[name], settings) for name in streams}
    tick = 0
    try:
        while True:
            row: dict[tuple[str, str], np.ndarray] = {}
            spans: list[Span] = []
            for name, stream in pictures.items():
                try:
                    item = next(stream, None)
                except BadSampleError as error:
                    raise BadSampleError(_label(name) + str(error)) from error
                if item is None:
                    return
                spans.append(item[0])
                row[name] = item[1]
            # Actions and states go by the first camera.
            yield _Instant(tick, spans[0], row, tuple(span.scene for span in spans))
            tick += 1
    finally:
        for stream in pictures.values():
            stream.close()


def _pictures(
    name: tuple[str, str], reader: FrameReader, summary: Summary, settings: ClipSettings
) -> Generator[tuple[Span, np.ndarray], None, None]:
    last: tuple[TimedFrame, np.ndarray] | None = None
    frames = reader.frames()
    if settings.split_scenes and not name[0]:
        frames = number_scenes(frames, min_change=settings.cut_min_change, min_ratio=settings.cut_min_ratio)
    for span, frame in on_clock(frames, fps=settings.video.fps, slack=summary.slack):
        if last is None or last[0].index != frame.index:
            picture = fit_frame(
                frame.load(),
                height=settings.video.height,
                width=settings.video.width,
                mode=settings.resize,
                pixel_aspect=frame.pixel_aspect,
                nearest=name[0] in settings.nearest_controls,
            )
            last = (frame, picture)
        yield span, last[1]


def _check_stream(name: tuple[str, str], reader: FrameReader, settings: ClipSettings) -> Summary:
    try:
        summary = reader.summary()
    except BadSampleError as error:
        raise BadSampleError(_label(name) + str(error)) from error
    wanted = settings.video.fps
    if summary.fps and wanted > summary.fps * _UPSAMPLING_TOLERANCE and not settings.allow_fps_upsampling:
        raise BadSampleError(
            f"{_label(name)}it has {float(summary.fps):.4g} fps and the set {float(wanted):.4g}; frames "
            "would be repeated (change video.fps, or allow it with source.allow_fps_upsampling=true)"
        )
    return summary


def _check_numbers(recording: Recording, settings: ClipSettings, summary: Summary) -> None:
    """Checks the rows of actions and states against the first camera, before any clip is given out."""
    if recording.actions is None and recording.states is None:
        return
    reader = next(iter(recording.views.values()))
    num_frames = reader.count_frames() if summary.num_frames is None else summary.num_frames
    seconds = num_frames / summary.fps if summary.fps else Fraction(0)
    for what, rows, fps in (
        ("actions", recording.actions, settings.actions_fps),
        ("states", recording.states, settings.states_fps),
    ):
        if rows is not None:
            check_rows(what, rows, num_frames=num_frames, seconds=seconds, fps=fps)


def _check_lengths(
    streams: Mapping[tuple[str, str], FrameReader],
    summaries: Mapping[tuple[str, str], Summary],
    fps: Fraction,
) -> None:
    """Raises BadSampleError when the streams do not end within the same tick of the clock."""
    counts = {name: reader.count_frames() for name, reader in streams.items()}
    seconds = {name: count / (summaries[name].fps or fps) for name, count in counts.items()}
    if max(seconds.values()) - min(seconds.values()) >= 1 / fps:
        text = ", ".join(f"{_label(name) or 'video'} {float(value):.2f} s" for name, value in seconds.items())
        raise BadSampleError(
            f"its videos differ in length ({text}); source.on_length_mismatch=cut cuts to the shortest"
        )


def _label(name: tuple[str, str]) -> str:
    kind, view = name
    if not kind and view == "main":
        return ""
    return f"{'control ' + kind + ' of ' if kind else ''}view {view}: "
