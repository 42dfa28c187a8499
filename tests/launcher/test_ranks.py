"""Which process is which, and how rank 0 tells the others what it decided."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import ranks
from tests.configs import ROOT

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("env", "is_zero"),
    [
        ({}, True),
        (TORCHRUN, False),
        ({**TORCHRUN, "RANK": "0"}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "2"}, False),
        (SRUN, False),
        ({**SRUN, "SLURM_PROCID": "0"}, True),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, True),  # a shell inside an interactive job
    ],
)
def test_rank_zero(env: dict[str, str], is_zero: bool) -> None:
    assert ranks.is_rank_zero(env) is is_zero


def test_restarts_are_known() -> None:
    assert not ranks.is_restart({"SLURM_RESTART_COUNT": "0"})
    assert not ranks.is_restart({"SLURM_RESTART_COUNT": ""})
    assert ranks.is_restart({"SLURM_RESTART_COUNT": "1"})
    assert ranks.is_restart({"TORCHELASTIC_RESTART_COUNT": "2"})


def test_only_srun_leaves_ranks_without_a_way_to_ask() -> None:
    assert ranks.cannot_ask(SRUN)
    assert not ranks.cannot_ask({**SRUN, "SLURM_NTASKS": "1"})
    assert not ranks.cannot_ask({**SRUN, **TORCHRUN})
    assert not ranks.cannot_ask({})


def test_children_read_the_inherited_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.RUN_PLAN, "")
    ranks.publish({"run_id": "a"}, env={})
    assert ranks.receive() == {"run_id": "a"}
    assert ranks.receive(env={}) is None


WORKER = """
import json, os, sys, time
from pathlib import Path
from launcher import ranks

rank = ranks.global_rank()
if ranks.is_rank_zero():
    time.sleep(1)  # the other rank has to wait
    ranks.publish({"run_id": f"made-by-{os.getpid()}"})
    told = {"run_id": f"made-by-{os.getpid()}"}
else:
    told = ranks.receive()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps({**told, "zero": ranks.is_rank_zero()}))
"""


def test_torchrun_ranks_hear_from_rank_zero_through_the_store(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        cwd=ROOT,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["run_id"] == second["run_id"]
    assert (first["zero"], second["zero"]) == (True, False)


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith(("LONGTAKE", "TORCHELASTIC"))}
