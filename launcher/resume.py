"""Decides what a start does: begin a new run, continue one, or find that there is nothing left to do.

Only reads: the run folder is made by `launcher.run_folder`. How the state of a run is known: its folder holds
`config.yaml` (resolved) and `state.json` with {"status": "running" | "finished", "step": int, "updated":
seconds}; it is finished when the status says so and no more steps are asked for than it has taken. A run that
was killed still says "running", so "running" means unfinished; whether a process works on it right now is
known by its lock.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launcher.compose import flat
from longtake.errors import ConfigError, unknown_choice

logger = logging.getLogger("longtake")

# Keys that may differ between the starts of one run: whole nodes or single keys. The trainer keys in the
# second row belong to `strategy`, `cluster` and `debug`: those groups are what sets them.
IGNORED_KEYS = (
    *(
        "run",
        "resume",
        "overwrite",
        "trainer.max_steps",
        "trainer.devices",
        "strategy",
        "cluster",
        "logger",
        "debug",
    ),
    *("trainer.num_nodes", "trainer.detect_anomaly", "trainer.profiler", "trainer.overfit_batches"),
    *("trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.val_check_interval"),
)


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        root: the folder that holds the run folders.
        experiment: the chosen experiment.
        config_of: the resolved config as it would be with this `run` node.
        max_steps: steps that the run shall have taken at its end.
        new_id: the run.id of a new run.
        run_id: the run.id that was given or inherited, or None.
        is_given: whether the user gave it (an inherited one is merely the name of this job).
        resume: auto, never, a run.id, a path, or None for the default.
        overwrite: whether an existing folder may be emptied.
        is_restart: whether the scheduler started this job before.
    """

    root: Path
    experiment: str
    config_of: Callable[[dict[str, Any]], dict[str, Any]]
    max_steps: int
    new_id: str
    run_id: str | None = None
    is_given: bool = False
    resume: str | None = None
    overwrite: bool = False
    is_restart: bool = False


@dataclass(frozen=True)
class Plan:
    """What this start does.

    Attributes:
        root: the folder that holds the run folder.
        run_id: name of the run folder.
        checkpoint: what to continue from; None starts at step 0.
        is_finished: whether there is nothing left to do.
        clears: whether an existing folder is emptied first.
        message: what to tell the user, in a sentence; empty for an ordinary new run.
    """

    root: Path
    run_id: str
    checkpoint: Path | None = None
    is_finished: bool = False
    clears: bool = False
    message: str = ""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.run_id


def decide(request: Request, is_locked: Callable[[Path], bool]) -> Plan:
    """Returns what this start does, by the rules of `resume`.

    Args:
        request: what was asked for.
        is_locked: whether a process is working on a run folder right now.

    Raises:
        ConfigError: the wish cannot be met without touching what must not be touched.
    """
    plan = _decide(request, is_locked)
    if plan.folder.exists() and is_locked(plan.folder) and not plan.is_finished:
        raise ConfigError(
            f"{plan.folder} is being trained by another process right now; expected a run that nobody works "
            "on. "
            "Wait for it, end it, or give another `run.id`."
        )
    return plan


def _decide(request: Request, is_locked: Callable[[Path], bool]) -> Plan:
    resume = request.resume
    if request.is_restart and request.run_id and (request.root / request.run_id / "config.yaml").exists():
        return _continue(request, request.root, request.run_id)  # its own folder, whatever the first start was told
    if request.overwrite and resume not in (None, "never"):
        raise ConfigError(
            f"overwrite=true empties the run folder and resume={resume} continues it; expected one of the "
            "two. "
            "Leave out `overwrite` or set resume=never."
        )
    if resume is None:
        resume = "auto" if (request.is_given or request.is_restart) and not request.overwrite else "never"
    if resume == "never":
        return _begin(request)
    if resume == "auto":
        if request.run_id:
            return _continue(request, request.root, request.run_id)
        return _continue_newest(request, is_locked)
    return _continue_named(request, resume)


