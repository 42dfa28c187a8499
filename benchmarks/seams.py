"""Seams and drift of long rollouts: sliding windows by hand-off, overlap and context noise, and the memory rollout.

All rows begin with the same given frames and have the same actions and noise keys. Ratios are to the truth of the same
frames, brackets are 95 % bootstrap intervals over clips; the effect of each choice is paired clip by clip.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.held_out import add_model_options, held_out_windows, prepared_model, stacked
from benchmarks.report import write_result
from longtake.generate_diffusion import DiffusionModel
from longtake.generate_windows import window_actions
from longtake.metrics.bootstrap import Interval, bootstrap, ratio_of_means
from longtake.metrics.drift import LATE_FRAMES, Drift, colour_drift, sharpness_drift
from longtake.metrics.frames import psnr, unit_frames
from longtake.metrics.seams import frame_changes, seam, seam_of_means, seam_parts
from longtake.rollout.chunks import MemoryRollout
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan
from longtake.rollout.sliding_plan import AnyPlan, SlidingPlan, plan_of
from longtake.rollout.sliding_window import SlidingWindowRollout
from longtake.streaming import to_uint8, to_unit_range
from longtake.types import Clip, Conditions

_NEXT = 24  # frames after the first chunk: whole chunks of all rows (8 and 4 new frames a window, 12 a chunk)
_HAND_OFFS = ("float", "uint8")
_WEIGHTS = "weights/ar_chunk3f_doom.safetensors"


def run(argv: list[str]) -> int:
    """Runs the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks seams", description=__doc__)
    parser.add_argument("--ckpt", default=_WEIGHTS, help="a run folder, a .safetensors file or a .ckpt")
    parser.add_argument("--frames", type=int, default=405, help="length of the rollouts, the given frames included")
    parser.add_argument("--given", type=int, default=5, help="frames given at the start")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--split", default="long", help="of held-out clips")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--context-noise", type=float, default=0.1, help="level of the rows that have it")
    parser.add_argument("--allow-untrained-overlap", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser)
    parser.add_argument("--output", type=Path, default=None, help="write the figures there as JSON")
    options = parser.parse_args(argv)
    model, data = prepared_model(options)
    chosen = rollouts(model, options)
    lengths = {"num_frames_px": options.frames, "context_px": options.given, "trained": model.spec.trained_for}
    plans = {name: plan_of(rollout, **lengths) for name, rollout in chosen.items()}
    clips = held_out_windows(data, options.split, options.frames, options.clips)
    truth = unit_frames(np.stack([clip["frames"][0] for clip in clips]))
    rows: dict[str, Row] = {}
    print(
        f"{options.ckpt}: {len(clips)} clips of split {options.split!r}, {options.frames} frames, {options.given} given"
    )
    print(Row.header())
    for name, plan in plans.items():
        model.rollout = chosen[name]
        frames, seconds = made(model, plan, clips, NoiseKey(options.seed, tuple(clip["key"] for clip in clips)))
        rows[name] = measured(unit_frames(frames), truth, starts_of(plan), options.given, seconds)
        print(rows[name].text(name), flush=True)
    for name, frames in references(model, clips, truth).items():
        rows[name] = measured(frames, truth, starts_of(plan), options.given, [])
        print(rows[name].text(name), flush=True)
    found = effects({name: row.of_clips for name, row in rows.items()}, options.overlaps, options.context_noise)
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{figure} {value}" for figure, value in figures.items()))
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    table = {name: row.to_json() for name, row in rows.items()}
    plain = {name: {key: value.to_json() for key, value in figures.items()} for name, figures in found.items()}
    write_result("seams", {"settings": settings, "rows": table, "effects": plain}, options.output)
    return 0


# What is rolled out


def sliding_name(hand_off: str, overlap: int, level: float) -> str:
    """Returns the name of a row."""
    return f"sliding, {hand_off}, overlap {overlap}, {f'noise {level}' if level else 'clean'}"


