"""Turns an exception into a message on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.compose import explain
from launcher.ranks import is_rank_zero, rank_name
from longtake.errors import ConfigError, DataError

USER_ERROR, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143

# what lowers the memory that a run needs, in the order in which one would try it
_MEMORY_KEYS = (
    "data.batch_size",
    "video.num_frames",
    "objective.num_chunks",
    "objective.noise_repeats",
    "video.height",
    "video.width",
    "network.dim",
    "network.num_layers",
    "data.num_workers",
    "trainer.precision",
)
_MEMORY_KEYS_OF_PREDICT = ("num_samples", "rollout.guidance", "precision")


class JobFailed(RuntimeError):
    """One job of a multirun failed and has already said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def report(error: BaseException, cfg: DictConfig | None) -> int:
    """Writes what a user needs to know about `error`, and returns the exit code.

    Args:
        error: whatever came out of the task.
        cfg: the config that it ran with, to name the keys that lower memory; None if there is none.
    """
    if isinstance(error, SystemExit):
        return _exit_code(error)
    if isinstance(error, KeyboardInterrupt):
        _write("interrupted")
        return INTERRUPTED
    if isinstance(error, JobFailed):
        return error.code
    if (found := _cause(error, ConfigError)) is not None:
        if is_rank_zero():  # every rank finds the same mistake; one of them says it
            _write(f"error: {found}")
        return USER_ERROR
    if (found := _cause(error, DataError)) is not None:
        _write(f"error: {_without_worker_traceback(found)}")
        return FAILURE
    if isinstance(error, InstantiationException) and _is_misconfiguration(error.__cause__):
        _write(f"error: {error.__cause__} {str(error).splitlines()[-1]}")
        return USER_ERROR
    if (found := _out_of_memory(error)) is not None:
        _write(f"error: {_memory_message(found, cfg)}")
        return FAILURE
    if (full := _full_disk(error)) is not None:
        place = f"{full.filename} cannot be written" if full.filename else "a file cannot be written"
        _write(f"error: {place}: {full.strerror}. Free some space, or write elsewhere (`run.root`, `output_dir`).")
        return FAILURE
    traceback.print_exception(error)
    _write(f"error: {type(error).__name__}: {error}")
    return FAILURE


def explained(
    error: BaseException, config_name: str, overrides: Sequence[str], config_dir: str | Path
) -> BaseException:
    """Returns our error for what could not be composed, and any other exception as it is."""
    composing = isinstance(error, HydraException | OmegaConfBaseException)
    if composing and not isinstance(error, InstantiationException):
        assert isinstance(error, Exception)
        try:
            return explain(error, config_name, overrides, config_dir)
        except ConfigError as another:  # found while looking for the names of unknown keys
            return another
    if isinstance(error, ValueError) and str(error).startswith(("Only one of --", "The --resolve flag")):
        return ConfigError(str(error))
    return error


def _write(message: str) -> None:
    sys.stderr.write(f"{rank_name()}{message}\n")
    sys.stderr.flush()


def _exit_code(error: SystemExit) -> int:
    if type(error).__name__ == "SIGTERMException":  # Lightning's; it would exit with 0
        _write("terminated")
        return TERMINATED
    if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
        return INTERRUPTED
    if isinstance(error.code, str):
        _write(error.code)
        return FAILURE
    return error.code or 0


def _cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__
    return None


def _without_worker_traceback(error: BaseException) -> str:
    """A torch worker process sends its traceback as text; only its last sentence is meant for the user."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if "Original Traceback" in text else text


def _is_misconfiguration(error: BaseException | None) -> bool:
    is_unknown_argument = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
    return is_unknown_argument or type(error).__name__ == "MisconfigurationException"


def _full_disk(error: BaseException | None) -> OSError | None:
    """Returns what says that a disk is full or cannot be written to; files under way have removed themselves."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return error
        error = error.__cause__ or error.__context__
    return None


def _out_of_memory(error: BaseException) -> BaseException | None:
    """Looks without importing torch, which scripts about data never load."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MemoryError) or type(found).__name__ == "OutOfMemoryError":
            return found
        if isinstance(found, RuntimeError) and "can't allocate memory" in str(found):
            return found
        found = found.__cause__
    return None


def _memory_message(error: BaseException, cfg: DictConfig | None) -> str:
    candidates = _MEMORY_KEYS_OF_PREDICT if cfg is not None and "ckpt" in cfg else _MEMORY_KEYS
    keys = [key for key in candidates if cfg is not None and OmegaConf.select(cfg, key) is not None]
    settings = [f"{key} (now {OmegaConf.select(cfg, key)})" for key in keys] if cfg is not None else []
    advice = f" Lower one of: {', '.join(settings)}." if settings else ""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    return f"out of memory: {reason}. Peak so far: {_peak_memory()}.{advice}"


def _peak_memory() -> str:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.current_device()
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} of {total / 2**30:.2f} GiB on cuda:{device}"
    if os.name == "nt":
        return "unknown"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB in this process"
