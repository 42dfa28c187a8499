"""Writes `metrics.jsonl`: one line a logged step, for scripts that should not have to read event files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class MetricsFile(Callback):
    """Appends {"step": n, "train/loss": x, ...} for every logged step, and a line with the `val/` metrics
    after validation.

    `step` counts finished optimiser steps. After a resume comes a line {"resumed_from_step": n}; for a step
    that stands there twice the later line counts. Only global rank 0 writes, and every line is flushed.

    Args:
        path: the file.
        every_n_steps: optimiser steps between two lines.
    """

    def __init__(self, path: str, every_n_steps: int = 1) -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._written_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written_step = trainer.global_step
        if self.path.exists() or trainer.global_step > 0:
            self._append(trainer, {"resumed_from_step": trainer.global_step})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._written_step or step % self.every_n_steps:
            return  # in the middle of an accumulated step, or not a step to be logged
        self._written_step = step
        rates = {f"lr/{index}": optimizer.param_groups[0]["lr"] for index, optimizer in enumerate(trainer.optimizers)}
        self._append(trainer, {"step": step, **self._metrics(trainer, "train/"), **rates})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._append(trainer, {"step": trainer.global_step, **self._metrics(trainer, "val/")})

    def _metrics(self, trainer: Trainer, prefix: str) -> dict[str, float]:
        if not trainer.is_global_zero:
            return {}
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}

    def _append(self, trainer: Trainer, line: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        # JSON has no infinity and no NaN: they are written as text, which float() reads back
        plain = {key: str(value) if not math.isfinite(value) else value for key, value in line.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")
