"""Writes a rollout while it is made, and measures it: mp4, contact sheet and figures, with constant memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.generate import Generation
from longtake.media.view_files import ViewLayout
from longtake.media.write import write_bytes
from longtake.metrics.baselines import copy_last
from longtake.metrics.frames import change, mean_colour, psnr, sharpness, ssim, unit_frames
from longtake.rollout_files import SampleFiles
from longtake.streaming import VideoChunk
from longtake.truth import TrueFrames, Truth

_LATE_FRAMES = 81  # at the end of a long rollout, where a collapse would show
_MIB = 1 << 20
_RATIOS = {"sharpness_ratio": "sharpness", "frame_change_ratio": "frame_change"}


@dataclass
class SampleReport:
    """Figures of one video, given frames left out: lists with one entry a predicted chunk."""

    name: str
    chunks: list[int] = field(default_factory=list)
    per_chunk: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    num_frames: list[int] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)
    off_colours: list[Tensor] = field(default_factory=list)

    def add(self, chunk: int, num_frames: int, values: Mapping[str, float], off_colour: Tensor | None = None) -> None:
        """Notes the figures of a chunk of `num_frames` predicted frames, and how far its mean colours are off [v c]."""
        if off_colour is not None:
            self.off_colours.append(off_colour)
        self.chunks.append(chunk)
        self.num_frames.append(num_frames)
        for name, value in values.items():
            self.per_chunk.setdefault(name, []).append(value)
        self.resident_mib.append(resident_mib())

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
        """Returns sharpness and change, beside and over those of the truth, from a chunk on.

        At the end also how far colours are off, in the worst channel: the distance of mean colours chunk by chunk, and
        the drift, that between the mean colours of all these frames.
        """
        if not self.chunks or len(self.per_chunk.get("true_sharpness", ())) < len(self.chunks):
            return {}  # there is no truth, or it ends before the video does

        def mean(name: str) -> float:
            return float(np.mean(self.per_chunk[name][first:]))

        looks = {}
        for ratio, name in _RATIOS.items():
            looks |= {f"{prefix}{name}": mean(name), f"{prefix}true_{name}": mean(f"true_{name}")}
            looks[f"{prefix}{ratio}"] = _ratio(looks[f"{prefix}{name}"], looks[f"{prefix}true_{name}"])
        if prefix:
            weights = torch.tensor(self.num_frames[first:], dtype=torch.float64)
            off = torch.stack(self.off_colours[first:])
            drift = (off * (weights / weights.sum())[:, None, None]).sum(0).abs().amax(1)
            looks[f"{prefix}mean_colour_distance"] = mean("mean_colour_distance")
            looks[f"{prefix}colour_drift"] = _mean(drift)
        return looks

    def to_json(self) -> dict[str, Any]:
        """Returns {"metrics", "per_chunk"}, plain JSON."""
        memory = {"resident_mib": self.resident_mib}
        return {"metrics": self.metrics(), "per_chunk": {"chunk": self.chunks, **self.per_chunk, **memory}}

    def memory_line(self, early: int = 5) -> str | None:
        """Returns what the process held early and at the end, for people; None: the video is too short to tell."""
        if len(self.chunks) < 2 * early:
            return None
        then, now = self.resident_mib[early - 1], self.resident_mib[-1]
        return f"resident memory {then:.0f} MiB at chunk {self.chunks[early - 1]}, {now:.0f} at {self.chunks[-1]}"


def write_rollout(
    generation: Generation,
    folders: Sequence[Path],
    *,
    fps: Fraction,
    truth: Truth | None = None,
    only_eval: bool = False,
    layout: ViewLayout | None = None,
    action_names: Sequence[str] = (),
) -> list[SampleReport]:
    """Makes the videos of a generation and returns their figures.

    Writes to each folder output.mp4 (several views side by side), output.png and metrics.json; of several views also
    what `ViewFiles` says; with action names also output_actions.mp4; with a truth also comparison.mp4 and, of one view,
    comparison.gif, generated | truth | difference. A file appears under its name when it is whole.

    Args:
        generation: one or more samples.
        folders: one a sample.
        fps: frames per second of the files.
        truth: what the videos are compared with.
        only_eval: write metrics.json only.
        layout: what the views are called and where they belong; None: by their numbers, row by row.
        action_names: names of the columns of the actions, where they are to be drawn.

    Raises:
        DataError: a file cannot be written.
    """
    reports = [SampleReport(folder.name) for folder in folders]
    names = layout.names if layout is not None and len(layout.names) > 1 else ()
    told = {"fps": fps, "num_frames": generation.num_frames, "layout": layout}
    told |= {"actions": generation.request.actions, "action_names": action_names}
    last_given: Tensor | None = None
    before: VideoChunk | None = None
    with contextlib.ExitStack() as stack:
        files = [] if only_eval else [stack.enter_context(SampleFiles(folder, **told)) for folder in folders]
        for chunk, seconds in _timed(generation):
            true = truth.of(chunk) if truth is not None else None
            for sample, own in enumerate(files):
                own.write(chunk, sample, true)
            if chunk.num_given:
                last_given = unit_frames(chunk.frames[0][:, chunk.num_given - 1 : chunk.num_given])
            for sample, report in enumerate(reports):
                report.seconds += seconds / len(reports)
                if chunk.num_given < chunk.frames.shape[2]:
                    figures, off_colour = _figures(chunk, before, sample, true, last_given, names)
                    report.add(chunk.index, chunk.frames.shape[2] - chunk.num_given, figures, off_colour)
            before = chunk
    for own in files:
        own.finish()
    for folder, report in zip(folders, reports, strict=True):
        write_json(folder / "metrics.json", report.to_json())
    return reports


def summary(reports: Sequence[SampleReport], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of a run: means over its videos, in all and chunk by chunk."""
    metrics = [report.metrics() for report in reports]
    names = list(dict.fromkeys(name for row in metrics for name in row))
    means = {name: float(np.mean([row[name] for row in metrics if name in row])) for name in names}
    for prefix, (ratio, figure) in itertools.product(("", "late_"), _RATIOS.items()):
        told = [row for row in metrics if f"{prefix}{ratio}" in row]
        if told:  # of means: the ratio of one video whose truth is a bare wall says nothing
            own, true = (sum(row[f"{prefix}{part}{figure}"] for row in told) for part in ("", "true_"))
            means[f"{prefix}{ratio}"] = _ratio(own, true)
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


