"""The moving average of the weights, which validation, rollouts and the exported weights use.

The module holds both copies (`network`, `ema_network`), so every checkpoint writer saves both and nothing is swapped.
The average is elementwise: under any strategy each rank averages what it holds.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from longtake.errors import ConfigError


class HasAverage(Protocol):
    """What a module offers for averaging.

    Attributes:
        wants_ema: read by `configure_model`, which builds `ema_network` only then.
        network: what is trained.
        ema_network: the averaged copy, without gradient; None where none is wanted.
        ema_updates: how often the average was updated; saved with the module.
    """

    wants_ema: bool
    network: nn.Module
    ema_network: nn.Module | None
    ema_updates: int


class EMA(Callback):
    """Updates `ema_network` once an optimiser step: average = decay * average + (1 - decay) * weights.

    Args:
        decay: of the average after its warm-up.
        warmup: with it update n uses min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
        enabled: false builds no second copy.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, enabled: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(
                f"callbacks.ema.decay is {decay}; expected 0 or more and less than 1. Change `callbacks.ema.decay`."
            )
        self.decay, self.warmup, self.enabled = decay, warmup, enabled
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Comes before `configure_model`."""
        if stage == "fit" and self.enabled:
            if not hasattr(pl_module, "wants_ema"):
                raise ConfigError(
                    f"{type(pl_module).__name__} keeps no average of its weights. Set callbacks.ema.enabled=false."
                )
            cast(HasAverage, pl_module).wants_ema = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the average at the weights that step 1 begins with; what a checkpoint restored stays."""
        self._step = trainer.global_step
        if self.enabled and trainer.global_step == 0:
            module = cast(HasAverage, pl_module)
            _copy(module)
            module.ema_updates = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Comes before checkpoints are written: Lightning calls their callbacks last."""
        if self.enabled and trainer.global_step > self._step:  # not in the middle of an accumulated step
            self._step = trainer.global_step
            module = cast(HasAverage, pl_module)
            update(module, self.decay_at(module.ema_updates))

    def decay_at(self, updates: int) -> float:
        """Returns the decay of the next update, after `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


@torch.no_grad()
def update(module: HasAverage, decay: float) -> None:
    """Moves the average towards the weights once; what is no floating-point parameter is copied."""
    average, weights, others = _paired(module)
    torch._foreach_lerp_(average, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for target, source in others:
        target.copy_(source)
    module.ema_updates += 1


@torch.no_grad()
def _copy(module: HasAverage) -> None:
    average, weights, others = _paired(module)
    for target, source in [*zip(average, weights, strict=True), *others]:
        target.copy_(source)


def _paired(module: HasAverage) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Returns averaged parameters, their weights as float32 or better, and pairs (copy, original) of buffers."""
    assert module.ema_network is not None, "configure_model built no ema_network"
    average: list[Tensor] = list(module.ema_network.parameters())
    weights = [p.detach().to(a.dtype) for p, a in zip(module.network.parameters(), average, strict=True)]
    low = next((a.dtype for a in average if a.is_floating_point() and a.dtype.itemsize < 4), None)
    assert low is None, f"an average in {low} would not move; it is kept in float32"
    others = list(zip(module.ema_network.buffers(), module.network.buffers(), strict=True))
    return average, weights, others
