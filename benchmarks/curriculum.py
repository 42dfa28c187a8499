"""Context -> target: trainings with a curriculum against trainings without, paired by seed and clip.

Drift of rollouts on held-out clips (colour, sharpness, PSNR of the last frames), the validation loss with clean
contexts, and its rise when context or actions are those of another clip. Runs are given in the order of their seeds;
differences are "with" minus "without", brackets are 95 % bootstrap intervals over seeds and clips.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.held_out import add_model_options, held_out_windows, prepared_model, stacked
from benchmarks.report import write_result
from longtake.errors import ConfigError
from longtake.generate_diffusion import DiffusionModel
from longtake.metrics.bootstrap import Interval, bootstrap
from longtake.metrics.drift import colour_distances, frame_sharpness
from longtake.metrics.frames import psnr, unit_frames
from longtake.networks.layout import ChunkLayout
from longtake.objectives.flow_matching import noised
from longtake.rollout.conditions import clip_conditions, of_chunks
from longtake.rollout.noise import Draws, NoiseKey, normal
from longtake.rollout.plan import plan_rollout
from longtake.types import Clip, Conditions

_LATE = 27
"""Frames at the end of the rollout where drift is measured: the last three blocks."""
_SIGMAS = (0.25, 0.5, 0.75)
_RESAMPLES = 10_000


def run(argv: list[str]) -> int:
    """Runs the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks curriculum", description=__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="trainings with a curriculum, a seed each")
    parser.add_argument("--against", nargs="+", required=True, help="trainings without, of the same seeds in order")
    parser.add_argument("--frames", type=int, default=81, help="length of the rollouts, the given block included")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--split", default="val", help="of held-out clips")
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    add_model_options(parser)
    parser.add_argument("--output", type=Path, default=None, help="write the figures there as JSON")
    options = parser.parse_args(argv)
    if len(options.runs) != len(options.against):
        raise ConfigError(
            f"{len(options.runs)} runs are compared with {len(options.against)}; expected as many, of the same seeds."
        )
    found = {name: [measured(path, options) for path in getattr(options, name)] for name in ("runs", "against")}
    steps = {name: [int(row.pop("step")[0]) for row in rows] for name, rows in found.items()}
    table = {name: {figure: _mean(rows, figure) for figure in rows[0]} for name, rows in found.items()}
    differences = {
        figure: difference(*(np.stack([row[figure] for row in found[name]]) for name in ("runs", "against")))
        for figure in table["runs"]
    }
    print(f"{options.clips} clips of split {options.split!r}, {options.frames} frames; with steps {steps}")
    for figure, value in differences.items():
        told = [_text(part) for part in (table["runs"][figure], table["against"][figure], value)]
        print(f"{figure:<24} with {told[0]}  without {told[1]}  difference {told[2]}")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    plain = {
        name: {
            figure: {**value.to_json(), "of_seeds": [float(row[figure].mean()) for row in found[name]]}
            for figure, value in figures.items()
        }
        for name, figures in table.items()
    }
    result = {"settings": settings, "steps": steps, "table": plain}
    result["differences"] = {figure: value.to_json() for figure, value in differences.items()}
    write_result("curriculum", result, options.output)
    return 0


