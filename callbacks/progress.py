"""Progress: a live bar on a terminal, now and then a plain line in a log file."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

logger = logging.getLogger("longtake")


def progress_bar(every_seconds: float = 15.0) -> ProgressBar:
    """Returns a live bar where standard error is a terminal, else lines every `every_seconds`."""
    return RichProgressBar() if sys.stderr.isatty() else ProgressLines(every_seconds)


class ProgressLines(ProgressBar):
    """Logs step, loss, speed and the time that is left: after the first step, then every so many seconds.

    Args:
        every_seconds: least time between two lines.
    """

    def __init__(self, every_seconds: float) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._is_enabled = True
        self._begin = (0.0, 0)  # when the first step was finished, and which it was: start-up is no speed
        self._last_line = 0.0

    def disable(self) -> None:
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = (0.0, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        is_first = self._begin[0] == 0.0
        if is_first:
            self._begin = (now, step)
        is_due = is_first or now - self._last_line >= self.every_seconds or step >= trainer.max_steps
        if not (self._is_enabled and trainer.is_global_zero and is_due):
            return
        self._last_line = now
        loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
        line = f"step {step}/{trainer.max_steps}  train/loss {loss:.5f}"
        if step > self._begin[1]:
            seconds = (now - self._begin[0]) / (step - self._begin[1])
            left = max(trainer.max_steps - step, 0) * seconds
            line += f"  {seconds:.3g} s/step  {_clock(left)} left"
        logger.info(line)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._is_enabled and trainer.is_global_zero) or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics.items()
        # what is listed by chunk is for curves, not for a line
        values = {name: float(value) for name, value in metrics if name.startswith("val/") and "@" not in name}
        logger.info("validation at step %d  %s", trainer.global_step, _listed(values))


def _listed(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.5f}" for name, value in sorted(values.items()))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
