"""The folder of a run, `outputs/<run.id>/`: made by rank 0 after `check_config`, joined by the rest."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from callbacks.run_state import write_state
from launcher import ranks
from launcher.compose import resolved
from launcher.entry import new_stamp
from launcher.resume import Plan, Request, decide, newest_checkpoint, read_state
from longtake.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes on one run are then not noticed
    fcntl = None


@dataclass
class Run:
    """One start of a run.

    Attributes:
        folder: the run folder.
        checkpoint: what to continue from, or None.
        is_finished: whether there is nothing to do.
        message: what to tell the user about it, or nothing.
    """

    folder: Path
    checkpoint: Path | None
    is_finished: bool
    message: str
    _lock: IO[str] | None = None  # held until the process ends


def open_run(cfg: DictConfig) -> Run:
    """Decides which run this start belongs to, writes `run.id` into the config and returns the opened folder.

    Raises:
        ConfigError: the folder exists, belongs to another config, is in use or cannot be made.
    """
    lock = None
    if ranks.is_rank_zero():
        plan, lock = _lead(cfg)
    else:
        plan = _join(cfg)
    cfg.run.root, cfg.run.id = str(plan.root), plan.run_id
    return Run(plan.folder, plan.checkpoint, plan.is_finished, plan.message, lock)


def _lead(cfg: DictConfig) -> tuple[Plan, IO[str] | None]:
    try:
        plan = decide(request_of(cfg), is_locked)
        lock = None if plan.is_finished else _make(plan, cfg)
    except ConfigError as error:
        ranks.publish({"refused": str(error)})
        raise
    os.environ[ranks.RUN_ID] = plan.run_id
    checkpoint = str(plan.checkpoint) if plan.checkpoint else None
    ranks.publish(
        {
            "root": str(plan.root),
            "run_id": plan.run_id,
            "checkpoint": checkpoint,
            "is_finished": plan.is_finished,
        }
    )
    return plan, lock


def _join(cfg: DictConfig) -> Plan:
    told = ranks.receive()
    if told is None:
        return _join_by_rule(request_of(cfg))
    if "refused" in told:
        raise ConfigError(told["refused"])
    checkpoint = Path(told["checkpoint"]) if told["checkpoint"] else None
    return Plan(Path(told["root"]), told["run_id"], checkpoint, told["is_finished"])


def _join_by_rule(request: Request) -> Plan:
    """Under srun the ranks cannot ask: they come to the same answer from what only changes once all ranks
    train.

    Rank 0 may have made or emptied the folder by now, so nothing here depends on whether it exists.
    """
    assert request.run_id is not None, "request_of refuses several ranks without a run.id"
    plan = Plan(request.root, request.run_id)
    starts_afresh = request.resume == "never" or (
        request.resume is None and (request.overwrite or not request.is_given)
    )
    if starts_afresh and not request.is_restart:
        return plan
    if request.resume not in (None, "auto", "never"):
        return decide(request, lambda folder: False)
    if not (plan.folder / "config.yaml").exists():
        return plan
    state = read_state(plan.folder)
    newest = newest_checkpoint(plan.folder)
    is_finished = state["status"] == "finished" and state["step"] >= request.max_steps
    return Plan(plan.root, plan.run_id, newest[0] if newest else None, is_finished)


def request_of(cfg: DictConfig) -> Request:
    """Returns what the config and the environment ask for.

    Raises:
        ConfigError: several processes start at once and nothing tells them the name of their run.
    """
    given = cfg.run.id
    # rank 0 finds its own plan in the environment only where this process trained before: that name is used up
    is_used = ranks.is_rank_zero() and ranks.RUN_PLAN in os.environ
    inherited = None if is_used else os.environ.get(ranks.RUN_ID)
    if given is None and inherited is None and ranks.cannot_ask():
        raise ConfigError(
            "several processes were started by srun and no run.id tells them which run they belong to; "
            "expected the same "
            f"name for all. Set run.id=<name> or export {ranks.RUN_ID}=<name> before srun."
        )

    def config_of(run: dict[str, Any]) -> dict[str, Any]:
        copy = deepcopy(cfg)
        copy.run = {**OmegaConf.to_container(cfg.run), **run}  # type: ignore[dict-item]
        return resolved(copy)

    return Request(
        root=Path(cfg.run.root),
        experiment=cfg.run.experiment,
        config_of=config_of,
        max_steps=cfg.trainer.max_steps,
        new_id=f"{cfg.run.experiment}-{new_stamp()}",
        run_id=given or inherited,
        is_given=given is not None,
        resume=cfg.resume,
        overwrite=cfg.overwrite,
        is_restart=ranks.is_restart(),
    )


def is_locked(folder: Path) -> bool:
    """Returns whether another process is working on a run folder right now."""
    if not (folder / "lock").exists():
        return False
    handle = _locked(folder)
    if handle is None:
        return True
    handle.close()
    return False


def _make(plan: Plan, cfg: DictConfig) -> IO[str] | None:
    """Makes the folder with its config, and returns the lock that this process now holds."""
    folder = plan.folder
    try:
        if plan.clears:
            shutil.rmtree(folder)
        is_new = not (folder / "config.yaml").exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        if lock is None:
            raise ConfigError(f"{folder} was just taken by another process. Give another `run.id`.")
        copy = deepcopy(cfg)
        copy.run.root, copy.run.id = str(plan.root), plan.run_id
        _write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved(copy))))
        if is_new:
            write_state(folder, "running", 0)
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be made: {error.strerror or error}; expected a place that can "
            "be written. "
            "Change `run.root`."
        ) from error
    return lock


def _locked(folder: Path) -> IO[str] | None:
    """Returns the open lock file of a folder, or None if another process holds it."""
    handle = (folder / "lock").open("a")
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            return None
    return handle


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
