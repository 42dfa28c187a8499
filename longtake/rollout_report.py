"""Writes a rollout while it is made, and measures it: mp4, contact sheet and figures, with constant memory."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.generate import Generation
from longtake.media.gif import comparison, save_gif
from longtake.media.grid import contact_sheet, evenly
from longtake.media.view_files import ViewFiles, ViewLayout
from longtake.media.view_files import wide as side_by_side
from longtake.media.write import VideoWriter, save_image, write_bytes
from longtake.metrics.baselines import copy_last
from longtake.metrics.frames import change, mean_colour, psnr, sharpness, ssim, unit_frames
from longtake.rollout.sliding_plan import AnyPlan, SlidingPlan
from longtake.streaming import StreamDecoder, VideoChunk, to_uint8, to_unit_range

_SHEET_FRAMES = 16
_GIF_FRAMES = 240  # a GIF is held in memory, and players read all of it
_LATE_FRAMES = 81  # at the end of a long rollout, where a collapse would show


class Codec(StreamDecoder, Protocol):
    """A video encoder, for what its own round trip costs."""

    def encode(self, video: Tensor) -> Tensor:
        """Returns latents of video in [-1, 1], [b v t c h w]."""
        ...


@dataclass
class SampleReport:
    """Figures of one video, given frames left out: lists with one entry a predicted chunk."""

    name: str
    chunks: list[int] = field(default_factory=list)
    per_chunk: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    num_frames: list[int] = field(default_factory=list)

    def add(self, chunk: int, num_frames: int, values: Mapping[str, float]) -> None:
        """Notes the figures of a chunk of `num_frames` predicted frames."""
        self.chunks.append(chunk)
        self.num_frames.append(num_frames)
        for name, value in values.items():
            self.per_chunk.setdefault(name, []).append(value)

    def metrics(self) -> dict[str, float]:
        """Returns the mean of each figure over the chunks, looks against the truth, and the time that the video took.

        Of a video with more than 81 predicted frames the looks of the last 81 stand beside, as `late_...`.
        """
        means = {name: float(np.mean(values)) for name, values in self.per_chunk.items()}
        means |= self._looks("", 0)
        late = len(self.chunks)
        while late > 0 and sum(self.num_frames[late:]) < _LATE_FRAMES:
            late -= 1
        if late > 0:
            means |= self._looks("late_", late)
        return {**means, "seconds_per_chunk": self.seconds / max(1, len(self.chunks))}

    def _looks(self, prefix: str, first: int) -> dict[str, float]:
        """Returns sharpness and change over those of the truth, and the distance of mean colours, from a chunk on."""
        if len(self.per_chunk.get("true_sharpness", ())) < len(self.chunks):
            return {}  # there is no truth, or it ends before the video does

        def mean(name: str) -> float:
            return float(np.mean(self.per_chunk[name][first:]))

        colour = {f"{prefix}mean_colour_distance": mean("mean_colour_distance")} if prefix else {}
        return {
            f"{prefix}sharpness_ratio": mean("sharpness") / max(1e-6, mean("true_sharpness")),
            f"{prefix}frame_change_ratio": mean("frame_change") / max(1e-6, mean("true_frame_change")),
            **colour,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns {"metrics", "per_chunk"}, plain JSON."""
        return {"metrics": self.metrics(), "per_chunk": {"chunk": self.chunks, **self.per_chunk}}


class Truth:
    """The true frames of a video, and what the encoder makes of them, chunk by chunk.

    Args:
        frames: uint8 [v t h w c] from the first given frame on; may be shorter than the rollout.
        codec: the model's encoder.
        plan: of the rollout.
        device: of the encoder.
    """

    def __init__(self, frames: np.ndarray, codec: Codec, plan: AnyPlan, device: torch.device) -> None:
        self.frames, self._plan = frames, plan
        self._codec, self._device = codec, device
        self._latents: Tensor | None = None
        self._state: Any = None
        if isinstance(plan, SlidingPlan):
            return  # each window is a causal start of its own, encoded when it comes
        ratio, length = plan.trained.ratio, frames.shape[1]
        usable = length - (length - 1) % ratio if length else 0
        with torch.no_grad():
            self._latents = codec.encode(to_unit_range(frames[:, :usable], device)[None]) if usable else None

    def of(self, chunk: VideoChunk) -> tuple[np.ndarray, np.ndarray]:
        """Returns true and re-coded frames of a chunk, uint8 [v t h w c]; both may be shorter than it, or empty.

        Must be called for every chunk in order: decoding carries its state from one to the next.
        """
        true = self.frames[:, chunk.start : chunk.stop]
        if isinstance(self._plan, SlidingPlan):
            return true, self._window(chunk, self._plan)
        if self._latents is None:
            return true, true[:, :0]
        size = self._plan.trained.chunk_lat
        part = self._latents[:, :, chunk.index * size : (chunk.index + 1) * size]
        if not part.shape[2]:
            return true, true[:, :0]
        with torch.no_grad():
            video, self._state = self._codec.decode_stream(part, self._state)
        return true, to_uint8(video)[0][:, : true.shape[1]]

    def _window(self, chunk: VideoChunk, plan: SlidingPlan) -> np.ndarray:
        """Returns what the encoder makes of the new frames of a window; empty where the truth ends inside of it."""
        start, stop = plan.windows.window_of(chunk.index)
        true = self.frames[:, start:stop]
        if true.shape[1] < stop - start:
            return true[:, :0]
        with torch.no_grad():
            video = self._codec.decode_stream(self._codec.encode(to_unit_range(true, self._device)[None]), None)[0]
        return to_uint8(video)[0][:, chunk.start - start : chunk.stop - start]


