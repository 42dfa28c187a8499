"""Checkpoints: `last.ckpt` every so many steps and at the very end; a crash never leaves half a file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from longtake.errors import ConfigError, DataError


class LastCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` every `every_n_train_steps` steps and after the last one, whatever that step is.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: optimiser steps between two checkpoints.
        keep_every_n_steps: also keep a `step_*.ckpt` at these steps for good; None keeps none.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int, keep_every_n_steps: int | None = None) -> None:
        if keep_every_n_steps is not None and keep_every_n_steps < 1:
            raise ConfigError(
                f"callbacks.checkpoint.keep_every_n_steps is {keep_every_n_steps}; expected 1 or more, or null. Change "
                "`callbacks.checkpoint.keep_every_n_steps`."
            )
        super().__init__(
            dirpath=dirpath,
            every_n_train_steps=every_n_train_steps,
            save_top_k=0,
            save_last=True,
            enable_version_counter=False,
        )
        self.keep_every_n_steps = keep_every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step, keep = trainer.global_step, self.keep_every_n_steps
        path = Path(str(self.dirpath)) / f"step_{step:07d}.ckpt"
        if keep and step % keep == 0 and not trainer.strategy.broadcast(path.exists()):
            trainer.save_checkpoint(path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, straight from the tensors: no second copy in memory, none in
    /tmp.

    Reading never executes anything: checkpoints hold tensors, numbers, text and plain containers only.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            # torch's writer turns some of the system's errors into a RuntimeError
            if isinstance(error, OSError | RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                system = error if isinstance(error, OSError) else error.__context__
                reason = getattr(system, "strerror", None) or str(error).partition("\n")[0]
                raise DataError(
                    f"the checkpoint {target} cannot be written ({reason}); what was there before is whole. Free some "
                    "space and start the same command with this run's run.id, or write elsewhere (`run.root`)."
                ) from error
            raise

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)
