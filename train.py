"""Trains a model: compose -> check -> open the run folder -> instantiate -> fit.

python train.py experiment=ar_chunk3f [key=value ...]      --help lists groups and keys
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launcher.entry import entry_point

logger = logging.getLogger("longtake")

# Lightning and torch are imported inside the functions: --help and a typing error should not wait for them.


def main(cfg: DictConfig) -> int:
    """Trains what the config describes, from the beginning or from where the run stopped."""
    from launcher.check_config import check_config
    from launcher.run_folder import open_run

    check_config(cfg)
    run = open_run(cfg)
    if run.message:
        logger.info(run.message)
    if run.is_finished:
        return 0
    logger.info("run folder: %s", run.folder)
    return train(cfg, checkpoint=str(run.checkpoint) if run.checkpoint else None)


def train(cfg: DictConfig, checkpoint: str | None) -> int:
    """Builds everything and fits; `checkpoint` restores model, optimiser, schedule and data position."""
    from hydra.utils import instantiate
    from lightning import seed_everything

    from launcher.compose import resolved
    from launcher.logs import take_over_lightning

    take_over_lightning()
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data)
    module = instantiate(cfg.module)
    module.run_config = resolved(cfg)
    if cfg.init_from and checkpoint is None:
        module.initialise_from(cfg.init_from)
        logger.info("weights from %s", cfg.init_from)
    trainer = instantiate(
        cfg.trainer,
        strategy=cfg.strategy.strategy,
        plugins=cfg.strategy.plugins,
        callbacks=_built(cfg.callbacks),
        logger=_built(cfg.get("logger") or {}),
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        _say_where_to_look(cfg, trainer)
    return 0


def _built(nodes: Mapping[Any, Any]) -> list[Any]:
    from hydra.utils import instantiate

    return [instantiate(node) for node in nodes.values() if node is not None]


def _say_where_to_look(cfg: DictConfig, trainer: Any) -> None:
    folder, step = Path(cfg.run.dir), trainer.global_step
    samples = sorted(folder.glob("samples/step_*/*.mp4"))
    weights = folder / "weights.safetensors"
    rolls_out = weights.is_file() and "rollout" in cfg.module
    speed = [callback.sentence() for callback in trainer.callbacks if hasattr(callback, "sentence")]
    rows = [
        ("sample video", samples[-1] if samples else None),
        ("weights", weights if weights.is_file() else None),
        ("roll out", f"python predict.py ckpt={folder} num_frames=81" if rolls_out else None),
        ("checkpoint", folder / "checkpoints" / "last.ckpt"),
        ("metrics", folder / "metrics.jsonl"),
        ("curves", f"tensorboard --logdir {folder}"),
        ("train longer", f"the same command with run.id={cfg.run.id} trainer.max_steps={2 * step}"),
        ("this run", speed[0].removeprefix("speed: ") if speed and speed[0] else None),
    ]
    lines = [f"  {name:<13} {value}" for name, value in rows if value is not None]
    logger.info("trained to step %d. Where to look next:%s%s", step, os.linesep, os.linesep.join(lines))


if __name__ == "__main__":
    entry_point(main, "train")
