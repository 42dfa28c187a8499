"""A complete AR diffusion module of a few thousand parameters, on clips of smooth noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoint import AtomicCheckpointIO, LastCheckpoint
from lightning_modules.ar_diffusion import ARDiffusion
from longtake.schedules import warmup_constant
from tests.random_clips import RandomClips

VIDEO = {"fps": "10", "height": 16, "width": 16, "num_frames": 21, "chunk_lat": 3}
ACTIONS = 3


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any) -> None:
        self.values.append(float(outputs["loss"]))


def nodes(**changes: Any) -> dict[str, Any]:
    """Returns the config nodes that a module is built from; `changes` update the objective."""
    return {
        "network": {
            "_target_": "longtake.networks.video_dit.VideoDiT",
            "dim": 16,
            "ffn_dim": 32,
            "num_heads": 2,
            "num_layers": 2,
            "in_channels": 4,
            "patch_size": [1, 1, 1],
            "mixer": {
                "_target_": "longtake.networks.lact.LaCT",
                "_partial_": True,
                "fw_heads": 1,
                "window": 1,
                "time_rope": "none",
            },
            "actions": {
                "_target_": "longtake.networks.conditioning.ActionEmbedding",
                "_partial_": True,
                "action_dim": ACTIONS,
                "ratio_time": 4,
            },
        },
        "objective": {
            "_target_": "longtake.objectives.teacher_forcing.TeacherForcing",
            "chunk_lat": 3,
            "first_chunk_clean": {"none": 0.5, "image": 0.25, "clip": 0.25},
            "action_dropout": 0.1,
            "noise_levels": {"_target_": "longtake.objectives.flow_matching.NoiseLevels"},
            **changes,
        },
        "solver": {"_target_": "longtake.rollout.solvers.Euler"},
        "rollout": {
            "_target_": "longtake.rollout.chunks.MemoryRollout",
            "num_steps": 3,
            "guidance": 1.0,
            "unconditional": ["actions"],
        },
        "encoder": {"video": {"_target_": "tests.block_code.BlockCode"}, "text": None},
        "video": dict(VIDEO),
    }


def make_module(lr: float = 1e-2, **changes: Any) -> ARDiffusion:
    """Returns the module; `changes` replace arguments, those of the objective under "objective".

    "raw_objective" is the node of another objective.
    """
    parts = nodes(**changes.pop("objective", {}))
    parts["objective"] = changes.pop("raw_objective", parts["objective"])
    settings: dict[str, Any] = {
        **parts,
        "seed": 0,
        "action_dim": ACTIONS,
        "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.01),
        "scheduler": partial(warmup_constant, warmup_steps=2),
    }
    return ARDiffusion(**{**settings, **changes})


def make_data(**changes: Any) -> RandomClips:
    """Returns clips of smooth noise in the size that the module takes."""
    settings = {"batch_size": 2, "num_workers": 0, "action_dim": ACTIONS, "seed": 0, "height": 16, "width": 16}
    return RandomClips(
        **{**settings, "num_frames": VIDEO["num_frames"], "val_clips": 3, "limit_samples": None, **changes}
    )  # type: ignore[arg-type]


def fit_tiny(
    module: LightningModule, folder: Path, steps: int, *callbacks: Callback, data: Any = None, **settings: Any
) -> Trainer:
    """Trains on one CPU process (unless told otherwise) and returns the trainer."""
    ckpt, save_every = settings.pop("ckpt", None), settings.pop("save_every", 1000)
    last = LastCheckpoint(str(folder / "checkpoints"), every_n_train_steps=save_every)
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [*callbacks, last],
    }
    trainer = Trainer(**{**defaults, **settings})
    trainer.fit(module, datamodule=data or make_data(), ckpt_path=ckpt, weights_only=True)
    return trainer
