"""Speed: what is counted, what is left out, what is said."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.throughput import Throughput
from longtake.types import Clip
from longtake.work import Work, matmul_ceiling, matmul_dtype
from tests.tiny_ar import fit_tiny, make_module
from tests.tiny_module import TinyModule, fit


class Slow(Callback):
    """Makes every step, and every validation, take a known time."""

    def __init__(self, step_s: float = 0.0, validation_s: float = 0.0) -> None:
        self.step_s, self.validation_s = step_s, validation_s

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(self.step_s)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(self.validation_s)


def test_tokens_and_operations_a_second_are_those_of_the_steps_after_the_warm_up(tmp_path: Path) -> None:
    module = make_module()
    module.work = lambda batch: Work(1000, 5e6)  # type: ignore[method-assign]
    speed = Throughput(every_n_steps=4, warmup_steps=2)
    trainer = fit_tiny(module, tmp_path, 10, Slow(step_s=0.1), speed)
    assert speed.figures is not None
    assert 1000 / 0.25 < speed.figures.tokens_per_s < 1000 / 0.1
    assert speed.figures.flops_per_s == pytest.approx(speed.figures.tokens_per_s * 5e3)
    assert speed.ceiling is not None
    assert speed.figures.mfu == pytest.approx(speed.figures.flops_per_s / speed.ceiling.flops)
    assert speed.figures.hours_left == 0
    assert float(trainer.callback_metrics["time/tokens_per_s"]) == pytest.approx(speed.figures.tokens_per_s, rel=1e-5)


def test_validation_is_no_training_time(tmp_path: Path) -> None:
    module = make_module()
    module.work = lambda batch: Work(1000, 5e6)  # type: ignore[method-assign]
    speed = Throughput(every_n_steps=4, warmup_steps=0)
    settings = {"limit_val_batches": 1, "val_check_interval": 2}
    fit_tiny(module, tmp_path, 5, Slow(step_s=0.05, validation_s=0.5), speed, **settings)
    assert speed.figures is not None
    assert speed.figures.tokens_per_s > 1000 / 0.2


def test_it_is_said_once_after_the_warm_up_and_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="longtake"):
        fit_tiny(make_module(), tmp_path, 12, Throughput(every_n_steps=2, warmup_steps=2))
    lines = [record.message for record in caplog.records if record.message.startswith("speed:")]
    assert len(lines) == 2
    assert "matmuls reach here" in lines[0]
    assert "waiting for data" in lines[0]


def test_accumulated_steps_count_all_their_batches(tmp_path: Path) -> None:
    module = make_module()
    module.work = lambda batch: Work(1000, 5e6)  # type: ignore[method-assign]
    speed = Throughput(every_n_steps=2, warmup_steps=1)
    fit_tiny(module, tmp_path, 3, Slow(step_s=0.1), speed, accumulate_grad_batches=3)
    assert speed.figures is not None
    assert 1000 / 0.25 < speed.figures.tokens_per_s < 1000 / 0.1


def test_a_module_that_does_not_count_its_work_is_left_alone(tmp_path: Path) -> None:
    speed = Throughput(every_n_steps=1, warmup_steps=0)
    fit(TinyModule(), tmp_path, 3, speed)
    assert speed.figures is None
    assert speed.sentence() == ""


def test_work_of_a_step_is_three_forward_passes() -> None:
    module = make_module()
    module.configure_model()
    batch = Clip(latents=torch.zeros(2, 1, 6, 4, 2, 2), key=["a", "b"])
    work = module.work(batch)
    assert work.tokens == 2 * 3 * 12  # clips x (t0, c0, t1) x tokens of a chunk
    layout = module.objective.layout(2, module.network.grid((1, 3, 4, 2, 2)))  # type: ignore[union-attr,operator]
    assert work.flops == 3 * module.network.num_flops(layout, 2, 0)  # type: ignore[union-attr,operator]
    assert work.flops > 3 * 2 * work.tokens * 2 * (8 * 16 * 16)  # projections alone


def test_the_ceiling_is_measured_and_named() -> None:
    ceiling = matmul_ceiling(torch.device("cpu"), torch.float32)
    assert 1e8 < ceiling.flops < 1e14
    assert "float32" in ceiling.what


def test_the_type_of_matmuls_follows_the_precision() -> None:
    names = {
        "bf16-mixed": torch.bfloat16,
        "16-mixed": torch.float16,
        "32-true": torch.float32,
        "64-true": torch.float64,
    }
    assert {name: matmul_dtype(name) for name in names} == names
