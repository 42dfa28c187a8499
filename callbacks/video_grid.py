"""Sample videos while training: given start | ground truth | rollout, as files and in TensorBoard."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from longtake.errors import ConfigError
from longtake.media.grid import contact_sheet, side_by_side, vstack
from longtake.media.write import VideoWriter, save_image
from longtake.metrics.frames import psnr, unit_frames
from longtake.rollout.plan import RolloutPlan
from longtake.streaming import VideoChunk
from longtake.types import Clip, joined

logger = logging.getLogger("longtake")

_MOST_BATCHES = 64  # of validation, that are looked through for clips


class RollsOut(Protocol):
    """What a module offers for sample videos."""

    video: dict[str, Any]
    ratio: int

    @property
    def can_show(self) -> bool: ...

    def plan(self, num_frames_px: int, context_px: int | None = None) -> RolloutPlan: ...

    def rollout_frames(self, batch: Clip, plan: RolloutPlan, seed: int | None = None) -> Iterator[VideoChunk]: ...

    def truth_frames(self, batch: Clip, plan: RolloutPlan) -> np.ndarray: ...


class VideoGrid(Callback):
    """Rolls out from validation clips, spread over the set, and writes `step_*/grid.mp4` and `grid.png`.

    Every rank rolls out, because a sharded network needs all of them; global rank 0 writes what it made.

    Args:
        folder: where the `step_*` folders go.
        every_n_steps: optimiser steps between two of them; there is one after the last step in any case.
        num_samples: validation clips.
        num_frames: pixel frames of a rollout; None: as many as a validation clip has in whole chunks.
    """

    def __init__(
        self, folder: str, every_n_steps: int | None = 500, num_samples: int = 4, num_frames: int | None = None
    ) -> None:
        given = {"num_samples": num_samples, "every_n_steps": every_n_steps, "num_frames": num_frames}
        wrong = {name: value for name, value in given.items() if value is not None and value < 1}
        if wrong:
            raise ConfigError(
                f"callbacks.video_grid has {', '.join(f'{name}={value}' for name, value in wrong.items())}; expected 1 "
                "or more (every_n_steps=null: only after the last step; num_frames=null: a clip). Change "
                "`callbacks.video_grid`."
            )
        self.folder = Path(folder)
        self.every_n_steps, self.num_samples, self.num_frames = every_n_steps, num_samples, num_frames
        self.last: Path | None = None
        self._clips: Clip | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step != self._step and self.every_n_steps and step % self.every_n_steps == 0 and step < trainer.max_steps:
            self._show(trainer, pl_module)
        self._step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module)

    @torch.no_grad()
    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not cast(RollsOut, pl_module).can_show:
            return
        clips = self._clips or self._spread_clips(trainer)
        if clips is None:
            return
        self._clips = clips
        begin, was_training = time.perf_counter(), pl_module.training
        pl_module.eval()
        try:
            with trainer.precision_plugin.forward_context():
                plan, truth, rolled = self._rolled(cast(RollsOut, pl_module), clips)
        finally:
            pl_module.train(was_training)
        if trainer.is_global_zero:
            self._write(trainer, cast(RollsOut, pl_module), plan, truth, rolled, clips.key)
            logger.info("sample video: %s (%.1f s)", self.last, time.perf_counter() - begin)

    def _spread_clips(self, trainer: Trainer) -> Clip | None:
        """Returns real clips of validation batches at even distances; the same ones every time, and in every run.

        Neighbours in a set often show the same place. Clips of another shape than the first are left out.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            return None
        batches = data.val_dataloader()
        count = sized_len(batches)  # of the whole set, whatever `limit_val_batches` says
        count = min(count, _MOST_BATCHES) if count else 1
        wanted = sorted({index * count // self.num_samples for index in range(self.num_samples)})
        of_each = -(-self.num_samples // len(wanted))
        parts: list[Clip] = []
        for index, batch in enumerate(batches):
            if index > wanted[-1] and parts:
                break
            real = range(len(batch)) if batch.frame_mask is None else batch.frame_mask.any(1).nonzero()[:, 0].tolist()
            if len(real) and (index in wanted or index > wanted[-1]):
                parts.append(taken(batch, list(real)[:of_each]))
        return taken(alike(parts), list(range(self.num_samples))) if parts else None

    def _rolled(self, module: RollsOut, clips: Clip) -> tuple[RolloutPlan, np.ndarray, np.ndarray]:
        """Returns the plan, and true and generated frames, uint8 [b v t h w c]."""
        longest = int(module.video["num_frames"])
        if clips.frame_mask is not None:
            longest = min(longest, clips.frame_mask.shape[1])
        plan = module.plan(min(self.num_frames or longest, longest))
        truth = module.truth_frames(clips, plan)
        rolled = np.concatenate([chunk.frames for chunk in module.rollout_frames(clips, plan)], axis=2)
        return plan, truth, rolled

    def _write(
        self,
        trainer: Trainer,
        module: RollsOut,
        plan: RolloutPlan,
        truth: np.ndarray,
        rolled: np.ndarray,
        keys: list[str],
    ) -> None:
        step = trainer.global_step
        folder = self.folder / f"step_{step:07d}"
        grid = make_grid(truth, rolled, plan.start_px, keys)
        path = folder / "grid.mp4"
        fps = Fraction(str(module.video["fps"]))
        with VideoWriter(path, fps=fps, height=grid.shape[1], width=grid.shape[2]) as writer:
            writer.write(grid)
        sheet = make_sheet(truth, rolled, plan.start_px, keys)
        save_image(folder / "grid.png", sheet)
        self.last = path
        numbers = chunk_psnr(truth, rolled, plan)
        for sink in trainer.loggers:
            sink.log_metrics(numbers, step=step)
            if isinstance(sink, TensorBoardLogger):
                sink.experiment.add_image("val/rollout", sheet, step, dataformats="HWC")


def alike(parts: Sequence[Clip]) -> Clip:
    """Returns the clips of all parts that have the fields and shapes of the first, as one batch."""

    def shapes(part: Clip) -> dict[str, Any]:
        tensors = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
        inner = {name: value for name, value in vars(part).items() if isinstance(value, dict)}
        named = {f"{name}.{kind}": value for name, group in inner.items() for kind, value in group.items()}
        return {name: value.shape[1:] for name, value in (tensors | named).items()}

    same = [part for part in parts if shapes(part) == shapes(parts[0])]
    fields: dict[str, Any] = {}
    for name in vars(parts[0]):
        values = [value for part in same if (value := getattr(part, name)) is not None]
        lists = values and isinstance(values[0], list)
        fields[name] = [item for value in values for item in value] if lists else joined(values, dim=0)
    return Clip(**fields)


def taken(batch: Clip, rows: list[int]) -> Clip:
    """Returns some clips of a batch; rows past its end are left out."""
    rows = [row for row in rows if row < len(batch)]
    part = batch.map(lambda tensor: tensor[rows])
    captions = None if batch.captions is None else [batch.captions[row] for row in rows]
    return dataclasses.replace(part, key=[batch.key[row] for row in rows], captions=captions)


def make_grid(truth: np.ndarray, rolled: np.ndarray, given: int, keys: list[str]) -> np.ndarray:
    """Returns one video of all clips, a row a clip: start | ground truth | rollout, uint8 [t h w c].

    Args:
        truth: true frames, uint8 [b v t h w c].
        rolled: generated frames, as `truth`.
        given: frames that were given; the first column holds its last one from then on.
        keys: names of the clips.
    """
    rows = []
    for index, key in enumerate(keys):
        for view in range(truth.shape[1]):
            true = truth[index, view]
            start = true[:given] if given else np.zeros_like(true[:1])
            rows.append(side_by_side({f"given {key}": start, "ground truth": true, "rollout": rolled[index, view]}))
    return vstack(rows)


def make_sheet(truth: np.ndarray, rolled: np.ndarray, given: int, keys: list[str]) -> np.ndarray:
    """Returns one picture: for each clip a strip of true frames over a strip of generated ones, uint8 [h w c]."""
    rows = []
    for index, key in enumerate(keys):
        for view in range(truth.shape[1]):
            rows += [
                (f"{key}  ground truth", truth[index, view]),
                (f"{given} given, then rollout", rolled[index, view]),
            ]
    return contact_sheet(rows, columns=10, min_width=96)


def chunk_psnr(truth: np.ndarray, rolled: np.ndarray, plan: RolloutPlan) -> dict[str, float]:
    """Returns the mean PSNR of every predicted chunk in dB, given frames left out."""
    numbers = {}
    for chunk in range(plan.num_chunks):
        start, stop = plan.frames_of(chunk)
        start = max(start, plan.start_px)
        if start < stop:
            pred, true = (unit_frames(video[:, :, start:stop]).flatten(1, 2) for video in (rolled, truth))
            numbers[f"val/rollout/psnr@chunk{chunk:02d}"] = float(psnr(pred, true).mean())
    return numbers
