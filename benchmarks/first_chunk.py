"""How well the first chunk is predicted on held-out clips: against copies, with true, shuffled and absent actions.

PSNR of one sample and of the mean of 4, the copy of the last given frame, the best blurred copy (blur chosen on
training clips), the first stage's own ceiling; sharpness and change; does the picture move as the camera was told to?
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

from benchmarks.report import write_result
from datamodules.held_out import pixel_data
from datamodules.loading.decoding import Draws, Window
from datamodules.loading.reading import SplitReader
from datamodules.video import VideoDataModule
from launcher.compose import compose
from launcher.predict_jobs import prepared
from launcher.stored import use_stored
from longtake.actions import turn_column
from longtake.errors import BadSampleError, DataError
from longtake.generate import VideoModel
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
    parser.add_argument("--trust", nargs="*", default=[], help="packages whose classes the weights may name")
    parser.add_argument(
        "--set", nargs="*", default=[], help="keys of conf/predict.yaml: rollout.num_steps=20 data=doom ..."
    )
    parser.add_argument("--output", type=Path, default=None, help="write the figures there as JSON")
    options = parser.parse_args(argv)
    model, data = _prepared(options)
    plan = _plan(model)
    clips = _windows(data, options.split, plan.num_frames_px, options.clips)
    others = _windows(data, data.splits["train"], plan.num_frames_px, _BLUR_CLIPS)
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
    model: VideoModel, plan: RolloutPlan, clips: list[dict[str, Any]], *, samples: int, batch: int, seed: int
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
            actions=_stacked(part, "actions", model) if has_actions else None,
            fps=torch.full((len(part),), float(model.fps), device=model.device),
            view_ids=torch.arange(frames.shape[1], device=model.device).expand(len(part), -1),
        )
        clip = dataclasses.replace(clip, **model.text_fields([item["caption"] or "" for item in part]))
        told = {"true": clip.actions}
        if has_actions:
            assert clip.actions is not None
            donors = [clips[(first + index + len(clips) // 2) % len(clips)] for index in range(len(part))]
            mixed = clip.actions.clone()
            mixed[:, given:] = _stacked(donors, "actions", model)[:, given:]
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
    model: VideoModel,
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


def _recoded(model: VideoModel, frames: np.ndarray, plan: RolloutPlan) -> Tensor:
    """Returns what the first stage makes of the chunk's true frames, [1 t c h w]."""
    with torch.no_grad():
        video = model.video_encoder.decode(model.video_encoder.encode(to_unit_range(frames[None], model.device)))
    return unit_frames(to_uint8(video)[:, 0, plan.start_px :])


def _unit(frames: np.ndarray, plan: RolloutPlan) -> tuple[Tensor, Tensor]:
    """Returns given and true frames of the first view, float in [0, 1], [1 t c h w] each."""
    unit = unit_frames(frames[0])[None]
    return unit[:, : plan.start_px], unit[:, plan.start_px :]


def _stacked(clips: list[dict[str, Any]], name: str, model: VideoModel) -> Tensor:
    return torch.from_numpy(np.stack([clip[name] for clip in clips])).to(model.device)


def _plan(model: VideoModel) -> RolloutPlan:
    """Returns the plan of one chunk after the frames that are given by default."""
    trained = model.spec.trained_for
    length = model.spec.num_context_frames + trained.chunk_lat * trained.ratio
    return plan_rollout(
        model.rollout.kind, num_frames_px=length, context_px=model.spec.num_context_frames, trained=trained
    )


def _prepared(options: argparse.Namespace) -> tuple[VideoModel, VideoDataModule]:
    """Returns the model and its data, as predict.py has them."""
    overrides = [f"ckpt={options.ckpt}", f"trust=[{','.join(options.trust)}]", *options.set]
    use_stored(overrides)
    cfg = compose("predict", overrides)
    data = pixel_data(instantiate(cfg.data) if "data" in cfg else None)
    model = prepared(cfg)
    data.prepare_data()
    data.setup("predict")
    return model, data


def _windows(data: VideoDataModule, split: str, num_frames: int, count: int) -> list[dict[str, Any]]:
    """Returns clips of `num_frames` spread over the samples of a split; several of one where they are too few."""
    info = data.infos[0]
    reader = SplitReader(info, split, data.cache)
    decode = data.decoder(info, training=False)
    found = []
    for number, start in _starts(reader, num_frames, count):
        sample = reader[number]
        try:
            fields = decode(sample, Window(start, num_frames), Draws(None))
        except BadSampleError:
            continue
        frames = fields["video"].permute(0, 1, 3, 4, 2).numpy()
        found.append(
            {
                "key": f"{sample.key}@{start}",
                "frames": frames,
                "actions": fields["actions"],
                "caption": fields["captions"],
            }
        )
    if len(found) < 2:
        raise DataError(
            f"{len(found)} clips of {num_frames} frames in split {split!r} of {info.root}; expected 2 or more."
        )
    return found


def _starts(reader: SplitReader, num_frames: int, count: int) -> Iterator[tuple[int, int]]:
    """Yields `count` times (sample, first frame): first the start of every sample, then later windows of each."""
    lengths = reader.num_frames()
    rounds = max(1, -(-count // len(reader)))
    if rounds == 1:
        yield from ((index * len(reader) // count, 0) for index in range(count))
        return
    given = 0
    for turn in range(rounds):
        for number, length in enumerate(lengths):
            start = turn * num_frames
            if start + num_frames <= length and given < count:
                given += 1
                yield number, start
