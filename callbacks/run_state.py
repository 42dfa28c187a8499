"""Keeps `state.json` of a run folder, by which a later start knows whether there is something left to do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


def write_state(folder: Path, status: str, step: int) -> None:
    """Replaces `state.json`: `status` is running or finished, `step` the optimiser steps taken."""
    partial = folder / "state.json.partial"
    partial.write_text(json.dumps({"status": status, "step": step, "updated": time.time()}) + "\n")
    partial.replace(folder / "state.json")


class RunState(Callback):
    """Writes the state at the start, at every checkpoint and at the end; only global rank 0 writes.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "running")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Comes after the last checkpoint was written, and not at all after an exception."""
        if trainer.global_step >= trainer.max_steps:
            self._write(trainer, "finished")

    def _write(self, trainer: Trainer, status: str) -> None:
        if trainer.is_global_zero:
            write_state(self.folder, status, trainer.global_step)
