"""A stand-in, so that data, training, resume and the run folder can be used end to end before the real models
exist.

A small convolutional network predicts the next frame from the present one and the action that leads to it. It
is no video model (no memory, no noise, one step ahead) and is replaced by `ar_diffusion.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.base import BaseModule
from longtake.media.write import save_image
from longtake.types import Clip


class NextFrame(BaseModule):
    """Trains frame t+1 = frame t + network(frame t, action t+1) with a squared error.

    Args:
        width: channels of the hidden layers.
        action_dim: columns of `Clip.actions`; None ignores actions.
        pairs_per_clip: frames of a clip that are predicted from, evenly spread.
        **kwargs: optimiser and schedule, as for `BaseModule`.
    """

    def __init__(self, *, width: int, action_dim: int | None, pairs_per_clip: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_dim = action_dim
        self.pairs_per_clip = pairs_per_clip
        self.first = nn.Conv2d(3, width, 5, padding=2)
        self.from_actions = nn.Linear(action_dim, width) if action_dim else None
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3, padding=rate, dilation=rate) for rate in (1, 2, 4))
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # the untrained network repeats the frame
        self.val_loss, self.val_copy_loss = MeanMetric(), MeanMetric()

    def data_requirements(self) -> dict[str, int | None]:
        return {"action_dim": self.action_dim}

    def forward(self, frames: Tensor, actions: Tensor | None) -> Tensor:
        """Returns the next frames: `frames` [n c h w] in [-1, 1], `actions` [n a]."""
        x = self.first(frames)
        if self.from_actions is not None and actions is not None:
            x = x + self.from_actions(actions)[:, :, None, None]
        for layer in self.hidden:
            x = x + layer(nn.functional.silu(x))
        return frames + self.last(nn.functional.silu(x))

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        present, truth, pred, weights = self._predict(batch)
        losses, is_real = _per_clip(pred, truth, weights)
        loss = losses.sum() / is_real.sum().clamp(min=1)
        self.log("train/loss", loss, batch_size=len(batch), sync_dist=True)
        return loss

    def validation_step(self, batch: Clip, batch_idx: int) -> None:
        present, truth, pred, weights = self._predict(batch)
        for metric, guess in ((self.val_loss, pred), (self.val_copy_loss, present)):
            losses, is_real = _per_clip(guess, truth, weights)
            metric.update(losses, weight=is_real)
        self.log("val/loss", self.val_loss, on_epoch=True, batch_size=len(batch))
        self.log("val/copy_loss", self.val_copy_loss, on_epoch=True, batch_size=len(batch))
        if batch_idx == 0 and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._show(present, truth, pred)

    def _predict(self, batch: Clip) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns frames, the true next ones, the predicted ones (each [b v t c h w]) and weights [b v t]."""
        assert batch.video is not None, "a pixel model needs a datamodule that loads pixels (data=doom)"
        now = self._starts(batch).to(batch.video.device)
        frames = batch.video.index_select(2, torch.cat([now, now + 1])).float() / 127.5 - 1
        present, truth = frames.chunk(2, dim=2)
        b, v, t = present.shape[:3]
        weights = torch.ones((b, v, t), device=frames.device)
        if batch.frame_mask is not None:
            weights = weights * (batch.frame_mask[:, now] & batch.frame_mask[:, now + 1])[:, None]
        if batch.view_mask is not None:
            weights = weights * batch.view_mask[:, :, None]
        actions = None
        if batch.actions is not None:
            actions = repeat(batch.actions[:, now + 1], "b t a -> (b v t) a", v=v)
        pred = self(rearrange(present, "b v t c h w -> (b v t) c h w"), actions)
        return present, truth, rearrange(pred, "(b v t) c h w -> b v t c h w", b=b, v=v), weights

    def _starts(self, batch: Clip) -> Tensor:
        """Returns at most `pairs_per_clip` frames to predict from, evenly spread: neighbours hardly differ."""
        assert batch.video is not None
        last = batch.video.shape[2] - 1
        step = max(1, last // self.pairs_per_clip)
        offset = int(batch.position[0]) % step if batch.position is not None else 0
        return torch.arange(offset, last, step)[: self.pairs_per_clip]

    def _show(self, present: Tensor, truth: Tensor, pred: Tensor) -> None:
        """Writes one picture: a row a clip, in it the frame given | the true next one | the prediction."""
        middle = present.shape[2] // 2
        rows = torch.stack([video[:4, 0, middle] for video in (present, truth, pred)], dim=1)
        picture = rearrange(rows, "clips columns c h w -> (clips h) (columns w) c")
        pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
        pixels = np.kron(pixels, np.ones((4, 4, 1), dtype=np.uint8))  # 64x48 pixels are hard to see
        folder = Path(self.trainer.default_root_dir) / "samples" / f"step_{self.global_step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / "next_frame.png", pixels)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                tag = "val/given_truth_prediction"
                logger.experiment.add_image(tag, pixels, self.global_step, dataformats="HWC")


def _per_clip(pred: Tensor, truth: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each clip's mean squared error [b] and whether it has real frames [b]; without, both are 0."""
    errors = (pred.float() - truth).square().mean(dim=(3, 4, 5)) * weights
    counts = weights.sum(dim=(1, 2))
    return errors.sum(dim=(1, 2)) / counts.clamp(min=1), (counts > 0).float()
