"""Which of several processes this one is, and how global rank 0 tells the others what it decided.

Processes come into being in four ways: alone; as children of Lightning's launcher, which inherit the
environment; under torchrun, all at once beside a key-value store; under srun, all at once with nothing but
the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from longtake.errors import ConfigError

RUN_ID = "LONGTAKE_RUN_ID"  # the name of the run; set at submission or by rank 0
RUN_PLAN = "LONGTAKE_RUN_PLAN"  # what rank 0 decided, as JSON, for the processes that it starts

_STORE_KEY = "longtake/run_plan"
_STORE_TIMEOUT = timedelta(seconds=300)
_store: Any = None  # kept for the life of the process: rank 0 may be the one that serves it


def global_rank(env: Mapping[str, str] = os.environ) -> int:
    """Returns this process's rank among all processes of the job, 0 if it is alone."""
    if "RANK" in env:
        return int(env["RANK"])
    if "LOCAL_RANK" in env:  # Lightning's launcher: only whether it is 0 matters, and the node size is unknown
        return int(env["LOCAL_RANK"]) + (1000 * int(env.get("NODE_RANK", env.get("GROUP_RANK", "0"))))
    if _under_srun(env):
        return int(env.get("SLURM_PROCID", "0"))
    return 0


def is_rank_zero(env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether this process is the one that makes the run folder and writes to it."""
    return global_rank(env) == 0


def rank_name(env: Mapping[str, str] = os.environ) -> str:
    """Returns the prefix of a message from another rank than 0, else nothing."""
    rank = global_rank(env)
    return f"[rank {rank}] " if rank else ""


def is_restart(env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the scheduler started this job before: a SLURM requeue or a restart by torchrun."""
    return int(env.get("SLURM_RESTART_COUNT") or 0) > 0 or int(env.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def cannot_ask(env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether srun started several processes, which have nothing but the environment in common."""
    return not has_store(env) and _under_srun(env) and int(env["SLURM_NTASKS"]) > 1


def has_store(env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether rank 0 can tell processes that it did not start itself what it decided."""
    return "RANK" in env and "TORCHELASTIC_RUN_ID" in env and int(env.get("WORLD_SIZE", "1")) > 1


def publish(plan: dict[str, Any], env: Mapping[str, str] = os.environ) -> None:
    """Tells the other ranks what rank 0 decided: through torchrun's store or the inherited environment."""
    text = json.dumps(plan)
    if has_store(env):
        _connect(env).set(_STORE_KEY, text)
    else:
        os.environ[RUN_PLAN] = text


def receive(env: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Returns what rank 0 decided, waiting for it under torchrun; None where it cannot be known (srun).

    Raises:
        ConfigError: rank 0 did not answer.
    """
    if has_store(env):
        try:
            return json.loads(_connect(env).get(_STORE_KEY))
        except RuntimeError as error:
            raise ConfigError(
                f"rank {global_rank(env)} heard nothing from rank 0 within {_STORE_TIMEOUT.seconds} s. "
                "Rank 0 failed (see its message) or cannot be reached; giving `run.id` removes the need to "
                "ask."
            ) from error
    return json.loads(env[RUN_PLAN]) if RUN_PLAN in env else None


def _under_srun(env: Mapping[str, str]) -> bool:
    """SLURM variables also stand in the shell of an interactive job, where nothing was started by srun."""
    return "SLURM_NTASKS" in env and "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _connect(env: Mapping[str, str]) -> Any:
    """torchrun's agent serves the store, a fresh one after each restart; where it does not, rank 0 has to."""
    global _store
    if _store is None:
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            is_master=not served and global_rank(env) == 0,
            timeout=_STORE_TIMEOUT,
            multi_tenant=True,
        )
        _store = PrefixStore("longtake", store)
    return _store