def rollouts(model: DiffusionModel, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the rollouts by the name of their row, with the steps and the guidance of the model's own.

    Memory comes last, and only where the weights were trained for it.

    Raises:
        ConfigError: an overlap that the weights were not trained with.
    """
    own = model.rollout
    shared = {
        "num_steps": own.num_steps,
        "guidance": own.guidance.scale,
        "unconditional": own.guidance.without,
        "guidance_interval": own.guidance.interval,
    }
    levels = (0.0, options.context_noise)
    found: dict[str, Any] = {
        sliding_name(hand_off, overlap, level): SlidingWindowRollout(
            chunk_overlap=overlap,
            hand_off=hand_off,
            context_noise=level,
            allow_untrained_overlap=options.allow_untrained_overlap,
            **shared,
        )
        for overlap, hand_off, level in itertools.product(options.overlaps, _HAND_OFFS, levels)
    }
    if "memory" in model.spec.trained_for.rollouts:
        for level in levels:
            name = f"memory, {f'noise {level}' if level else 'clean'}"
            found[name] = MemoryRollout(context_noise=level, **shared)
    return found


def references(model: DiffusionModel, clips: list[dict[str, Any]], truth: Tensor) -> dict[str, Tensor]:
    """Returns frames that need no model of time: what the first stage makes of the truth, and another clip's truth."""
    recoded = []
    for clip in clips:
        length = clip["frames"].shape[1]
        usable = length - (length - 1) % model.spec.trained_for.ratio
        with torch.no_grad():
            video = model.video_encoder.decode(model.encode(clip["frames"][None, :, :usable]))
        frames = np.concatenate([to_uint8(video)[0, 0], clip["frames"][0, usable:]])
        recoded.append(unit_frames(frames))
    return {"first stage alone": torch.stack(recoded), "truth of another clip": truth.roll(1, dims=0)}


def made(
    model: DiffusionModel, plan: AnyPlan, clips: list[dict[str, Any]], key: NoiseKey
) -> tuple[np.ndarray, list[float]]:
    """Returns the frames of the first view, uint8 [b t h w c], and the seconds that each chunk took for one clip."""
    stream, parts, seconds = _stream(model, plan, clips, key), [], []
    while True:
        begin = time.perf_counter()
        frames = next(stream, None)
        if frames is None:
            return np.concatenate(parts, axis=1), seconds
        seconds.append((time.perf_counter() - begin) / len(clips))
        parts.append(frames[:, 0])


def _stream(model: DiffusionModel, plan: AnyPlan, clips: list[dict[str, Any]], key: NoiseKey) -> Iterator[np.ndarray]:
    """Yields the frames of one chunk after the other, uint8 [b v t h w c]."""
    frames = np.stack([clip["frames"] for clip in clips])
    given = frames[:, :, : plan.start_px]
    clip = Clip(
        actions=stacked(clips, "actions", model) if model.spec.action_names else None,
        fps=torch.full((len(clips),), float(model.fps), device=model.device),
        view_ids=torch.arange(frames.shape[1], device=model.device).expand(len(clips), -1),
    )
    clip = dataclasses.replace(clip, **model.text_fields([item["caption"] or "" for item in clips]))
    if isinstance(plan, RolloutPlan):
        with torch.no_grad():
            clip = dataclasses.replace(clip, latents=model.encode(given))
        yield from (chunk.frames for chunk in model.roll_out(clip, plan, key))
        return
    windows = model.rollout(
        model.network,
        to_unit_range(given, model.device),
        _told(clip, plan),
        plan,
        model.solver,
        key,
        codec=model.video_encoder,
    )
    yield from (to_uint8(chunk.frames) for chunk in model.in_precision(windows))


def _told(clip: Clip, plan: SlidingPlan) -> Callable[[int], Conditions]:
    """Returns what gives the conditions of a window."""

    def of_window(chunk: int) -> Conditions:
        start, stop = plan.windows.window_of(chunk)
        actions = clip.actions
        if actions is not None:
            actions = window_actions(actions[:, start:stop], stop - start, plan.trained.ratio)[:, None]
        return Conditions(
            text_emb=clip.text_emb,
            text_ids=clip.text_ids,
            text_mask=clip.text_mask,
            actions=actions,
            fps=clip.fps,
            view_ids=clip.view_ids,
        )

    return of_window


def starts_of(plan: AnyPlan) -> list[int]:
    """Returns the number of the first frame of each chunk."""
    return [plan.frames_of(chunk)[0] for chunk in range(plan.num_chunks)]


# What is measured


@dataclass(frozen=True)
class Row:
    """The figures of one rollout."""

    seam: Interval
    colour: Drift
    sharpness: Drift
    change: Interval
    first_psnr: Interval
    next_psnr: Interval
    of_clips: dict[str, list[float]]
    seconds_per_chunk: float | None
    seconds_per_100_frames: float | None

    @staticmethod
    def header() -> str:
        """Returns the heads of the columns."""
        names = ("seam", "colour, last 81", "a 100 frames", "sharpness, last 81", "a 100 frames", "change, last 81")
        first = (*names, "psnr first chunk", f"psnr next {_NEXT}")
        return f"{'':36}" + "".join(f"{name:>20}" for name in first) + f"{'s a chunk':>11}{'s a 100 fr.':>12}"

    def text(self, name: str) -> str:
        """Returns the line of the table."""
        colour, sharpness = self.colour, self.sharpness
        cells = (self.seam, colour.late, colour.slope, sharpness.late, sharpness.slope, self.change)
        line = "".join(f"{cell!s:>20}" for cell in (*cells, self.first_psnr, self.next_psnr))
        if self.seconds_per_chunk is None or self.seconds_per_100_frames is None:
            return f"{name:36}{line}"
        return f"{name:36}{line}{self.seconds_per_chunk:11.3f}{self.seconds_per_100_frames:12.2f}"

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON."""
        drifts = {"colour_distance": self.colour.to_json(), "sharpness_ratio": self.sharpness.to_json()}
        intervals = {
            "seam": self.seam,
            "frame_change_ratio_last_81_frames": self.change,
            "psnr_first_chunk_db": self.first_psnr,
            f"psnr_next_{_NEXT}_frames_db": self.next_psnr,
        }
        return {
            **{name: value.to_json() for name, value in intervals.items()},
            **drifts,
            "of_clips": self.of_clips,
            "seconds_per_chunk": self.seconds_per_chunk,
            "seconds_per_100_frames": self.seconds_per_100_frames,
        }


def measured(pred: Tensor, truth: Tensor, starts: list[int], given: int, seconds: list[float]) -> Row:
    """Returns the figures of a rollout.

    Args:
        pred: its frames, float in [0, 1], [b t c h w].
        truth: the true ones.
        starts: number of the first frame of each chunk.
        given: frames that were given.
        seconds: that each chunk took for one clip; the first one is left out.
    """
    borders = [start for start in starts if start > given]
    first, stop = borders[0], borders[0] + _NEXT
    parts = seam_parts(pred, truth, borders, given)
    chunks = [0, *(start - given for start in borders)]
    colour, sharpness = (drift(pred[:, given:], truth[:, given:], chunks) for drift in (colour_drift, sharpness_drift))
    late = [frame_changes(frames[:, -LATE_FRAMES - 1 :]).mean(1).numpy() for frames in (pred, truth)]
    next_psnr = psnr(pred[:, first:stop], truth[:, first:stop]).numpy()
    rate = statistics.median(seconds[1:]) if len(seconds) > 1 else None
    of_clips = {
        "seam": seam_of_means(parts),
        "colour": np.array(colour.of_clips),
        "sharpness": np.array(sharpness.of_clips),
        "change": late[0] / late[1],
        "psnr": next_psnr,
    }
    return Row(
        seam=seam(parts),
        colour=colour,
        sharpness=sharpness,
        change=ratio_of_means(*late),
        first_psnr=bootstrap(psnr(pred[:, given:first], truth[:, given:first]).numpy()),
        next_psnr=bootstrap(next_psnr),
        of_clips={name: values.tolist() for name, values in of_clips.items()},
        seconds_per_chunk=rate,
        seconds_per_100_frames=None if rate is None else rate * 100 / (borders[1] - borders[0]),
    )


def effects(
    of_clips: dict[str, dict[str, list[float]]], overlaps: list[int], level: float
) -> dict[str, dict[str, Interval]]:
    """Returns what each choice changes: differences clip by clip, means over the other choices of a sliding rollout.

    The memory rollout is compared with the plainest sliding one.

    Args:
        of_clips: figures of each clip by row.
        overlaps: the first and the last of them are compared.
        level: of the context noise.
    """
    first, last = overlaps[0], overlaps[-1]

    def figures(**fixed: Any) -> dict[str, np.ndarray]:
        choices = {"hand_off": _HAND_OFFS, "overlap": (first, last), "level": (0.0, level)}
        choices |= {name: (value,) for name, value in fixed.items()}
        return mean_of(*(sliding_name(*values) for values in itertools.product(*choices.values())))

    def mean_of(*names: str) -> dict[str, np.ndarray]:
        return {figure: np.mean([of_clips[name][figure] for name in names], axis=0) for figure in of_clips[names[0]]}

    pairs = {
        "uint8 - float": (figures(hand_off="uint8"), figures(hand_off="float")),
        f"overlap {last} - {first}": (figures(overlap=last), figures(overlap=first)),
        f"noise {level} - clean": (figures(level=level), figures(level=0.0)),
        f"overlap {first}: noise {level} - clean": (
            figures(overlap=first, level=level),
            figures(overlap=first, level=0.0),
        ),
    }
    plain = sliding_name("float", first, 0.0)
    if "memory, clean" in of_clips:
        pairs[f"memory: noise {level} - clean"] = (mean_of(f"memory, noise {level}"), mean_of("memory, clean"))
        pairs[f"memory, clean - {plain}"] = (mean_of("memory, clean"), mean_of(plain))
    return {
        name: {figure: bootstrap(one[figure] - two[figure]) for figure in one} for name, (one, two) in pairs.items()
    }
