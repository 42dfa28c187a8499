"""How well the first chunk is predicted on held-out clips: against copies, with true, shuffled and absent actions.

PSNR of one sample and of the mean of 4, the copy of the last given frame, the best blurred copy (blur chosen on
training clips), the first stage's own ceiling; sharpness and change; does the picture move as the camera was told to?
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.held_out import add_model_options, held_out_windows, prepared_model, stacked
from benchmarks.report import write_result
from longtake.actions import turn_column
from longtake.generate_diffusion import DiffusionModel
from longtake.metrics.baselines import best_blur
from longtake.metrics.first_chunk import FirstChunks, first_chunk_table
from longtake.metrics.frames import unit_frames
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan, plan_rollout
from longtake.streaming import to_uint8, to_unit_range
from longtake.types import Clip

_LEAST_TURN = 6.0  # degrees (or what the column holds) over the chunk, below which a clip does not count as turning
_BLUR_CLIPS = 128


def run(argv: list[str]) -> int:
    """Runs the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks first_chunk", description=__doc__)
    parser.add_argument("--ckpt", required=True, help="a run folder, a .safetensors file or a .ckpt")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="clips rolled out at once")
    parser.add_argument("--split", default="val", help="of held-out clips")
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser)
    parser.add_argument("--output", type=Path, default=None, help="write the figures there as JSON")
    options = parser.parse_args(argv)
    model, data = prepared_model(options)
    plan = _plan(model)
    clips = held_out_windows(data, options.split, plan.num_frames_px, options.clips)
    others = held_out_windows(data, data.splits["train"], plan.num_frames_px, _BLUR_CLIPS)
    blur = best_blur(_unit(clip["frames"], plan)[:2] for clip in others)
    chunks = measure(model, plan, clips, samples=options.samples, batch=options.batch, seed=options.seed)
    table = first_chunk_table(chunks, blur, _LEAST_TURN)
    print(
        f"{options.ckpt}: {len(clips)} clips of split {options.split!r}, {plan.start_px} frames given, blur {blur} px"
    )
    print(table.text())
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    write_result("first_chunk", {"settings": settings, "blur": blur, "table": table.to_json()}, options.output)
    return 0


def measure(
    model: DiffusionModel, plan: RolloutPlan, clips: list[dict[str, Any]], *, samples: int, batch: int, seed: int
) -> FirstChunks:
    """Returns truth and predictions of the first chunk of each clip, with true, shuffled and absent actions.

    Shuffled actions are those of another clip from the first predicted frame on; absent ones are absent altogether.
    """
    predicted: dict[str, list[Tensor]] = {}
    has_actions = bool(model.spec.action_names)
    given = plan.start_px
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch]
        frames = np.stack([clip["frames"] for clip in part])
        clip = Clip(
            latents=model.encode(frames[:, :, :given]),
            actions=stacked(part, "actions", model) if has_actions else None,
            fps=torch.full((len(part),), float(model.fps), device=model.device),
            view_ids=torch.arange(frames.shape[1], device=model.device).expand(len(part), -1),
        )
        clip = dataclasses.replace(clip, **model.text_fields([item["caption"] or "" for item in part]))
        told = {"true": clip.actions}
        if has_actions:
            assert clip.actions is not None
            donors = [clips[(first + index + len(clips) // 2) % len(clips)] for index in range(len(part))]
            mixed = clip.actions.clone()
            mixed[:, given:] = stacked(donors, "actions", model)[:, given:]
            told |= {"shuffled": mixed, "absent": None}
        for name, actions in told.items():
            count = samples if name == "true" else 1
            draws = [_roll_out(model, plan, clip, actions, part, seed, sample) for sample in range(count)]
            predicted.setdefault(name, []).append(torch.stack(draws))
    pairs = [_unit(clip["frames"], plan) for clip in clips]
    column = turn_column(model.spec.action_names)
    turns = None
    if column is not None:
        rows = np.stack([clip["actions"][given:, column[0]] for clip in clips])
        turns = torch.from_numpy(rows * column[1])
    return FirstChunks(
        last=torch.cat([context[:, -1:] for context, _ in pairs]),
        truth=torch.cat([truth for _, truth in pairs]),
        recoded=torch.cat([_recoded(model, clip["frames"], plan) for clip in clips]),
        samples={name: torch.cat(parts, dim=1) for name, parts in predicted.items()},
        turns=turns,
    )


def _roll_out(
    model: DiffusionModel,
    plan: RolloutPlan,
    clip: Clip,
    actions: Tensor | None,
    part: list[dict[str, Any]],
    seed: int,
    sample: int,
) -> Tensor:
    """Returns the predicted frames of the first view, float in [0, 1], [b t c h w]."""
    key = NoiseKey(seed, tuple(f"{item['key']}#{sample}" for item in part))
    with torch.no_grad():
        chunks = list(model.roll_out(dataclasses.replace(clip, actions=actions), plan, key))
    frames = np.concatenate([chunk.frames for chunk in chunks], axis=2)
    return unit_frames(frames[:, 0, plan.start_px :])


def _recoded(model: DiffusionModel, frames: np.ndarray, plan: RolloutPlan) -> Tensor:
    """Returns what the first stage makes of the chunk's true frames, [1 t c h w]."""
    with torch.no_grad():
        video = model.video_encoder.decode(model.video_encoder.encode(to_unit_range(frames[None], model.device)))
    return unit_frames(to_uint8(video)[:, 0, plan.start_px :])


def _unit(frames: np.ndarray, plan: RolloutPlan) -> tuple[Tensor, Tensor]:
    """Returns given and true frames of the first view, float in [0, 1], [1 t c h w] each."""
    unit = unit_frames(frames[0])[None]
    return unit[:, : plan.start_px], unit[:, plan.start_px :]


def _plan(model: DiffusionModel) -> RolloutPlan:
    """Returns the plan of one chunk after the frames that are given by default."""
    trained = model.spec.trained_for
    length = model.spec.num_context_frames + trained.chunk_lat * trained.ratio
    return plan_rollout(
        model.rollout.kind, num_frames_px=length, context_px=model.spec.num_context_frames, trained=trained
    )