def resident_mib() -> float:
    """Returns the memory that this process holds, MiB; where the system does not tell, the most that it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (_MIB if sys.platform == "darwin" else 1024)
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


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


def _figures(
    chunk: VideoChunk,
    before: VideoChunk | None,
    sample: int,
    true: TrueFrames | None,
    last_given: Tensor | None,
    names: Sequence[str],
) -> tuple[dict[str, float], Tensor | None]:
    """Returns the figures of the predicted frames of a chunk, and with a truth their mean colours less its own, [v c].

    Views count as clips of their own; PSNR is also told for each of several views, by their `names`.

    The change from frame to frame includes that from the frame before, so that a jump between chunks counts.
    """
    given = chunk.num_given
    pred = unit_frames(chunk.frames[sample][:, given:])
    earlier = chunk.frames[sample][:, given - 1 : given] if given else None
    if earlier is None and before is not None:
        earlier = before.frames[sample][:, -1:]
    values = {"sharpness": _mean(sharpness(pred)), "frame_change": _mean(change(_after(earlier, pred)))}
    if true is None or true.frames.shape[1] <= given:
        return values, None
    frames, recoded = (unit_frames(part[:, given:]) for part in (true.frames, true.recoded))
    pred = pred[:, : frames.shape[1]]
    true_earlier = true.frames[:, given - 1 : given] if given else true.before
    psnrs, off_colour = psnr(pred, frames), mean_colour(pred) - mean_colour(frames)
    values |= {
        "psnr_db": _mean(psnrs),
        "ssim": _mean(ssim(pred, frames)),
        "true_sharpness": _mean(sharpness(frames)),
        "true_frame_change": _mean(change(_after(true_earlier, frames))),
        "mean_colour_distance": _mean(off_colour.abs().amax(1)),
    }
    values |= {f"psnr_db@{name}": float(value) for name, value in zip(names, psnrs, strict=len(names) > 0)}
    if last_given is not None:
        copied = copy_last(last_given, frames.shape[1])
        values |= {"copy_last_psnr_db": _mean(psnr(copied, frames)), "copy_last_ssim": _mean(ssim(copied, frames))}
    if recoded.shape[1] == frames.shape[1]:
        values["vae_ceiling_psnr_db"] = _mean(psnr(recoded, frames))
        values["vae_ceiling_ssim"] = _mean(ssim(recoded, frames))
        values["psnr_to_recoded_db"] = _mean(psnr(pred, recoded))
        values["ssim_to_recoded"] = _mean(ssim(pred, recoded))
    return values, off_colour


def _after(earlier: np.ndarray | None, frames: Tensor) -> Tensor:
    """Returns frames [b t c h w] behind the one before them, uint8 [b 1 h w c], if there is one."""
    return frames if earlier is None else torch.cat([unit_frames(earlier), frames], dim=1)


def _ratio(value: float, true: float) -> float:
    return value / max(1e-6, true)


def _mean(values: Tensor) -> float:
    return float(values.mean())
