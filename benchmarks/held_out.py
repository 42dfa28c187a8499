"""What benchmarks of trained models share: the model as predict.py has it, and windows of held-out clips."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

from datamodules.held_out import pixel_data
from datamodules.loading.decoding import Draws, Window
from datamodules.loading.reading import SplitReader
from datamodules.video import VideoDataModule
from launcher.compose import compose
from launcher.predict_jobs import prepared
from launcher.stored import use_stored
from longtake.errors import BadSampleError, ConfigError, DataError
from longtake.generate import VideoModel
from longtake.generate_diffusion import DiffusionModel


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `prepared_model` reads, but for --ckpt."""
    parser.add_argument("--trust", nargs="*", default=[], help="packages whose classes the weights may name")
    parser.add_argument(
        "--set", nargs="*", default=[], help="keys of conf/predict.yaml: rollout.num_steps=20 data=doom ..."
    )


def prepared_model(options: argparse.Namespace) -> tuple[DiffusionModel, VideoDataModule]:
    """Returns the model that --ckpt names and its data, as predict.py has them.

    Raises:
        ConfigError: it cannot be had, or predicts tokens.
    """
    overrides = [f"ckpt={options.ckpt}", f"trust=[{','.join(options.trust)}]", *options.set]
    use_stored(overrides)
    cfg = compose("predict", overrides)
    data = pixel_data(instantiate(cfg.data) if "data" in cfg else None)
    model = prepared(cfg)
    if not isinstance(model, DiffusionModel):
        raise ConfigError(
            f"ckpt={options.ckpt} is a {model.spec.kind} model; expected a diffusion model. Change `ckpt`."
        )
    data.prepare_data()
    data.setup("predict")
    return model, data


def held_out_windows(data: VideoDataModule, split: str, num_frames: int, count: int) -> list[dict[str, Any]]:
    """Returns windows of `num_frames` spread over the samples of a split; several of one where they are too few.

    Each has `key`, `frames` (uint8 [v t h w c]), `actions` (float32 [t a], or None) and `caption`.

    Raises:
        DataError: there are fewer than two.
    """
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


def stacked(clips: list[dict[str, Any]], name: str, model: VideoModel) -> Tensor:
    """Returns a field of all clips as one batch on the model's device."""
    return torch.from_numpy(np.stack([clip[name] for clip in clips])).to(model.device)


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
