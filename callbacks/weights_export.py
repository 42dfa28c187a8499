"""`weights.safetensors` of a run: what `longtake.load` and predict.py take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from longtake.errors import unknown_choice
from longtake.pretrained.weights_file import write_weights

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Spec(Protocol):
    """What the file says of itself."""

    def to_dict(self) -> dict[str, Any]: ...


class Exports(Protocol):
    """What a module offers for the file."""

    def spec(self) -> Spec: ...

    def export_tensors(self) -> dict[str, Tensor]: ...


class WeightsExport(Callback):
    """Keeps one file: the weights of the best validated step, or of the last one where nothing was validated.

    It is written whenever validation is the best so far, and before that at each checkpoint. It always appears whole.

    Args:
        path: the file.
        monitor: the validated figure; lower is better. None: the last step is kept, not the best.
        dtype: of the numbers in the file, "float32", or "bfloat16" or "float16" (half the size).
    """

    def __init__(self, path: str, monitor: str | None = "val/loss", dtype: str = "float32") -> None:
        if dtype not in _TYPES:
            raise unknown_choice("type of numbers", dtype, _TYPES, "callbacks.weights_export.dtype")
        self.path, self.monitor, self.dtype = Path(path), monitor, dtype
        self._best = math.inf
        self._written_step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None:
            return
        figures = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if figures and self.monitor not in figures:
            raise unknown_choice("figure of validation", self.monitor, figures, "callbacks.weights_export.monitor")
        value = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if not trainer.sanity_checking and value < self._best:
            self._best = value
            self._write(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._best == math.inf:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._best == math.inf or not self.path.exists():
            self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = float(state_dict["best"])

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers on every rank (a sharded network needs all of them) and writes on global rank 0."""
        if trainer.global_step == self._written_step:
            return
        self._written_step = trainer.global_step
        module = cast(Exports, pl_module)
        tensors = module.export_tensors()
        if trainer.is_global_zero:
            dtype = _TYPES[self.dtype]
            plain = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
            write_weights(self.path, plain, module.spec().to_dict())
