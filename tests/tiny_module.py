"""The smallest module that the callbacks can work with: one linear layer, fitted to a fixed map."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from callbacks.checkpoint import AtomicCheckpointIO, LastCheckpoint
from lightning_modules.base import BaseModule
from longtake.errors import ConfigError
from longtake.schedules import warmup_constant


class Knobs:
    """Settings that a schedule may change; refuses what makes no sense, as an objective does."""

    def __init__(
        self, *, num_chunks: int = 1, context_noise: float = 0.0, shares: dict[str, float] | None = None
    ) -> None:
        if num_chunks < 1:
            raise ConfigError(f"objective.num_chunks is {num_chunks}; expected 1 or more")
        self.num_chunks, self.context_noise, self.shares = num_chunks, context_noise, shares or {"none": 1.0}


class TinyModule(BaseModule):
    """y = W x; records what the schedules set at every step."""

    def __init__(self, lr: float = 0.05, width: int = 3, **kwargs: Any) -> None:
        settings = {
            "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.1),
            "scheduler": partial(warmup_constant, warmup_steps=3),
        }
        super().__init__(**{**settings, **kwargs})
        self.width = width
        self.wants_ema = False
        self.ema_updates = 0
        self.network: nn.Module | None = None
        self.ema_network: nn.Module | None = None
        self.objective = Knobs()
        self.seen: list[tuple[int, int, float, float]] = []

    def configure_model(self) -> None:
        if self.network is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.network = nn.Sequential(nn.Linear(3, self.width), nn.BatchNorm1d(self.width, affine=False))
        if self.wants_ema and self.ema_network is None:
            self.ema_network = copy.deepcopy(self.network).requires_grad_(False)

    def data_requirements(self) -> dict[str, int | None]:
        return {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.seen.append((self.global_step, self.objective.num_chunks, self.objective.context_noise, rate))
        assert self.network is not None
        loss = (self.network(batch) - batch.flip(1)).square().mean() * self.objective.num_chunks
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", batch.square().mean() / (1 + self.global_step), on_epoch=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ema_updates"] = self.ema_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ema_updates = checkpoint["ema_updates"]


class Numbers(IterableDataset):
    """Endless batches, a pure function of their number."""

    def __init__(self, first: int = 0, poisoned: tuple[int, ...] = ()) -> None:
        self.first, self.poisoned = first, poisoned

    def __iter__(self) -> Iterator[Tensor]:
        number = self.first
        while True:
            batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            yield batch * float("nan") if number in self.poisoned else batch
            number += 1


def fit(
    module: BaseModule,
    folder: Path,
    steps: int,
    *callbacks: Callback,
    first: int = 0,
    ckpt: Path | None = None,
    poisoned: tuple[int, ...] = (),
    save_every: int = 1000,
    **settings: Any,
) -> Trainer:
    """Trains `module` on one CPU process and returns the trainer."""
    last = LastCheckpoint(str(folder / "checkpoints"), every_n_train_steps=save_every)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=settings.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, last],
        **settings,
    )
    data = DataLoader(Numbers(first, poisoned), batch_size=None)
    trainer.fit(module, data, settings.get("val"), ckpt_path=ckpt, weights_only=True)
    return trainer
