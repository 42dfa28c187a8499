"""Rules over several keys: each refuses what it should, names the key, and lets the default pass."""

from __future__ import annotations

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from launcher.check_config import check_config, num_devices
from longtake.errors import ConfigError
from tests.configs import edited

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds where there is no GPU")


def test_the_default_passes() -> None:
    check_config(edited())


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["seed=-1"], "seed"),
        (["seed=abc"], "seed"),
        (["data.batch_size=0"], "data.batch_size"),
        (["data.num_workers=-1"], "data.num_workers"),
        (["trainer.max_steps=0"], "trainer.max_steps"),
        (["trainer.max_steps=-1"], "trainer.max_steps"),
        (["trainer.log_every_n_steps=0"], "trainer.log_every_n_steps"),
        (["callbacks.checkpoint.every_n_train_steps=0"], "callbacks.checkpoint.every_n_train_steps"),
        (["overwrite=yes_please"], "overwrite"),
        (["video.height=9"], "video.height"),
        (["video.width=0"], "video.width"),
        (["video.num_frames=6"], "video.num_frames"),
        (["video.num_frames=1"], "video.num_frames"),
        (["video.fps=0"], "video.fps"),
        (["video.fps=fast"], "video.fps"),
        (["video.fps=1/0"], "video.fps"),
        (["optimizer.lr=0"], "optimizer.lr"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val"),
        (["trainer.precision=8"], "trainer.precision"),
        (["trainer=cpu", "trainer.precision=16-mixed"], "trainer.precision"),
        (["trainer=cpu", "trainer.devices=2"], "strategy=ddp"),
        (["trainer=cpu", "trainer.devices=[0,1]", "strategy=ddp"], "trainer.devices"),
        (["trainer.devices=0"], "trainer.devices"),
        (["trainer.devices=some"], "trainer.devices"),
        (["trainer.accelerator=tpu"], "trainer.accelerator"),
        (["run.id=a/b"], "run.id"),
        (["run.id=../up"], "run.id"),
        (["run.id=auto"], "run.id"),
        (["run.id=7"], "run.id"),
        (["resume=true"], "resume"),
        (["init_from=/no/such/file.ckpt"], "init_from"),
        (["init_from=/no/such/file.ckpt", "resume=some_run"], "init_from"),
        (["video.num_frames=17"], "video.chunk_lat"),
        (["seed=99999999999"], "seed"),
        (["network.mixer.window=0"], "network.mixer.window"),
        (["network.mixer.window=-1"], "network.mixer.window"),
        (["network.dim=15"], "network.dim"),
        (["network.dim=0"], "network"),
        (["network.dim=-16"], "network"),
        (["optimizer.lr=inf"], "optimizer.lr"),
        (["optimizer.betas=[2,3]"], "optimizer"),
        (["optimizer.weight_decay=-1"], "optimizer"),
        (["optimizer.momentum=2"], "optimizer.momentum"),
        (["scheduler.warmup_steps=-1"], "scheduler.warmup_steps"),
        (["trainer.val_check_interval=0"], "trainer.val_check_interval"),
        (["trainer.val_check_interval=0.5"], "trainer.val_check_interval"),
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches"),
        (["trainer.limit_val_batches=-1"], "trainer.limit_val_batches"),
        (["trainer.max_time=soon"], "trainer.max_time"),
        (["callbacks.ema.decay=1.5"], "callbacks.ema.decay"),
        (["callbacks.checkpoint.keep_every_n_steps=0"], "callbacks.checkpoint.keep_every_n_steps"),
        (["callbacks.throughput.every_n_steps=0"], "callbacks.throughput"),
        (["callbacks.video_grid.num_frames=-1"], "callbacks.video_grid"),
        (["callbacks.video_grid.num_frames=9"], "callbacks.video_grid.num_frames"),
        (["callbacks.weights_export.dtype=int8"], "callbacks.weights_export.dtype"),
        (["objective.num_chunks=5"], "objective.num_chunks"),
        (["rollout.num_steps=0"], "rollout.num_steps"),
        (["rollout=one_shot"], "rollout=one_shot"),
        (["module.num_context_frames=4"], "num_context_frames"),
        (["trainer.precision=bf16-true"], "callbacks.ema.enabled"),
        (["callbacks.curriculum.schedules=[{key: objective.chunks, points: [[0, 1]]}]"], "objective.num_chunks"),
        (["callbacks.curriculum.schedules=[{key: objective.num_chunks, points: [[0, 0]]}]"], "objective.num_chunks"),
        (["trainer=cpu", "strategy=ddp", "trainer.devices=2", "objective.num_chunks=1"], "find_unused_parameters"),
    ],
)
def test_a_setting_that_cannot_work_names_its_key(overrides: list[str], key: str) -> None:
    cfg = edited(*overrides)
    with pytest.raises(ConfigError, match="expected|Set strategy|Change") as caught:
        check_config(cfg)
    assert key in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(edited("trainer.max_steps=0", "video.height=7", "optimizer.lr=-1"))
    assert all(key in str(caught.value) for key in ("trainer.max_steps", "video.height", "optimizer.lr"))


