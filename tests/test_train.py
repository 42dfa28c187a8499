"""`train.py` from the command line to the run folder, on clips made up on the spot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import train
from launcher import ranks
from launcher.entry import run
from longtake.media.read import probe_video
from tests.configs import EXTRA_CONF, ROOT, TINY

BASE = ["--config-dir", str(EXTRA_CONF), *TINY, "trainer=cpu"]
SCHEDULES = (
    "callbacks.curriculum.schedules=[{key: objective.num_chunks, points: [[0, 1], [3, 2]]}, "
    "{key: objective.context_noise, kind: linear, points: [[0, 0.0], [8, 0.2]]}, "
    "{key: optimizer.lr, kind: linear, points: [[0, 0.001], [8, 0.0001]]}]"
)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs train.py in this process and returns its exit code."""
    for name in (ranks.RUN_ID, ranks.RUN_PLAN):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone afterwards
        monkeypatch.delenv(name)

    def fit(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *BASE, f"run.root={tmp_path}", *words])
        return run(train.main, "train")

    return fit


def command_line(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *BASE, *words]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LONGTAKE", "PL_"))}
    return {**kept, "OMP_NUM_THREADS": "1"}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Returns train/loss by step; for a step that stands there twice the later line counts."""
    return {line["step"]: line["train/loss"] for line in metrics(folder) if "train/loss" in line}


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_leaves_everything_that_its_folder_promises(fit: Any, tmp_path: Path) -> None:
    assert fit("run.id=a", "trainer.max_steps=5", "trainer.val_check_interval=2", "logger=[tensorboard,csv]") == 0
    folder = tmp_path / "a"
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics(folder) if "val/loss" in line] == [2, 4]
    assert json.loads((folder / "state.json").read_text())["status"] == "finished"
    saved = checkpoint(folder)
    assert saved["global_step"] == saved["ema_updates"] == 5  # no multiple of every_n_train_steps: the end is saved
    assert saved["config"]["network"]["dim"] == 16
    assert saved["config"]["run"]["id"] == "a"
    assert OmegaConf.load(folder / "config.yaml").run.id == "a"
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] in (2, 4)
    weights = load_file(folder / "weights.safetensors")
    assert all(torch.equal(weights[name], best["state_dict"][f"ema_network.{name}"]) for name in weights)
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "csv" / "version_0" / "metrics.csv").exists()
    samples = folder / "samples" / "step_0000005"
    assert sorted(path.name for path in samples.iterdir()) == ["grid.mp4", "grid.png"]
    assert probe_video(samples / "grid.mp4").num_frames == 21
    assert Image.open(samples / "grid.png").size[0] > 500
    assert not list(folder.rglob("*.partial"))


def test_a_run_without_a_logger_trains(fit: Any, tmp_path: Path) -> None:
    assert fit("run.id=a", "trainer.max_steps=1", "logger=[]") == 0
    assert sorted(losses(tmp_path / "a")) == [1]


def test_the_end_says_where_to_look(fit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="longtake"):
        assert fit("run.id=a", "trainer.max_steps=8", "callbacks.throughput.warmup_steps=1") == 0
    text = caplog.records[-1].getMessage()
    folder = tmp_path / "a"
    assert text.startswith("trained to step 8. Where to look next:")
    assert f"{folder}/samples/step_0000008/grid.mp4" in text
    assert f"python predict.py ckpt={folder} num_frames=81" in text
    assert "matmuls reach here" in text
    assert "trainer.max_steps=16" in text


def test_resume_equals_no_interruption(fit: Any, tmp_path: Path) -> None:
    settings = ["trainer.val_check_interval=4", "callbacks.checkpoint.every_n_train_steps=4", "data.num_workers=1"]
    settings.append(SCHEDULES)
    assert fit("run.id=whole", "trainer.max_steps=9", *settings) == 0
    assert fit("run.id=parts", "trainer.max_steps=3", *settings) == 0
    assert fit("run.id=parts", "trainer.max_steps=6", *settings) == 0
    assert fit("trainer.max_steps=9", "resume=auto", *settings) == 0  # finds it: nothing newer is unfinished
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert losses(parts) == losses(whole)
    assert [line["resumed_from_step"] for line in metrics(parts) if "resumed_from_step" in line] == [3, 6]
    assert_equal(checkpoint(whole), checkpoint(parts))
    one, other = (checkpoint(folder)["optimizer_states"][0]["state"] for folder in (whole, parts))
    for index, state in one.items():
        assert state.keys() == other[index].keys()
        assert all(torch.equal(value, other[index][key]) for key, value in state.items())
    assert (
        checkpoint(whole)["lr_schedulers"][0]["last_epoch"] == checkpoint(parts)["lr_schedulers"][0]["last_epoch"] == 9
    )


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two checkpoints hold the same weights and the same average, bit for bit."""
    assert first["ema_updates"] == second["ema_updates"] == first["global_step"]
    assert any(name.startswith("ema_network.") for name in first["state_dict"])
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_a_finished_run_is_not_trained_again(fit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fit("run.id=a", "trainer.max_steps=2") == 0
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert fit("run.id=a", "trainer.max_steps=2") == 0
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before
    assert "nothing left to do" in caplog.text
    assert fit("run.id=a", "trainer.max_steps=2", "network.dim=8") == 2


def test_a_run_begins_with_given_weights(fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run.id=a", "trainer.max_steps=3") == 0
    weights = tmp_path / "a" / "checkpoints" / "last.ckpt"
    # a learning rate that is too small to change anything keeps what was loaded
    assert fit("run.id=b", "trainer.max_steps=1", f"init_from={weights}", "optimizer.lr=1e-30", "seed=7") == 0
    loaded = checkpoint(tmp_path / "b")
    assert loaded["global_step"] == 1
    average = load_file(tmp_path / "a" / "weights.safetensors")  # of a run, its average is taken
    for name, value in average.items():
        assert torch.equal(value, loaded["state_dict"][f"network.{name}"]), name
    capsys.readouterr()
    assert fit("run.id=c", f"init_from={weights}", "network.dim=8") == 2
    assert "init_from" in capsys.readouterr().err


def test_data_that_does_not_fit_the_model_is_refused(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("run.id=a", "module.action_dim=4") == 2
    assert "4 action columns, the data has 3" in capsys.readouterr().err


@pytest.mark.parametrize("debug", ["fast", "overfit", "profiler", "anomaly"])
def test_every_debug_choice_runs(fit: Any, debug: str) -> None:
    assert fit("run.id=a", f"debug={debug}", "trainer.max_steps=2") == 0


@pytest.mark.parametrize("scheduler", ["warmup_constant", "warmup_cosine"])
def test_every_scheduler_runs(fit: Any, tmp_path: Path, scheduler: str) -> None:
    assert fit("run.id=a", f"scheduler={scheduler}", "scheduler.warmup_steps=2", "trainer.max_steps=4") == 0
    rates = [line["lr/0"] for line in metrics(tmp_path / "a") if "lr/0" in line]
    assert 0 < rates[0] < rates[1] <= 8e-3


def test_two_processes_equal_one(fit: Any, tmp_path: Path) -> None:
    adamw = "optimizer=adamw"  # Muon iterates in bfloat16, which makes more of the order of a sum than 1e-6
    assert fit("run.id=one", "trainer.max_steps=4", "data.batch_size=4", "trainer.val_check_interval=4", adamw) == 0
    two = ["run.id=two", "trainer.max_steps=4", "data.batch_size=2", "strategy=ddp", "trainer.devices=2", adamw]
    done = subprocess.run(
        command_line(f"run.root={tmp_path}", *two, "trainer.val_check_interval=4"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]  # both processes share one folder
    one, other = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(other, rel=1e-5)
    weights = checkpoint(tmp_path / "two")["state_dict"]
    for name, value in checkpoint(tmp_path / "one")["state_dict"].items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6)
    assert len([line for line in metrics(tmp_path / "two") if "val/loss" in line]) == 1


def test_a_killed_run_goes_on_from_its_last_checkpoint(fit: Any, tmp_path: Path) -> None:
    settings = ["callbacks.checkpoint.every_n_train_steps=2", "trainer.val_check_interval=1000", SCHEDULES]
    endless = command_line(f"run.root={tmp_path}", "trainer.max_steps=1000000", *settings)
    with subprocess.Popen(endless, env=environment(), stderr=subprocess.DEVNULL) as process:
        _wait_for(lambda: list(tmp_path.glob("*/checkpoints/last.ckpt")))
        process.kill()
    (folder,) = tmp_path.iterdir()
    reached = checkpoint(folder)["global_step"]
    total = f"trainer.max_steps={reached + 3}"
    assert fit("resume=auto", total, *settings) == 0
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {"resumed_from_step": reached} in metrics(folder)
    assert fit("run.id=whole", total, *settings) == 0
    assert losses(folder) == losses(tmp_path / "whole")
    assert_equal(checkpoint(folder), checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_its_exit_code(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = command_line(f"run.root={tmp_path}", "trainer.max_steps=1000000", "trainer.val_check_interval=1000000")

    def hear() -> None:  # what a shell runs in the background ignores SIGINT, and so would all that the tests start
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        try:
            _wait_for(lambda: list(tmp_path.glob("*/metrics.jsonl")))
            process.send_signal(number)
            _, written = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, written
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "state.json").read_text())["status"] == "running"


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["experiment=nope"], "ar_chunk3f"), (["trainer.max_steps=0"], "trainer.max_steps"), (["foo=1"], "foo")],
)
def test_mistakes_exit_with_2_and_make_no_folder(tmp_path: Path, words: list[str], expected: str) -> None:
    done = subprocess.run(
        command_line(f"run.root={tmp_path}/outputs", *words),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_torchrun_without_a_run_id_trains_one_run_and_continues_it(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [f"run.root={tmp_path}", "strategy=ddp", "trainer.devices=2"]
    for steps, more in (("trainer.max_steps=2", []), ("trainer.max_steps=4", ["resume=auto"])):
        done = subprocess.run(
            [*torchrun, str(ROOT / "train.py"), *BASE, *words, steps, *more],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert sorted(losses(folder)) == [1, 2, 3, 4]


def _wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
