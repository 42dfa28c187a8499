"""Callbacks by themselves; how they work together is in tests/test_train.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.checkpoint import AtomicCheckpointIO
from callbacks.metrics_file import MetricsFile
from callbacks.progress import ProgressLines, progress_bar
from callbacks.run_state import RunState
from callbacks.weights_export import WeightsExport
from longtake.errors import ConfigError, DataError


def trainer(**changes: Any) -> Any:
    plain = {"global_step": 0, "max_steps": 10, "is_global_zero": True, "sanity_checking": False, "optimizers": []}
    metrics = {"train/loss": torch.tensor(0.5), "val/loss": torch.tensor(0.25)}
    return SimpleNamespace(**{**plain, "callback_metrics": metrics, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(callback: Any, steps: list[int], **changes: Any) -> None:
    callback.on_train_start(trainer(global_step=0, **changes), None)
    for step in steps:
        callback.on_train_batch_end(trainer(global_step=step, **changes), None, None, None, 0)


def test_metrics_have_a_line_for_each_optimiser_step_not_each_batch(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(MetricsFile(str(path)), [0, 1, 1, 2])  # as with accumulate_grad_batches=2
    assert lines(path) == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.5}]


def test_metrics_follow_the_logging_interval(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(MetricsFile(str(path), every_n_steps=3), [1, 2, 3, 4, 5, 6])
    assert [line["step"] for line in lines(path)] == [3, 6]


def test_a_second_start_leaves_a_mark_also_at_step_0(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(MetricsFile(str(path)), [1])
    train(MetricsFile(str(path)), [])
    MetricsFile(str(path)).on_train_start(trainer(global_step=7), None)  # type: ignore[arg-type]
    assert [line for line in lines(path) if "resumed_from_step" in line] == [
        {"resumed_from_step": 0},
        {"resumed_from_step": 7},
    ]


def test_metrics_stay_json_when_training_explodes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(MetricsFile(str(path)), [1], callback_metrics={"train/loss": torch.tensor(float("nan"))})
    assert lines(path) == [{"step": 1, "train/loss": "nan"}]


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    train(MetricsFile(str(tmp_path / "metrics.jsonl")), [1, 2], is_global_zero=False)
    RunState(str(tmp_path)).on_train_start(trainer(is_global_zero=False), None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_finished_only_at_its_last_step(tmp_path: Path) -> None:
    state = RunState(str(tmp_path))
    for step, expected in ((4, "running"), (10, "finished")):
        state.on_train_start(trainer(global_step=step), None)  # type: ignore[arg-type]
        state.on_fit_end(trainer(global_step=step), None)  # type: ignore[arg-type]
        written = json.loads((tmp_path / "state.json").read_text())
        assert (written["status"], written["step"]) == (expected, step)


def test_progress_lines_come_seldom(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "longtake"):
        train(ProgressLines(every_seconds=3600), [1, 2, 3, 10])
    assert [record.getMessage()[:9] for record in caplog.records] == ["step 1/10", "step 10/1"]
    assert "left" in caplog.records[-1].getMessage()


def test_without_a_terminal_there_are_lines() -> None:
    assert isinstance(progress_bar(), ProgressLines)


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"global_step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"global_step": 2, "bad": lambda: None}, path)
    assert io.load_checkpoint(path)["global_step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"global_step": 1}, tmp_path / "last.ckpt")

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match=r"last\.ckpt cannot be written \((No space|file write)"):
        io.save_checkpoint({"global_step": 2}, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert io.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


def test_reading_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"x": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="[Ww]eights"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_a_figure_to_export_by_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    export = WeightsExport(str(tmp_path / "w.safetensors"), monitor="val/lss")
    validated = trainer(callback_metrics={"val/loss": 1.0, "train/loss": 2.0})
    with pytest.raises(ConfigError, match=r"unknown figure of validation 'val/lss'; expected one of: val/loss\."):
        export.on_validation_end(validated, None)  # type: ignore[arg-type]
