"""The average of the weights: by hand, over accumulation, after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.ema import EMA
from longtake.errors import ConfigError
from tests.tiny_module import TinyModule, fit


class Recorder(Callback):
    """Keeps the weights after every optimiser step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(pl_module.network[0].weight.detach().clone())  # type: ignore[index,union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.global_step == len(self.weights):
            self.weights.append(pl_module.network[0].weight.detach().clone())  # type: ignore[index,union-attr]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_average_is_what_one_computes_by_hand(tmp_path: Path, accumulate: int) -> None:
    module, recorder = TinyModule(), Recorder()
    fit(module, tmp_path, 7, EMA(decay=0.6), recorder, accumulate_grad_batches=accumulate)
    assert len(recorder.weights) == 8
    average = recorder.weights[0]
    for update, weights in enumerate(recorder.weights[1:]):
        decay = min(0.6, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * weights
    assert module.ema_updates == 7
    assert torch.allclose(module.ema_network[0].weight, average, atol=1e-6)  # type: ignore[index]
    assert not torch.equal(average, recorder.weights[-1])


def test_without_warmup_the_decay_is_constant() -> None:
    assert [EMA(decay=0.9, warmup=False).decay_at(n) for n in (0, 5, 1000)] == [0.9] * 3
    assert [EMA(decay=0.9).decay_at(n) for n in (0, 8, 1000)] == [0.1, 0.5, 0.9]


def test_buffers_are_copied_and_the_average_has_no_gradient(tmp_path: Path) -> None:
    module = TinyModule()
    fit(module, tmp_path, 3, EMA())
    assert module.network is not None
    assert module.ema_network is not None
    pairs = list(zip(module.network.buffers(), module.ema_network.buffers(), strict=True))
    assert len(pairs) == 3
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(parameter.requires_grad for parameter in module.ema_network.parameters())


def test_a_new_run_starts_at_the_given_weights_and_a_resumed_one_keeps_its_average(tmp_path: Path) -> None:
    whole = TinyModule()
    fit(whole, tmp_path / "whole", 8, EMA(decay=0.7))
    first = TinyModule()
    fit(first, tmp_path / "cut", 5, EMA(decay=0.7), save_every=5)
    second = TinyModule()
    fit(second, tmp_path / "cut", 8, EMA(decay=0.7), first=5, ckpt=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert second.ema_updates == 8
    state, wanted = second.state_dict(), whole.state_dict()
    assert state.keys() == wanted.keys()
    assert any(name.startswith("ema_network.") for name in state)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_disabled_builds_no_second_copy(tmp_path: Path) -> None:
    module = TinyModule()
    fit(module, tmp_path, 2, EMA(enabled=False))
    assert module.ema_network is None
    assert module.ema_updates == 0


def test_decay_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.ema\.decay is 1"):
        EMA(decay=1.0)