def difference(ours: np.ndarray, peer: np.ndarray) -> Interval:
    """Returns the mean difference of [seeds clips], resampled over seeds and over clips, paired in both."""
    values = ours - peer
    rng = np.random.default_rng(0)
    seeds = rng.integers(values.shape[0], size=(_RESAMPLES, values.shape[0]))
    clips = rng.integers(values.shape[1], size=(_RESAMPLES, values.shape[1]))
    means = np.array([values[np.ix_(s, c)].mean() for s, c in zip(seeds, clips, strict=True)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def _text(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _mean(rows: list[dict[str, np.ndarray]], figure: str) -> Interval:
    return bootstrap(np.mean([row[figure] for row in rows], axis=0))


def measured(path: str, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns the figures of one training by name, one number a clip, [clips]; and "step", of its weights."""
    options.ckpt = path
    model, data = prepared_model(options)
    if not model.spec.trained_for.one_context:
        raise ConfigError(f"{path} was not trained from context to target (objective=context_target). Change --runs.")
    clips = held_out_windows(data, options.split, options.frames, options.clips)
    keys = NoiseKey(options.seed, tuple(clip["key"] for clip in clips))
    truth = unit_frames(np.stack([clip["frames"][0] for clip in clips]))
    given = model.spec.trained_for.pixels(model.spec.trained_for.chunk_lat)
    pred, truth = rolled_out(model, clips, keys, options.frames)[:, given:], truth[:, given:]
    late, true_late = pred[:, -_LATE:], truth[:, -_LATE:]
    colour = colour_distances(late, true_late).mean(1)
    sharp = frame_sharpness(late).mean(1) / frame_sharpness(true_late).mean(1)
    figures = {
        "colour distance, late": colour,
        "sharpness ratio, late": sharp,
        "psnr, first block (dB)": psnr(pred[:, :given], truth[:, :given]),
        "psnr, late (dB)": psnr(late, true_late),
        **losses(model, clips, keys),
        "step": torch.tensor([model.spec.step]),
    }
    return {name: value.double().numpy() for name, value in figures.items()}


def rolled_out(model: DiffusionModel, clips: list[dict[str, Any]], key: NoiseKey, num_frames: int) -> Tensor:
    """Returns rollouts from the first block of each clip, float in [0, 1], [b t c h w]."""
    trained = model.spec.trained_for
    given = trained.pixels(trained.chunk_lat)
    plan = plan_rollout("memory", num_frames_px=num_frames, context_px=given, trained=trained)
    with torch.no_grad():
        frames = [chunk.frames[:, 0] for chunk in model.roll_out(_clip(model, clips, given), plan, key)]
    return unit_frames(np.concatenate(frames, axis=1))


def losses(model: DiffusionModel, clips: list[dict[str, Any]], key: NoiseKey) -> dict[str, Tensor]:
    """Returns the velocity error of each clip's second block, and its rise with wrong contexts and wrong actions."""
    trained = model.spec.trained_for
    block = trained.chunk_lat
    clip = _clip(model, clips, trained.pixels(2 * block))
    told = clip_conditions(clip, chunk_lat=block, num_chunks=2, ratio=trained.ratio, own_starts=True)
    context, target = clip.latents[:, :, :block], clip.latents[:, :, block:]  # type: ignore[index]
    true = _errors(model, context, target, told, key)
    found = {
        "validation loss": true,
        "rise, another context": _errors(model, context.roll(1, 0), target, told, key) - true,
    }
    if told.actions is not None:
        actions = told.actions.clone()
        actions[:, 1] = told.actions.roll(1, 0)[:, 1]
        other = Conditions(**{**vars(told), "actions": actions})
        found["rise, other actions"] = _errors(model, context, target, other, key) - true
    return found


@torch.no_grad()
def _errors(model: DiffusionModel, context: Tensor, target: Tensor, told: Conditions, key: NoiseKey) -> Tensor:
    """Returns the mean squared error of the velocity of each sample, over noise levels, [b]."""
    grid = model.network.grid(tuple(target.shape[1:]))
    layout = ChunkLayout.stream(1, grid, commit=True)
    views, frames, *size = target.shape[1:]
    noise = normal(key, "noise", Draws([1], [0], views, frames), size, target.device)[:, 0].to(target)
    errors = []
    for sigma in _SIGMAS:
        x = torch.stack([context, noised(target, noise, torch.tensor(sigma))], dim=1)
        levels = torch.tensor([0.0, sigma], device=x.device).view(1, 2, 1, 1).expand(len(x), -1, -1, -1)
        velocity, _ = model.network(x, levels, of_chunks(told, [0, 1]), layout)
        errors.append((velocity[:, 1] - (noise - target)).square().flatten(1).mean(1))
    return torch.stack(errors).mean(0)


def _clip(model: DiffusionModel, clips: list[dict[str, Any]], given: int) -> Clip:
    """Returns what the model is told of the clips, with the latents of their first `given` frames."""
    frames = np.stack([clip["frames"][:, :given] for clip in clips])
    with torch.no_grad():
        latents = model.encode(frames)
    fields: dict[str, Any] = model.text_fields([clip["caption"] or "" for clip in clips])
    return Clip(
        latents=latents,
        actions=stacked(clips, "actions", model) if model.spec.action_names else None,
        fps=torch.full((len(clips),), float(model.fps), device=model.device),
        view_ids=torch.arange(frames.shape[1], device=model.device).expand(len(clips), -1),
        **fields,
    )
