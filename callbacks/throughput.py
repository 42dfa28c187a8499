"""How fast training is: tokens a second, floating-point work against what the machine can do, waiting for data."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from longtake.errors import ConfigError
from longtake.work import Ceiling, Work, matmul_ceiling, matmul_dtype, wait_for

logger = logging.getLogger("longtake")


@runtime_checkable
class CountsWork(Protocol):
    """A module that knows what a step costs."""

    def work(self, batch: Any) -> Work:
        """Returns the work of a training step on this batch."""
        ...


@dataclass(frozen=True)
class Figures:
    """Throughput of a stretch of steps on one rank."""

    tokens_per_s: float
    flops_per_s: float
    mfu: float
    data_wait_frac: float
    hours_left: float


class Throughput(Callback):
    """Logs throughput every so many steps and says it once after the warm-up and at the end.

    Validation, sample videos and checkpoints are left out of the time of a step, but not of the hours left.

    Args:
        every_n_steps: optimiser steps between two logged figures.
        warmup_steps: steps that do not count (compilation, workers that start).
    """

    def __init__(self, every_n_steps: int = 20, warmup_steps: int = 5) -> None:
        if every_n_steps < 1 or warmup_steps < 0:
            raise ConfigError(
                f"callbacks.throughput has every_n_steps={every_n_steps} and warmup_steps={warmup_steps}; expected 1 "
                "and 0 or more. Change `callbacks.throughput`."
            )
        self.every_n_steps, self.warmup_steps = every_n_steps, warmup_steps
        self.ceiling: Ceiling | None = None
        self.figures: Figures | None = None
        self._begin_step = self._last_step = 0
        self._begin_time = 0.0
        self._clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_step = self._last_step = trainer.global_step
        self._begin_time = 0.0
        if isinstance(pl_module, CountsWork):
            self.ceiling = matmul_ceiling(pl_module.device, matmul_dtype(str(trainer.precision)))
        self._clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, CountsWork):
            return
        work = pl_module.work(batch)
        self._tokens += work.tokens
        self._flops += work.flops
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        taken = step - self._begin_step
        if taken <= self.warmup_steps:
            if taken == self.warmup_steps:
                self._start_window(trainer)
                self._begin_time = self._window_time
        elif (taken - self.warmup_steps) % self.every_n_steps == 0 or step == trainer.max_steps:
            self._report(trainer, pl_module, says=self.figures is None or step == trainer.max_steps)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause_begin = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused += time.perf_counter() - self._pause_begin

    def _report(self, trainer: Trainer, pl_module: LightningModule, says: bool) -> None:
        assert self.ceiling is not None, "the ceiling is measured when training starts"
        wait_for(pl_module.device)
        now = time.perf_counter()
        seconds = max(1e-9, now - self._window_time - self._paused)
        taken = trainer.global_step - self._begin_step - self.warmup_steps
        left = max(0, trainer.max_steps - trainer.global_step)
        self.figures = Figures(
            tokens_per_s=self._tokens / seconds,
            flops_per_s=self._flops / seconds,
            mfu=self._flops / seconds / self.ceiling.flops,
            data_wait_frac=max(0.0, _waited(trainer) - self._waited) / seconds,
            hours_left=left * (now - self._begin_time) / taken / 3600,
        )
        pl_module.log_dict(
            {
                "time/tokens_per_s": self.figures.tokens_per_s,
                "time/tflops": self.figures.flops_per_s / 1e12,
                "time/mfu": self.figures.mfu,
                "time/data_wait_frac": self.figures.data_wait_frac,
                "time/hours_left": self.figures.hours_left,
            }
        )
        if says and trainer.is_global_zero:
            logger.info("%s", self.sentence())
        self._start_window(trainer)

    def sentence(self) -> str:
        """Returns the last figures in words; empty before there are any."""
        if self.figures is None or self.ceiling is None:
            return ""
        figures = self.figures
        left = f"; {_clock(figures.hours_left)} left" if figures.hours_left else ""
        return (
            f"speed: {figures.tokens_per_s:,.0f} tokens/s a process, {figures.flops_per_s / 1e9:,.3g} GFLOP/s = "
            f"{figures.mfu:.1%} of {self.ceiling.what}; {figures.data_wait_frac:.1%} of the time waiting for data{left}"
        )

    def _start_window(self, trainer: Trainer) -> None:
        self._clear()
        self._window_time, self._waited = time.perf_counter(), _waited(trainer)

    def _clear(self) -> None:
        self._tokens, self._flops, self._paused = 0, 0.0, 0.0
        self._window_time, self._pause_begin, self._waited = 0.0, 0.0, 0.0


def _waited(trainer: Trainer) -> float:
    """Returns the seconds that the training loader has waited for its workers so far; 0 where it does not say."""
    return float(getattr(trainer.train_dataloader, "waited_s", 0.0))


def _clock(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
