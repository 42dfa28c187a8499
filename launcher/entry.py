"""The one way in: parse the command line, compose the config, run the task, turn errors into exit codes.

Exit codes: 0 done, 2 a setting that cannot work (one message, no traceback), 1 anything else that failed, 130
Ctrl-C.

A plain run composes the config itself, so that Hydra's job state stays unset: Lightning's DDP launcher then
starts its other processes with exactly the command line that the user typed. Whatever is Hydra's own
(`--help`, `--cfg`, `--info`, `-m`, shell completion, `--experimental-rerun`) goes to Hydra and keeps its
usual meaning.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launcher.compose import CONF, check_choices, compose, finish
from launcher.logs import configure_logging
from launcher.report import INTERRUPTED, JobFailed, explained, report

Task = Callable[[DictConfig], int | None]
Prepare = Callable[[list[str]], None]

logger = logging.getLogger("longtake")


def entry_point(task: Task, config_name: str = "train", prepare: Prepare | None = None) -> NoReturn:
    """Runs `task` on the config that the command line asks for, and exits with the right code.

    Args:
        task: receives the composed, unresolved config; returns an exit code or None for 0.
        config_name: a yaml of `conf/`, without the ending.
        prepare: called with the overrides before anything is composed; may add to Hydra's ConfigStore.
    """
    sys.exit(run(task, config_name, prepare))


def run(task: Task, config_name: str, prepare: Prepare | None = None) -> int:
    """Does what `entry_point` does, and returns the exit code."""
    args = get_args_parser().parse_intermixed_args()  # overrides may stand before and after the flags
    configure_logging()
    config_name = args.config_name or config_name
    config_dir = args.config_path or CONF
    overrides = list(args.overrides)
    if args.config_dir:
        overrides.append(f"hydra.searchpath=[file://{Path(args.config_dir).resolve()}]")
    cfg: DictConfig | None = None
    try:
        if prepare is not None:
            prepare(args.overrides)
        if _is_hydras(args):
            _run_in_hydra(task, config_name, args.overrides)
            return 0
        cfg = compose(config_name, overrides, config_dir)
        return task(cfg) or 0
    except BaseException as error:
        return report(explained(error, config_name, overrides, config_dir), cfg)


def _is_hydras(args: argparse.Namespace) -> bool:
    flags = (args.help, args.hydra_help, args.cfg, args.info, args.shell_completion, args.resolve)
    is_rerun = args.experimental_rerun is not None
    return any(flags) or is_rerun or args.multirun or "hydra.mode=MULTIRUN" in args.overrides


def _run_in_hydra(task: Task, config_name: str, overrides: list[str]) -> None:
    stamp = new_stamp()  # made once here: every job of a multirun carries it, also on another machine

    def job(cfg: DictConfig) -> None:
        if (code := _run_job(task, cfg, stamp)) == INTERRUPTED:
            raise KeyboardInterrupt  # ends the whole multirun
        if code:
            raise JobFailed(code)

    flags = [word for word in sys.argv[1:] if word not in overrides]
    sys.argv = [sys.argv[0], *flags, *overrides]  # Hydra's parser wants the overrides in one piece
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, and does not print them and exit with 1
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _run_job(task: Task, cfg: DictConfig, stamp: str) -> int:
    """Runs one job of a multirun under its own run.id, says what failed, and returns the exit code."""
    try:
        if HydraConfig.initialized():  # not so with --experimental-rerun
            now = HydraConfig.get()
            logger.info("job %s: %s", now.job.num, " ".join(now.overrides.task))
            check_choices(now.runtime.choices, now.job.config_name or "", now.overrides.task)
            finish(cfg, now.runtime.choices, now.overrides.task)
            if "run" in cfg:
                cfg.run.id = f"{cfg.run.id or f'{cfg.run.experiment}-{stamp}'}-{now.job.num}"
        return task(cfg) or 0
    except BaseException as error:
        return report(error, cfg)


def new_stamp() -> str:
    """Returns `<date>-<time>-<4 hex>`, the part of a run.id that makes it unique."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
