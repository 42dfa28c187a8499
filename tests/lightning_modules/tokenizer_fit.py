"""What the tests of first stages share: a set of clips, and a short training on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoint import AtomicCheckpointIO
from callbacks.ema import EMA
from callbacks.weights_export import WeightsExport
from datamodules.video import VideoDataModule
from datamodules.writing.build import WriterSettings, build_dataset
from tests.first_stage import NoisyClips

VIDEO = {"fps": "35/3", "height": 16, "width": 32, "num_frames": 9}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips") / "set"
    settings = WriterSettings()
    build_dataset(NoisyClips(num_tasks=6), root, request={}, settings=settings, num_workers=1, progress=False)
    return root


class Figures(Callback):
    """Keeps the loss of every step, and the figures of every validation."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.val.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})


def fit(made: LightningModule, root: Path, folder: Path, steps: int, ckpt: Path | None = None) -> Figures:
    figures = Figures()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[EMA(decay=0.9), figures, WeightsExport(str(folder / "weights.safetensors"), dtype="float16")],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # eight clips of noise say nothing about others, so it validates on those that it trains on
    data = VideoDataModule(root=root, num_frames=9, batch_size=4, num_workers=0, splits={"val": "train"})
    trainer.fit(made, datamodule=data, ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return figures