def write_rollout(
    generation: Generation,
    folders: Sequence[Path],
    *,
    fps: Fraction,
    truth: Truth | None = None,
    only_eval: bool = False,
    layout: ViewLayout | None = None,
) -> list[SampleReport]:
    """Makes the videos of a generation and returns their figures.

    Writes to each folder output.mp4 (several views side by side), output.png and metrics.json; of several views also
    what `ViewFiles` says; with a truth also comparison.mp4 and comparison.gif, generated | truth | difference. A file
    appears under its name when it is whole.

    Args:
        generation: one or more samples.
        folders: one a sample.
        fps: frames per second of the files.
        truth: what the videos are compared with.
        only_eval: write metrics.json only.
        layout: what the views are called and where they belong; None: by their numbers, row by row.

    Raises:
        DataError: a file cannot be written.
    """
    reports = [SampleReport(folder.name) for folder in folders]
    shown = set(evenly(generation.num_frames, min(_SHEET_FRAMES, generation.num_frames)))
    sheets: list[list[np.ndarray]] = [[] for _ in folders]
    last_given: Tensor | None = None
    before: VideoChunk | None = None
    compared = [_Comparison(folder, fps) for folder in folders] if truth is not None and not only_eval else []
    with contextlib.ExitStack() as stack:
        files: list[ViewFiles] = []
        for chunk, seconds in _timed(generation):
            wide = [side_by_side(views) for views in chunk.frames]
            if not files and not only_eval:
                places = layout or ViewLayout(tuple(f"view_{index}" for index in range(chunk.frames.shape[1])))
                files = [stack.enter_context(ViewFiles(folder, fps=fps, layout=places)) for folder in folders]
            for own, views in zip(files, chunk.frames, strict=False):
                own.write(views, chunk.control)
            for sheet, frames in zip(sheets, wide, strict=True):
                sheet += [frames[n - chunk.start].copy() for n in range(chunk.start, chunk.stop) if n in shown]
            true = truth.of(chunk) if truth is not None else None
            for pair, frames in zip(compared, wide, strict=False):
                assert true is not None
                pair.add(stack, frames, side_by_side(true[0]))
            if chunk.num_given:
                last_given = unit_frames(chunk.frames[0][:, chunk.num_given - 1 : chunk.num_given])
            for sample, report in enumerate(reports):
                report.seconds += seconds / len(reports)
                if chunk.num_given < chunk.frames.shape[2]:
                    figures = _figures(chunk, before, sample, true, truth, last_given)
                    report.add(chunk.index, chunk.frames.shape[2] - chunk.num_given, figures)
            before = chunk
    for pair in compared:
        pair.finish()
    for folder, report, sheet in zip(folders, reports, sheets, strict=True):
        if not only_eval:
            rows = [(f"{report.name}  {generation.num_frames} frames", np.stack(sheet))]
            save_image(folder / "output.png", contact_sheet(rows, columns=_SHEET_FRAMES, numbers=False))
        write_json(folder / "metrics.json", report.to_json())
    return reports