def _begin(request: Request, checkpoint: Path | None = None) -> Plan:
    plan = Plan(request.root, request.run_id or request.new_id, checkpoint)
    if not _is_occupied(plan.folder):
        return plan
    if not request.overwrite:
        raise ConfigError(
            f"{plan.folder} exists already; expected a new run.id, or resume=auto to continue that run. "
            "To throw it away and start again add overwrite=true."
        )
    if not (plan.folder / "config.yaml").exists():
        raise ConfigError(
            f"{plan.folder} holds files but no run (no config.yaml), so overwrite=true does not touch it; "
            "expected a run folder. Change `run.id` or `run.root`, or remove the folder yourself."
        )
    return Plan(plan.root, plan.run_id, checkpoint, clears=True, message=f"{plan.folder} is emptied (overwrite=true)")


def _continue(request: Request, root: Path, run_id: str) -> Plan:
    folder = root / run_id
    if not _is_occupied(folder):
        return Plan(root, run_id)
    if not (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder} holds files but no run (no config.yaml); expected a run folder or none. "
            "Change `run.id` or `run.root`, or remove the folder yourself."
        )
    if not _has_begun(folder):
        return Plan(root, run_id)  # its start failed before the first step: another config spoils nothing
    _refuse_other_config(request, folder)
    if _is_finished(request, folder):
        return Plan(root, run_id, is_finished=True, message=_finished_message(folder))
    return _from_newest(root, run_id)


def _from_newest(root: Path, run_id: str) -> Plan:
    folder = root / run_id
    newest = newest_checkpoint(folder)
    if newest is None:
        return Plan(root, run_id, message=f"{folder} has no checkpoint yet: starting at step 0")
    path, step = newest
    return Plan(root, run_id, path, message=f"continuing {folder} from step {step} ({path.name})")


def _continue_newest(request: Request, is_locked: Callable[[Path], bool]) -> Plan:
    """Looks for the newest unfinished run of this experiment whose config matches.

    A run that reached its own end is not continued because more steps are asked for now, unless it is the
    newest.
    """
    others, matching = [], []
    for folder in sorted(_runs(request.root), key=lambda folder: read_state(folder)["updated"], reverse=True):
        try:
            stored = _stored_config(folder)
        except ConfigError:
            logger.warning("%s/config.yaml cannot be read; that run is passed over", folder)
            continue
        if stored.get("run", {}).get("experiment") != request.experiment or is_locked(folder):
            continue
        differing = _differing(request, stored)
        if differing:
            others.append((folder.name, differing[0][0]))
        elif newest_checkpoint(folder) is not None:
            matching.append(folder)
    for folder in matching:
        is_cut_short = read_state(folder)["status"] != "finished"
        if is_cut_short or (folder == matching[0] and not _is_finished(request, folder)):
            return _from_newest(request.root, folder.name)
    if matching:
        return Plan(request.root, matching[0].name, is_finished=True, message=_finished_message(matching[0]))
    message = f"resume=auto found no run of {request.experiment} to continue: starting a new one"
    if others:
        message += f" ({len(others)} with another config; the newest, {others[0][0]}, differs in {others[0][1]})"
    return Plan(request.root, request.new_id, message=message)


def _continue_named(request: Request, name: str) -> Plan:
    """Continues the run or checkpoint that `resume` names."""
    path, root = Path(name), request.root
    if (root / name / "config.yaml").exists() and path.name == name:
        run_id = name
    elif (path / "config.yaml").exists():
        root, run_id = path.parent, path.resolve().name
        root = path.resolve().parent if path.name != run_id else root
    elif path.exists() and not path.name.startswith("."):
        return _continue_checkpoint(request, path)
    else:
        names = [folder.name for folder in _runs(root)]
        if names:
            raise unknown_choice(f"run in {root}", name, names, "resume")
        raise ConfigError(
            f"resume is {name!r}, but {root} holds no run and no such file exists. Change `resume` or `run.root`."
        )
    _refuse_other_id(request, root, run_id)
    return _continue(request, root, run_id)


def _continue_checkpoint(request: Request, path: Path) -> Plan:
    if checkpoint_step(path) is None:
        raise ConfigError(f"{path} is no checkpoint that can be read; expected a .ckpt of a run. Change `resume`.")
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if (folder / "config.yaml").exists():
        _refuse_other_id(request, folder.parent, folder.name)
        _refuse_other_config(request, folder)
        return Plan(folder.parent, folder.name, path, message=f"continuing {folder} from {path.name}, as given")
    plan = _begin(request, checkpoint=path)
    return Plan(plan.root, plan.run_id, path, clears=plan.clears, message=f"a new run that continues {path}")


