"""The way in: exit codes, multirun, and that Hydra's own flags keep their meaning."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launcher.entry import run
from longtake.errors import ConfigError, DataError
from tests.configs import EXTRA_CONF, TINY


class Task:
    """Notes the configs that it is called with, and does as `network.dim` says."""

    def __init__(self) -> None:
        self.seen: list[DictConfig] = []
        self.in_hydra: list[bool] = []

    def __call__(self, cfg: DictConfig) -> int | None:
        self.seen.append(cfg)
        self.in_hydra.append(HydraConfig.initialized())
        errors = {91: ConfigError("wish"), 92: DataError("data"), 93: KeyError("bug"), 94: KeyboardInterrupt()}
        if cfg.network.dim in errors:
            raise errors[cfg.network.dim]
        return 7 if cfg.network.dim == 95 else None


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., int]]:
    def call(task: Task, *words: str, data: bool = True) -> int:
        base = ["--config-dir", str(EXTRA_CONF), f"run.root={tmp_path}"]
        base += TINY if data else ["experiment=ar_chunk3f"]
        monkeypatch.setattr(sys, "argv", ["train.py", *base, *words])
        try:
            return run(task, "train")
        except SystemExit as exit:
            return int(exit.code or 0)

    handlers = logging.getLogger().handlers.copy()
    yield call
    logging.getLogger().handlers[:] = handlers  # Hydra's --info leaves one behind


def test_a_plain_run_composes_without_hydras_job_state(call: Callable[..., int]) -> None:
    task = Task()
    assert call(task, "network.dim=5", "seed=3") == 0
    assert (task.seen[0].network.dim, task.seen[0].seed) == (5, 3)
    assert task.seen[0].run.experiment == "ar_chunk3f"
    assert task.in_hydra == [False]


@pytest.mark.parametrize(("width", "code"), [(91, 2), (92, 1), (93, 1), (94, 130), (95, 7), (5, 0)])
def test_exit_codes(call: Callable[..., int], width: int, code: int) -> None:
    assert call(Task(), f"network.dim={width}") == code


@pytest.mark.parametrize("word", ["foo=1", "data=dom", "nonsense", "trainer.max_steps=many", "seed=1,2"])
def test_a_users_mistake_exits_with_2_before_the_task_runs(
    call: Callable[..., int], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task()
    assert call(task, word) == 2
    assert task.seen == []
    written = capsys.readouterr().err
    assert written.startswith("error: ")
    assert "Traceback" not in written


def test_help_and_cfg_are_hydras(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    task = Task()
    assert call(task, "--help") == 0
    text = capsys.readouterr().out
    assert "python train.py experiment=ar_chunk3f" in text
    assert "strategy: ddp, single" in text
    assert call(task, "--cfg", "job", "network.dim=5") == 0
    assert "dim: 5" in capsys.readouterr().out
    assert call(task, "--cfg", "job", "--resolve", "--package", "module") == 0
    assert "action_dim: 3" in capsys.readouterr().out
    assert call(task, "--info", "defaults") == 0
    assert task.seen == []


def test_flags_that_contradict_each_other_are_a_users_mistake(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(Task(), "--cfg", "job", "-m") == 2
    assert "error: Only one of" in capsys.readouterr().err


def test_cfg_with_an_unknown_key_is_our_error(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(Task(), "--cfg", "job", "network.dmi=5") == 2
    assert "network.dim" in capsys.readouterr().err


def test_multirun_gives_every_job_its_own_run(call: Callable[..., int]) -> None:
    task = Task()
    assert call(task, "-m", "seed=1,2") == 0
    assert [cfg.seed for cfg in task.seen] == [1, 2]
    first, second = (cfg.run.id for cfg in task.seen)
    assert first.endswith("-0")
    assert second.endswith("-1")
    assert first[:-2] == second[:-2]
    assert first.startswith("ar_chunk3f-")
    assert task.in_hydra == [True, True]


def test_multirun_numbers_a_given_run_id(call: Callable[..., int]) -> None:
    task = Task()
    assert call(task, "seed=1,2", "-m", "run.id=sweep") == 0
    assert [cfg.run.id for cfg in task.seen] == ["sweep-0", "sweep-1"]


def test_multirun_runs_all_jobs_and_exits_as_the_first_failure(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task()
    assert call(task, "-m", "network.dim=5,91,92,6") == 2
    assert [cfg.network.dim for cfg in task.seen] == [5, 91, 92, 6]
    written = capsys.readouterr().err
    assert "error: wish" in written
    assert "error: data" in written
    assert "Traceback" not in written


def test_ctrl_c_ends_the_whole_multirun(call: Callable[..., int]) -> None:
    task = Task()
    assert call(task, "-m", "network.dim=94,5") == 130
    assert len(task.seen) == 1


@pytest.mark.parametrize("words", [("network.dim=5,6", "foo=1"), ("network.dmi=5,6",)])
def test_multirun_with_an_unknown_key_is_our_error(
    call: Callable[..., int], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task()
    assert call(task, "-m", *words) == 2
    assert task.seen == []
    assert "unknown key" in capsys.readouterr().err