def summary(reports: Sequence[SampleReport], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of a run: means over its videos, in all and chunk by chunk."""
    metrics = [report.metrics() for report in reports]
    names = list(dict.fromkeys(name for row in metrics for name in row))
    means = {name: float(np.mean([row[name] for row in metrics if name in row])) for name in names}
    by_chunk: dict[int, dict[str, list[float]]] = {}
    for report in reports:
        for name, values in report.per_chunk.items():
            for chunk, value in zip(report.chunks, values, strict=False):
                by_chunk.setdefault(chunk, {}).setdefault(name, []).append(value)
    chunks = sorted(by_chunk)
    figures = list(dict.fromkeys(name for row in by_chunk.values() for name in row))
    per_chunk: dict[str, list[Any]] = {"chunk": list(chunks)}
    for name in figures:
        per_chunk[name] = [float(np.mean(by_chunk[c][name])) if name in by_chunk[c] else None for c in chunks]
    return {
        "metrics": {"num_videos": len(reports), **means},
        "per_chunk": per_chunk,
        "provenance": dict(provenance),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that appears when it is whole. Raises DataError if it cannot."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _timed(generation: Generation) -> Iterator[tuple[VideoChunk, float]]:
    """Yields chunks and the seconds that each took."""
    while True:
        begin = time.perf_counter()
        chunk = next(generation, None)
        if chunk is None:
            return
        yield chunk, time.perf_counter() - begin


def _writer(stack: contextlib.ExitStack, path: Path, fps: Fraction, frames: np.ndarray) -> VideoWriter:
    height, width = frames.shape[1:3]
    return stack.enter_context(VideoWriter(path, fps=fps, height=height, width=width))


class _Comparison:
    """Generated | truth | difference, for as long as there is truth."""

    def __init__(self, folder: Path, fps: Fraction) -> None:
        self.folder, self.fps = folder, fps
        self._writer: VideoWriter | None = None
        self._frames: list[np.ndarray] = []
        self._count = 0

    def add(self, stack: contextlib.ExitStack, generated: np.ndarray, truth: np.ndarray) -> None:
        """Adds frames [t h w c]; there may be fewer true ones, or none."""
        if not len(truth):
            return
        frames = comparison(np.ascontiguousarray(generated[: len(truth)]), np.ascontiguousarray(truth))
        if self._writer is None:
            self._writer = _writer(stack, self.folder / "comparison.mp4", self.fps, frames)
        self._writer.write(frames)
        if self._count < _GIF_FRAMES:
            self._frames.append(frames[: _GIF_FRAMES - self._count])
        self._count += len(frames)

    def finish(self) -> None:
        """Writes the GIF of the first frames."""
        if self._frames:
            save_gif(self.folder / "comparison.gif", np.concatenate(self._frames), fps=self.fps)
            self._frames = []


def _figures(
    chunk: VideoChunk,
    before: VideoChunk | None,
    sample: int,
    true: tuple[np.ndarray, np.ndarray] | None,
    truth: Truth | None,
    last_given: Tensor | None,
) -> dict[str, float]:
    """Returns the figures of the predicted frames of a chunk; views count as clips of their own.

    The change from frame to frame includes that from the frame before, so that a jump between chunks counts.
    """
    given = chunk.num_given
    pred = unit_frames(chunk.frames[sample][:, given:])
    earlier = chunk.frames[sample][:, given - 1 : given] if given else None
    if earlier is None and before is not None:
        earlier = before.frames[sample][:, -1:]
    values = {"sharpness": _mean(sharpness(pred)), "frame_change": _mean(change(_after(earlier, pred)))}
    if true is None or truth is None or true[0].shape[1] <= given:
        return values
    frames, recoded = (unit_frames(part[:, given:]) for part in true)
    pred = pred[:, : frames.shape[1]]
    first = chunk.start + given
    true_earlier = truth.frames[:, first - 1 : first] if first else None
    values |= {
        "psnr_db": _mean(psnr(pred, frames)),
        "ssim": _mean(ssim(pred, frames)),
        "true_sharpness": _mean(sharpness(frames)),
        "true_frame_change": _mean(change(_after(true_earlier, frames))),
        "mean_colour_distance": _mean((mean_colour(pred) - mean_colour(frames)).abs().amax(1)),
    }
    if last_given is not None:
        copied = copy_last(last_given, frames.shape[1])
        values |= {"copy_last_psnr_db": _mean(psnr(copied, frames)), "copy_last_ssim": _mean(ssim(copied, frames))}
    if recoded.shape[1] == frames.shape[1]:
        values["vae_ceiling_psnr_db"] = _mean(psnr(recoded, frames))
        values["vae_ceiling_ssim"] = _mean(ssim(recoded, frames))
        values["psnr_to_recoded_db"] = _mean(psnr(pred, recoded))
        values["ssim_to_recoded"] = _mean(ssim(pred, recoded))
    return values


def _after(earlier: np.ndarray | None, frames: Tensor) -> Tensor:
    """Returns frames [b t c h w] behind the one before them, uint8 [b 1 h w c], if there is one."""
    return frames if earlier is None else torch.cat([unit_frames(earlier), frames], dim=1)


def _mean(values: Tensor) -> float:
    return float(values.mean())