def _refuse_other_id(request: Request, root: Path, run_id: str) -> None:
    if request.is_given and request.run_id != run_id:
        raise ConfigError(
            f"`resume` names the run {root / run_id}, `run.id` is {request.run_id!r}; expected one run. "
            "Leave out `run.id` to continue that run, or use init_from=<weights> for a new one."
        )


def _refuse_other_config(request: Request, folder: Path) -> None:
    differing = _differing(request, _stored_config(folder))
    if differing:
        lines = [f"  {key}: {old!r} in the run, {new!r} now" for key, old, new in differing[:12]]
        more = [f"  and {len(differing) - 12} more"] if len(differing) > 12 else []
        raise ConfigError(
            f"{folder} was trained with another config; expected the same one. Differing keys:\n"
            + "\n".join([*lines, *more])
            + "\nUse these values, give another `run.id`, or throw the run away: resume=never overwrite=true."
        )


def _differing(request: Request, stored: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return differing_keys(stored, request.config_of(stored.get("run", {})))


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) for every key that must agree between two starts and does not."""
    before, after = dict(flat(old)), dict(flat(new))
    absent = "absent"
    rows = [
        (key, before.get(key, absent), after.get(key, absent))
        for key in sorted(before.keys() | after.keys())
        if not any(key == ignored or key.startswith(f"{ignored}.") for ignored in IGNORED_KEYS)
    ]
    return [row for row in rows if row[1] != row[2]]


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """Returns the readable checkpoint of a run with the highest global step, and that step; None if there is
    none.

    `best.ckpt` is for evaluation and not looked at. A file that cannot be read (a full disk, a machine that
    died) is passed over with a warning.

    Raises:
        ConfigError: there are checkpoints and none can be read.
    """
    files = [*(folder / "checkpoints").glob("*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]
    files = [path for path in files if not path.stem.startswith("best")]
    steps = {path: checkpoint_step(path) for path in files}
    for path in (path for path, step in steps.items() if step is None):
        logger.warning("%s cannot be read and is passed over", path)
    readable = [(step, path.stem == "last", path) for path, step in steps.items() if step is not None]
    if files and not readable:
        raise ConfigError(
            f"none of the checkpoints in {folder} can be read ({', '.join(path.name for path in files)}); "
            "expected at least "
            "one. Start again with resume=never overwrite=true, or continue another checkpoint with "
            "resume=<path>."
        )
    if not readable:
        return None
    step, _, path = max(readable)
    return path, step


def checkpoint_step(path: Path) -> int | None:
    """Returns the global step of a checkpoint (a file, or a sharded one's folder); None if unreadable."""
    import torch

    source = path / "meta.pt" if path.is_dir() else path
    try:
        content = torch.load(source, weights_only=True, map_location="meta", mmap=True)
        return int(content["global_step"])
    except Exception:  # torch raises whatever the damage leads to: pickle, zip, runtime, OS and key errors
        return None


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the state of a run; a missing or damaged file counts as unfinished at step 0."""
    unknown = {"status": "running", "step": 0, "updated": (folder / "config.yaml").stat().st_mtime}
    try:
        state = json.loads((folder / "state.json").read_text())
        return {**unknown, **state} if isinstance(state, dict) else unknown
    except (OSError, ValueError):
        return unknown


def _has_begun(folder: Path) -> bool:
    """Returns whether anything was trained in a run folder."""
    return read_state(folder)["step"] > 0 or (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def _is_finished(request: Request, folder: Path) -> bool:
    state = read_state(folder)
    return state["status"] == "finished" and state["step"] >= request.max_steps


def _finished_message(folder: Path) -> str:
    return (
        f"{folder} is finished (step {read_state(folder)['step']}): nothing left to do. "
        "Raise trainer.max_steps to train it longer, or give another run.id."
    )


def _stored_config(folder: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        config = str(error).strip().partition("\n")[0]
    if not isinstance(config, dict) or not config:
        raise ConfigError(
            f"{folder}/config.yaml cannot be read ({config or 'it is empty'}); expected the config that this run was "
            "trained with. Put it back, give another `run.id`, or throw the run away: resume=never overwrite=true."
        )
    return {str(key): value for key, value in config.items()}


def _runs(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/config.yaml"))


def _is_occupied(folder: Path) -> bool:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder or nothing. Change `run.id` or `run.root`.")
    return folder.exists() and any(path.name != "lock" for path in folder.iterdir())
