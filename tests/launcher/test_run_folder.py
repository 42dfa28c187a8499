"""The run folder: what is in it, who makes it, who is let in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from callbacks.run_state import write_state
from launcher import ranks
from launcher.run_folder import is_locked, open_run
from longtake.errors import ConfigError
from tests.configs import ROOT, edited


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ranks.RUN_ID, ranks.RUN_PLAN, "LOCAL_RANK", "RANK", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone afterwards
        monkeypatch.delenv(name)


def config(root: Path, **run: Any) -> DictConfig:
    cfg = edited()
    cfg.run.root = str(root)
    for key, value in run.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def test_a_new_run_gets_a_folder_with_its_resolved_config(tmp_path: Path) -> None:
    cfg = config(tmp_path / "outputs")
    run = open_run(cfg)
    assert re.fullmatch(r"ar_chunk3f-\d{8}-\d{6}-[0-9a-f]{4}", run.folder.name)
    assert cfg.run.id == run.folder.name
    assert cfg.run.dir == str(run.folder)
    text = (run.folder / "config.yaml").read_text()
    assert "${" not in text
    stored = OmegaConf.load(run.folder / "config.yaml")
    assert stored.run.id == run.folder.name
    assert stored.callbacks.checkpoint.dirpath == f"{run.folder}/checkpoints"
    assert json.loads((run.folder / "state.json").read_text())["status"] == "running"
    assert not list(run.folder.glob("*.partial"))


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    assert open_run(config(tmp_path)).folder != open_run(config(tmp_path)).folder


def test_a_given_run_id_names_the_folder(tmp_path: Path) -> None:
    assert open_run(config(tmp_path, **{"run.id": "mine"})).folder == tmp_path / "mine"


def test_children_inherit_the_plan_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path)
    run = open_run(cfg)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setenv("LOCAL_RANK", "1")
    child = config(tmp_path)
    joined = open_run(child)
    assert joined.folder == run.folder
    assert child.run.id == cfg.run.id
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_children_continue_from_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _with_checkpoint(tmp_path, step=4)
    run = open_run(config(tmp_path, **{"run.id": folder.name}))
    assert run.checkpoint == folder / "checkpoints" / "last.ckpt"
    (folder / "checkpoints" / "last.ckpt").unlink()  # a child must not look for itself
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert open_run(config(tmp_path, **{"run.id": folder.name})).checkpoint == run.checkpoint


def test_a_refusal_reaches_the_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"run.id": _with_checkpoint(tmp_path, step=4).name, "resume": "never"}
    with pytest.raises(ConfigError, match="overwrite=true"):
        open_run(config(tmp_path, **settings))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="overwrite=true"):
        open_run(config(tmp_path, **settings))


def test_srun_ranks_must_be_told_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _srun(monkeypatch, rank=1)
    with pytest.raises(ConfigError, match=ranks.RUN_ID):
        open_run(config(tmp_path))
    monkeypatch.setenv(ranks.RUN_ID, "job-7")
    run = open_run(config(tmp_path))
    assert run.folder == tmp_path / "job-7"
    assert not run.folder.exists()  # rank 0 makes it


@pytest.mark.parametrize("order", ["before", "after"])
def test_srun_ranks_agree_with_rank_zero_whoever_is_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    folder = _with_checkpoint(tmp_path, step=4)
    cases = {
        "continued": {"run.id": folder.name},
        "new": {"run.id": "new"},
        "emptied": {"run.id": folder.name, "resume": "never", "overwrite": True},
    }
    for name, settings in cases.items():
        found: dict[int, Any] = {}
        for rank in (1, 0) if order == "before" else (0, 1):
            _srun(monkeypatch, rank)
            run = open_run(config(tmp_path, **settings))
            found[rank] = (run.folder, run.checkpoint, run.is_finished)
        assert found[0] == found[1], name


def test_a_requeued_job_continues_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _with_checkpoint(tmp_path, step=4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for rank in (1, 0):
        _srun(monkeypatch, rank)
        monkeypatch.setenv(ranks.RUN_ID, folder.name)
        assert open_run(config(tmp_path)).checkpoint == folder / "checkpoints" / "last.ckpt"


def test_a_finished_run_is_said_to_be_finished(tmp_path: Path) -> None:
    folder = _with_checkpoint(tmp_path, step=300)
    write_state(folder, "finished", 300)
    run = open_run(config(tmp_path, **{"run.id": folder.name}))
    assert run.is_finished
    assert "finished" in run.message


def test_overwrite_empties_the_folder(tmp_path: Path) -> None:
    folder = _with_checkpoint(tmp_path, step=4)
    run = open_run(config(tmp_path, **{"run.id": folder.name, "overwrite": True}))
    assert run.checkpoint is None
    assert not (folder / "checkpoints").exists()
    assert (folder / "config.yaml").exists()


def test_a_place_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="run.root"):
        open_run(config(tmp_path / "file" / "outputs"))


def test_a_run_is_locked_while_a_process_works_on_it(tmp_path: Path) -> None:
    folder = _with_checkpoint(tmp_path, step=4)
    code = "import sys; from launcher.run_folder import _locked; from pathlib import Path\n"
    code += "held = _locked(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        assert is_locked(folder)
        with pytest.raises(ConfigError, match="another process"):
            open_run(config(tmp_path, **{"run.id": folder.name}))
        process.stdin.close()
        process.wait(timeout=30)
    assert not is_locked(folder)


def _with_checkpoint(root: Path, step: int) -> Path:
    folder = open_run(config(root, **{"run.id": "old"})).folder
    (folder / "checkpoints").mkdir()
    torch.save({"global_step": step}, folder / "checkpoints" / "last.ckpt")
    return folder


def _srun(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name in (ranks.RUN_PLAN, ranks.RUN_ID):  # srun's processes share no environment
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
