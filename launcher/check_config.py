"""One look at the whole config before any data is read, weight loaded or folder made.

A rule is a small function that yields a sentence for everything it finds wrong: what is wrong with the values
received; what was expected; which key to change. To add a rule, write the function and put it into RULES.
What a single constructor takes is not checked here but against its signature (`launcher.signatures`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from launcher.check_model import MODEL_RULES
from launcher.check_parts import PART_RULES
from longtake.errors import ConfigError
from longtake.geometry import latent_frames

# Every first stage codes 4 or 8 pixel frames a latent frame; what is off the lattice of 4 fits none of them.
_SMALLEST_RATIO = 4
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
_LARGEST = 2**32 - 1  # what numpy takes as a seed; no other number comes near
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Rule = Callable[[DictConfig], Iterator[str]]


def check_config(cfg: DictConfig) -> None:
    """Checks what several keys say together, all rules at once.

    Raises:
        ConfigError: one message with everything that is wrong.
    """
    problems = list(dict.fromkeys(problem for rule in RULES for problem in rule(cfg)))  # two rules may say the same
    if problems:
        raise ConfigError("\n       ".join(problems))


def _counts(cfg: DictConfig) -> Iterator[str]:
    """Numbers that must be whole and not too small."""
    least = {
        "seed": 0,
        "data.batch_size": 1,
        "data.num_workers": 0,
        "trainer.max_steps": 1,
        "trainer.num_nodes": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.accumulate_grad_batches": 1,
        "callbacks.checkpoint.every_n_train_steps": 1,
    }
    for key, minimum in least.items():
        value = OmegaConf.select(cfg, key)
        if value is None and not _has(cfg, key):
            continue
        if not (isinstance(value, int) and _is_whole(value) and value >= minimum):
            yield f"{key} is {value!r}; expected a whole number of {minimum} or more. Change `{key}`."
        elif value > _LARGEST:
            yield f"{key} is {value}; expected at most {_LARGEST}. Change `{key}`."


def _switches(cfg: DictConfig) -> Iterator[str]:
    if not isinstance(cfg.overwrite, bool):
        yield f"overwrite is {cfg.overwrite!r}; expected true or false. Change `overwrite`."


def _geometry(cfg: DictConfig) -> Iterator[str]:
    """Sizes that h264 can hold and frame counts that a causal encoder can code."""
    for name in ("height", "width"):
        value = cfg.video[name]
        if not _is_whole(value) or value < 2 or value % 2:
            yield (f"video.{name} is {value!r}; expected an even number of pixels, 2 or more. Change `video.{name}`.")
    try:
        if Fraction(str(cfg.video.fps)) <= 0:
            yield f"video.fps is {cfg.video.fps}; expected more than 0. Change `video.fps`."
    except (ValueError, ZeroDivisionError):
        yield (f"video.fps is {cfg.video.fps!r}; expected a number or a fraction such as 35/3. Change `video.fps`.")
    frames = cfg.video.num_frames
    if not _is_whole(frames) or frames < 2:
        yield (f"video.num_frames is {frames!r}; expected a whole number of 2 or more. Change `video.num_frames`.")
        return
    if cfg.video.get("block_frames") is not None:
        return  # the objective and the data check blocks
    try:
        latent_frames(frames, _SMALLEST_RATIO, "video.num_frames")
    except ConfigError as error:
        yield str(error)


def _optimisation(cfg: DictConfig) -> Iterator[str]:
    rate = OmegaConf.select(cfg, "optimizer.lr")
    if rate is not None and not (_is_number(rate) and 0 < rate < float("inf")):
        yield f"optimizer.lr is {rate!r}; expected a number above 0. Change `optimizer.lr`."
    clip = cfg.trainer.gradient_clip_val
    if clip is not None and not (_is_number(clip) and clip >= 0):
        yield (
            f"trainer.gradient_clip_val is {clip!r}; expected 0 or more, or null. Change `trainer.gradient_clip_val`."
        )


def _precision(cfg: DictConfig) -> Iterator[str]:
    precision, accelerator = str(cfg.trainer.precision), _accelerator(cfg)
    if precision not in _PRECISIONS:
        yield (
            f"trainer.precision is {precision!r}; expected one of: {', '.join(_PRECISIONS)}. Change "
            "`trainer.precision`."
        )
    elif precision.startswith("16") and accelerator == "cpu":
        yield (
            f"trainer.precision is {precision}, but training runs on the CPU, which has no fast 16-bit "
            "floats of that kind; "
            "expected 32-true or bf16-mixed. Change `trainer.precision`."
        )


def _devices(cfg: DictConfig) -> Iterator[str]:
    devices, accelerator = cfg.trainer.devices, _accelerator(cfg)
    if accelerator not in ("cpu", "gpu"):
        yield (f"trainer.accelerator is {accelerator!r}; expected auto, cpu or gpu. Change `trainer.accelerator`.")
        return
    count = num_devices(cfg)
    if count is None or count < 1:
        yield (
            f"trainer.devices is {_plain(devices)!r}; expected a number, a list of indices, or auto. Change "
            "`trainer.devices`."
        )
        return
    if accelerator == "gpu" and (present := _gpus()) < count:
        yield (
            f"trainer.devices asks for {count} GPUs and {present} are there. Change `trainer.devices` or set "
            "trainer=cpu."
        )
    if accelerator == "cpu" and isinstance(devices, ListConfig):
        yield (
            f"trainer.devices is the list {_plain(devices)}, but CPU processes have no index; expected a "
            "number. Change `trainer.devices`."
        )
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if (
        "TORCHELASTIC_RUN_ID" in os.environ
        and world
        and _is_whole(cfg.trainer.num_nodes)
        and world != count * cfg.trainer.num_nodes
    ):
        yield (
            f"torchrun started {world} processes, but trainer.devices={count} and {cfg.trainer.num_nodes} "
            "nodes make "
            f"{count * cfg.trainer.num_nodes}; expected the same number. Change `trainer.devices` or "
            "--nproc-per-node."
        )


def _strategy(cfg: DictConfig) -> Iterator[str]:
    """What `conf/strategy/*.yaml` says that the strategy supports."""
    name, can, accelerator = _strategy_name(cfg), cfg.strategy.supports, _accelerator(cfg)
    count = num_devices(cfg) or 1
    total = count * (cfg.trainer.num_nodes if _is_whole(cfg.trainer.num_nodes) else 1)
    if can.max_devices is not None and total > can.max_devices:
        yield (
            f"{total} devices, but {name} uses {can.max_devices} at most. Set strategy=ddp, or lower `trainer.devices`."
        )
    if accelerator in ("cpu", "gpu") and accelerator not in can.accelerators:
        yield (
            f"training runs on the {accelerator}, which {name} cannot; expected: "
            f"{_listed(can.accelerators)}. Change `strategy`."
        )
    if cfg.trainer.precision in _PRECISIONS and cfg.trainer.precision not in can.precisions:
        yield (
            f"trainer.precision is {cfg.trainer.precision}, which {name} cannot; expected one of: "
            f"{_listed(can.precisions)}. "
            "Change `trainer.precision` or `strategy`."
        )
    if cfg.trainer.gradient_clip_val and cfg.trainer.gradient_clip_algorithm not in can.gradient_clip:
        yield (
            f"trainer.gradient_clip_algorithm is {cfg.trainer.gradient_clip_algorithm}, which {name} cannot; "
            "expected one of: "
            f"{_listed(can.gradient_clip)}. Change `trainer.gradient_clip_algorithm`, or set "
            "trainer.gradient_clip_val=null."
        )


def _multirun(cfg: DictConfig) -> Iterator[str]:
    """Jobs of a local multirun share one process, from which Lightning can start others only once."""
    if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
        return
    is_local = "basic_launcher" in str(HydraConfig.get().launcher.get("_target_", ""))
    if is_local and (num_devices(cfg) or 1) > 1:
        yield (
            "-m runs its jobs one after another in one process, where trainer.devices must be 1. Start one "
            "command a run."
        )


def _run_names(cfg: DictConfig) -> Iterator[str]:
    run_id, resume = cfg.run.id, cfg.resume
    if run_id is not None and (not _RUN_ID.fullmatch(str(run_id)) or str(run_id) in ("auto", "never", "multirun")):
        yield (
            f"run.id is {run_id!r}; expected a name of letters, digits, dot, dash and underscore that begins "
            "with a letter or "
            "digit and is not auto, never or multirun. Change `run.id`."
        )
    if run_id is not None and not isinstance(run_id, str):
        yield f"run.id is the number {run_id}; expected text. Write run.id=\"'{run_id}'\"."
    if resume is not None and not isinstance(resume, str):
        yield f"resume is {resume!r}; expected auto, never, a run id or a path. Change `resume`."
    if cfg.init_from is not None:
        if resume not in (None, "auto", "never"):
            yield (
                f"init_from begins a new run and resume={resume} continues one; expected one of the two. Leave one out."
            )
        if not Path(str(cfg.init_from)).is_file():
            yield (
                f"init_from is {cfg.init_from!r}, which is no file; expected a .safetensors or .ckpt. Change "
                "`init_from`."
            )


RULES: list[Rule] = [
    _counts,
    _switches,
    _geometry,
    _optimisation,
    _precision,
    _devices,
    _strategy,
    _multirun,
    _run_names,
    *MODEL_RULES,
    *PART_RULES,
]


def num_devices(cfg: DictConfig) -> int | None:
    """Returns how many devices a node uses; None if `trainer.devices` is nonsense."""
    devices = cfg.trainer.devices
    every = max(1, _gpus()) if _accelerator(cfg) == "gpu" else 1
    if isinstance(devices, ListConfig):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return every
    if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)*,?", devices):
        return int(devices) if devices.isdigit() else len(devices.strip(",").split(","))
    return devices if isinstance(devices, int) and _is_whole(devices) else None


def _accelerator(cfg: DictConfig) -> str:
    name = str(cfg.trainer.accelerator)
    if name == "auto":
        return "gpu" if _gpus() else "cpu"
    return {"cuda": "gpu"}.get(name, name)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() or int(torch.backends.mps.is_available())


def _strategy_name(cfg: DictConfig) -> str:
    strategy = cfg.strategy.strategy
    name = strategy.get("_target_", "") if isinstance(strategy, DictConfig) else strategy
    return "strategy=single" if name == "auto" else str(name).rpartition(".")[2]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and name in node


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, ListConfig | DictConfig) else value
