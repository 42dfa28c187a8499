"""What training a first stage has in common: clips of pixels -> a code -> the same clips.

`ContinuousTokenizer` and `DiscreteTokenizer` say what the code is and what else the loss counts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.averaged import AveragedModule
from longtake.media.write import save_image
from longtake.metrics.frames import psnr, sharpness
from longtake.provenance import commit
from longtake.types import Clip

_TENTH = 0.2  # a tenth of the range [-1, 1]: the unit in which the loss counts errors
_SHOWN_CLIPS, _SHOWN_FRAMES = 4, 9


@dataclass(frozen=True)
class EncoderSpec:
    """What the weights file of a first stage says of itself: `network` builds it, the rest is for people."""

    kind: str
    network: dict[str, Any]
    video: dict[str, Any]
    seed: int
    step: int
    is_average: bool
    metrics: dict[str, float]
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Coded:
    """Clips after a network in training.

    Attributes:
        recon: what the decoder makes of them, [n t c h w].
        extra_loss: what the loss counts besides errors of pixels, a scalar; None: nothing.
        logs: scalars to log by name.
    """

    recon: Tensor
    extra_loss: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)


class VideoTokenizer(AveragedModule):
    """Trains a first stage with a squared and an absolute error.

    Args:
        network: config node of the network.
        video: geometry of the clips: fps, height, width, num_frames.
        seed: of the weights and of every draw.
        absolute_error: weight of the absolute error beside the squared one.
        principal_clips: training clips whose principal components the network begins with; 0 begins at random.
        **kwargs: optimiser and schedule, as for `BaseModule`.

    Attributes:
        kind: what the exported file says that it is.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        *,
        network: Mapping[str, Any],
        video: Mapping[str, Any],
        seed: int,
        absolute_error: float,
        principal_clips: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(network=network, seed=seed, **kwargs)
        self.video, self.absolute_error = dict(video), absolute_error
        self.principal_clips = principal_clips
        self._is_initialised = False
        self.val_metrics = nn.ModuleDict({name: MeanMetric() for name in ("loss", "psnr", "sharpness")})

    @abstractmethod
    def code(self, video: Tensor, batch: Clip) -> Coded:
        """Returns what the network in training makes of clips [n t c h w]; `batch` is where they come from."""

    @abstractmethod
    def begin(self) -> None:
        """Sets the first weights by `principal_clips` training clips; `moments` looks at them."""

    @abstractmethod
    def reconstruct(self, video: Tensor) -> Tensor:
        """Returns what `eval_network` makes of clips [n t c h w]."""

    def initialise_from(self, path: str | Path) -> None:
        super().initialise_from(path)
        self._is_initialised = True

    def on_fit_start(self) -> None:
        """Begins with principal components of training clips, unless the weights come from a file."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None and not self._is_initialised and self.principal_clips > 0:
            self.begin()

    @torch.no_grad()
    def moments(self, rows: Callable[[Tensor], Tensor], num_clips: int) -> tuple[Tensor, Tensor, int]:
        """Returns mean [c], covariance [c c] and number of what a function makes of training clips, over all ranks.

        Args:
            rows: [n t c h w] in [-1, 1] -> [m c].
            num_clips: how many clips are looked at, rounded up to whole batches.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        loader = data.fixed_loader("train", data.shard())  # every rank takes its share of the clips
        num_batches = -(-num_clips // (data.val_batch_size * self.trainer.world_size))
        count, total, product = (torch.zeros(1, dtype=torch.float64, device=self.device) for _ in range(3))
        for batch in islice(loader, num_batches):
            found = rows(clips_of(batch).to(self.device)).double()
            count, total, product = count + len(found), total + found.sum(0), product + found.T @ found
        parts = (count, total, product)
        count, total, product = (self.trainer.strategy.reduce(part, reduce_op="sum") for part in parts)  # type: ignore[misc]
        mean = total / count
        return mean, product / count - torch.outer(mean, mean), int(count)

    def data_requirements(self) -> dict[str, int | None]:
        return {"action_dim": None}

    # Steps

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        assert self.network is not None, "configure_model comes first"
        video = clips_of(batch)
        coded = self.code(video, batch)
        error = (coded.recon - video) / _TENTH
        squared, absolute = error.square().mean(), error.abs().mean()
        loss = squared + self.absolute_error * absolute
        if coded.extra_loss is not None:
            loss = loss + coded.extra_loss
        for name, value in {"loss": loss, "squared_error": squared, **coded.logs}.items():
            self.log(f"train/{name}", value, batch_size=len(batch), sync_dist=True)
        return loss

    def validation_step(self, batch: Clip, batch_idx: int) -> None:
        """Measures reconstructions, clip by clip; a clip without real frames does not count."""
        video = clips_of(batch)
        recon = self.reconstruct(video)
        pred, truth = (recon.float().clamp(-1, 1) + 1) / 2, (video + 1) / 2
        is_real = torch.ones(len(video), device=self.device)
        if batch.frame_mask is not None:
            is_real = batch.frame_mask.any(1).float().repeat_interleave(len(video) // len(batch))
        values = {
            "loss": ((recon - video) / _TENTH).square().mean((1, 2, 3, 4)),
            "psnr": psnr(pred, truth),
            "sharpness": sharpness(pred) / sharpness(truth).clamp(min=1e-6),
        }
        for name, value in values.items():
            metric: MeanMetric = self.val_metrics[name]  # type: ignore[assignment]
            metric.update(value.to(self.device, torch.float32), weight=is_real)
            self.log(f"val/{name}", metric, on_epoch=True, batch_size=len(batch))
        if batch_idx == 0 and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._show(truth, pred)

    def _show(self, truth: Tensor, pred: Tensor) -> None:
        """Writes one picture: for each clip the true frames, and below them what the code makes of them."""
        rows = torch.stack([truth[:_SHOWN_CLIPS, :_SHOWN_FRAMES], pred[:_SHOWN_CLIPS, :_SHOWN_FRAMES]], dim=1)
        picture = rearrange(rows, "clips rows t c h w -> (clips rows h) (t w) c")
        pixels = (picture * 255).round().byte().cpu().numpy()
        pixels = np.kron(pixels, np.ones((2, 2, 1), dtype=np.uint8)) if pixels.shape[1] < 1000 else pixels
        folder = Path(self.trainer.default_root_dir) / "samples" / f"step_{self.global_step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / "reconstructions.png", pixels)
        for tracker in self.loggers:
            if isinstance(tracker, TensorBoardLogger):
                tracker.experiment.add_image("val/reconstructions", pixels, self.global_step, dataformats="HWC")

    # Files

    def spec(self) -> EncoderSpec:
        """Returns what an exported file says of itself."""
        metrics = {
            name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")
        }
        return EncoderSpec(
            kind=self.kind,
            network=dict(self.network_node),
            video={name: self.video[name] for name in ("fps", "height", "width", "num_frames")},
            seed=self.seed,
            step=self.global_step,
            is_average=self.exports_average,
            metrics=metrics,
            commit=commit(),
        )


def clips_of(batch: Clip) -> Tensor:
    """Returns every view of a batch as a clip of its own, [n t c h w] in [-1, 1]."""
    assert batch.video is not None, "a first stage is trained on pixels"
    return batch.video.flatten(0, 1).float() / 127.5 - 1