def test_the_nearest_legal_frame_counts_are_named() -> None:
    with pytest.raises(ConfigError, match="97 or 101"):
        check_config(edited("video.num_frames=98"))


@on_cpu
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 GPUs and 0 are there"):
        check_config(edited("trainer=gpu"))


def test_the_table_of_a_strategy_decides() -> None:
    cfg = edited("trainer=cpu")
    cfg.strategy.supports.precisions = ["bf16-mixed"]
    cfg.strategy.supports.gradient_clip = ["value"]
    cfg.strategy.supports.accelerators = ["gpu"]
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    text = str(caught.value)
    assert "32-true" in text
    assert "gradient_clip_algorithm" in text
    assert "runs on the cpu" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [("1", 1), ("4", 4), ("'2'", 2), ("[0,1,2]", 3), ("auto", 1), ("-1", 1), ("nonsense", None), ("2.5", None)],
)
def test_num_devices(override: str, expected: int | None) -> None:
    assert num_devices(edited("trainer=cpu", f"trainer.devices={override}")) == expected


def test_torchrun_must_start_as_many_processes_as_there_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes"):
        check_config(edited("trainer=cpu", "trainer.devices=2", "strategy=ddp"))
    check_config(edited("trainer=cpu", "trainer.devices=4", "strategy=ddp"))


def test_a_local_multirun_uses_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
    now = OmegaConf.create({"mode": RunMode.MULTIRUN, "launcher": launcher})
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: now))
    check_config(edited("trainer=cpu", "strategy=ddp"))
    with pytest.raises(ConfigError, match="-m"):
        check_config(edited("trainer=cpu", "trainer.devices=2", "strategy=ddp"))


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ("{key: objective.num_chunks, points: 5}", "has points"),
        ("{key: objective.num_chunks, points: [[true, 1]]}", "has points"),
        ("{key: objective.num_chunks, points: [[0, abc]]}", "num_chunks='abc'"),
        ("{key: objective.num_chunks, points: [[0, 1.5]]}", "num_chunks=1.5"),
        ("{key: objective.num_chunks, points: [[0, 1], [5, 99]]}", "num_chunks is 99"),
        ("{key: optimizer.betas, points: [[0, 1]]}", "betas=1"),
        (
            "{key: objective.num_chunks, points: [[0, 1]]}, {key: objective.num_chunks, points: [[0, 2]]}",
            "two schedules",
        ),
        ("{key: objective._target_, points: [[0, os.system]]}", "unknown key to schedule"),
    ],
)
def test_each_value_of_a_schedule_must_be_possible(schedule: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_config(edited(f"callbacks.curriculum.schedules=[{schedule}]"))


def test_what_two_rules_find_is_said_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(edited("video.num_frames=20"))
    assert str(caught.value).count("expected 1 + k*4 frames") == 1
