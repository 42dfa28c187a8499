"""What every LightningModule of the project has in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from longtake.errors import ConfigError, DataError
from longtake.loading import unread
from longtake.types import Clip

logger = logging.getLogger("longtake")
T = TypeVar("T")

MAX_SKIPPED_IN_A_ROW = 20


def built(node: T | Mapping[str, Any]) -> T:
    """Returns what a config node describes; anything that is no node is returned as it is.

    A module whose yaml says `_recursive_: false` gets nodes, so that it can build what it needs when it needs it.
    """
    if isinstance(node, Mapping) and "_target_" in node:
        from hydra.utils import instantiate

        return instantiate(node, _convert_="all")
    return node  # type: ignore[return-value]


class BaseModule(LightningModule):
    """Optimiser, schedule, skipping of steps that would spoil the weights, the config inside the checkpoint, and
    starting from weights.

    Args:
        optimizer: makes the optimiser from the trained parameters, or its config node.
        scheduler: makes the learning-rate schedule from the optimiser, or its node; stepped once an optimiser step.

    Attributes:
        run_config: the resolved config as plain containers; it travels in every checkpoint.
        skipped_steps: optimiser steps left out because a gradient was not finite.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.run_config: dict[str, Any] = {}
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._batch_keys: list[str] = []
        self._make_optimizer = built(optimizer)
        self._make_scheduler = built(scheduler)

    @abstractmethod
    def data_requirements(self) -> dict[str, int | None]:
        """Returns what the data must be like: {"action_dim": columns, "vocab_size": codes}.

        A missing name says nothing, None says that the model ignores it. A datamodule compares this with its
        data and refuses a mismatch with both numbers.
        """

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the trained parameters as groups of the optimiser; `lr_scale` multiplies its learning rate."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self.param_groups())
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
        if self._make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._make_scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        size = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        logger.info("%s: %s trained parameters", type(self).__name__, f"{size:,}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._batch_keys = list(batch.key) if isinstance(batch, Clip) else []

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, logs the norm, and empties gradients that are not finite: an optimiser then changes nothing.

        Gradients are already summed over ranks, so every rank comes to the same decision.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            self._skipped_in_a_row = 0
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            self._skip(optimizer)
        self.log("train/grad_norm", norm)
        self.log("train/skipped_steps", float(self.skipped_steps))

    def _skip(self, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        logger.warning(
            "step %d is skipped: the loss or a gradient is not finite (%d skipped so far; clips: %s)",
            self.global_step,
            self.skipped_steps,
            ", ".join(self._batch_keys) or "unknown",
        )
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DataError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; training has "
                "diverged. Lower `optimizer.lr` or `trainer.gradient_clip_val`, or find its begin with debug=anomaly."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.run_config
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    def initialise_from(self, path: str | Path) -> None:
        """Takes the weights of a .safetensors file or of a checkpoint; training starts at step 0.

        Raises:
            ConfigError: the file cannot be read or holds other weights than this model has.
        """
        self.configure_model()
        own = self.state_dict()
        given = read_weights(Path(path))
        for name in sorted(own.keys() | given.keys()):
            mine, theirs = (str(list(state[name].shape)) if name in state else "nothing" for state in (own, given))
            if mine != theirs:
                raise ConfigError(
                    f"{path} does not fit this model: it holds {theirs} for {name!r}, the model has {mine}. "
                    "Change `init_from` or the `module` settings."
                )
        self.load_state_dict(given)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors file or of a checkpoint; executes nothing that is in it.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # zip, pickle, OS, key and format errors alike: the file is not what it should be
        raise ConfigError(
            f"no weights can be read from {path} ({unread(error)}); expected a .safetensors file or a .ckpt of a run. "
            "Change `init_from`."
        ) from error
