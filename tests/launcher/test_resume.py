"""The rules of `resume`, on folders with nothing trained in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.resume import (
    IGNORED_KEYS,
    Plan,
    Request,
    checkpoint_step,
    decide,
    differing_keys,
    newest_checkpoint,
)
from longtake.errors import ConfigError

CONFIG: dict[str, Any] = {"module": {"width": 8}, "data": {"name": "doom"}, "trainer": {"max_steps": 10, "devices": 1}}


def make_run(
    root: Path,
    name: str,
    *,
    status: str = "running",
    step: int = 5,
    updated: float = 1.0,
    experiment: str = "exp",
    width: int = 8,
    checkpoints: dict[str, int] | None = None,
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    run = {"root": str(root), "id": name, "experiment": experiment, "dir": str(folder)}
    stored = {**CONFIG, "module": {"width": width, "folder": str(folder)}, "run": run, "resume": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    (folder / "state.json").write_text(json.dumps({"status": status, "step": step, "updated": updated}))
    for file, at in ({"checkpoints/last.ckpt": step} if checkpoints is None else checkpoints).items():
        (folder / file).parent.mkdir(exist_ok=True)
        torch.save({"global_step": at, "state_dict": {}}, folder / file)
    return folder


def request(root: Path, **changes: Any) -> Request:
    def config_of(run: dict[str, Any]) -> dict[str, Any]:
        folder = f"{run.get('root')}/{run.get('id')}"  # paths of the run folder stand in real configs too
        return {**CONFIG, "module": {"width": 8, "folder": folder}, "run": run, "resume": "auto"}

    plain = Request(root=root, experiment="exp", config_of=config_of, max_steps=10, new_id="new")
    return replace(plain, **changes)


def ask(root: Path, **changes: Any) -> Plan:
    return decide(request(root, **changes), is_locked=lambda folder: False)


def given(name: str) -> dict[str, Any]:
    return {"run_id": name, "is_given": True}


# Without resume


def test_a_start_without_anything_begins_a_new_run_although_others_exist(tmp_path: Path) -> None:
    make_run(tmp_path, "old")
    assert ask(tmp_path) == Plan(tmp_path, "new")


def test_an_inherited_run_id_is_only_a_name(tmp_path: Path) -> None:
    assert ask(tmp_path, run_id="job-7") == Plan(tmp_path, "job-7")
    make_run(tmp_path, "job-7")
    with pytest.raises(ConfigError, match="overwrite=true"):
        ask(tmp_path, run_id="job-7")


def test_a_given_run_id_begins_or_continues(tmp_path: Path) -> None:
    assert ask(tmp_path, **given("a")) == Plan(tmp_path, "a")
    folder = make_run(tmp_path, "a", step=4)
    plan = ask(tmp_path, **given("a"))
    assert plan.checkpoint == folder / "checkpoints" / "last.ckpt"
    assert "step 4" in plan.message


# never and overwrite


def test_never_refuses_an_existing_folder_and_names_overwrite(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    with pytest.raises(ConfigError, match="overwrite=true"):
        ask(tmp_path, **given("a"), resume="never")


@pytest.mark.parametrize("resume", [None, "never"])
def test_overwrite_begins_again(tmp_path: Path, resume: str | None) -> None:
    make_run(tmp_path, "a", width=99)  # also one with another config
    plan = ask(tmp_path, **given("a"), resume=resume, overwrite=True)
    assert plan.clears
    assert plan.checkpoint is None


def test_overwrite_never_empties_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    for settings in ({"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(ConfigError, match="no config.yaml"):
            ask(tmp_path, **given("a"), **settings)


def test_overwrite_and_continue_contradict_each_other(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    with pytest.raises(ConfigError, match="one of the two"):
        ask(tmp_path, **given("a"), resume="auto", overwrite=True)


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lock").touch()
    assert ask(tmp_path, **given("a"), resume="never") == Plan(tmp_path, "a")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        ask(tmp_path, **given("a"))


# A given run


def test_another_config_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    make_run(tmp_path, "a", width=99)
    with pytest.raises(ConfigError, match="module.width: 99 in the run, 8 now") as caught:
        ask(tmp_path, **given("a"))
    assert "module.folder" not in str(caught.value)  # the run folder itself is no difference


def test_a_run_that_failed_before_its_first_step_takes_another_config(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", width=99, step=0, checkpoints={})
    assert ask(tmp_path, **given("a")).checkpoint is None
    (folder / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="another config"):
        ask(tmp_path, **given("a"))


@pytest.mark.parametrize("text", ["", "a: [1,", "[1]"])
def test_a_damaged_config_is_named_and_keeps_no_other_run_from_going_on(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, "b")
    (make_run(tmp_path, "a", updated=2.0) / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a/config.yaml cannot be read"):
        ask(tmp_path, **given("a"))
    assert ask(tmp_path, resume="auto").run_id == "b"


def test_a_finished_run_is_left_alone_until_more_steps_are_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path, "a", status="finished", step=10)
    plan = ask(tmp_path, **given("a"))
    assert plan.is_finished
    assert "finished" in plan.message
    longer = ask(tmp_path, **given("a"), max_steps=20)
    assert not longer.is_finished
    assert longer.checkpoint is not None


def test_a_run_without_a_checkpoint_starts_again_in_its_folder(tmp_path: Path) -> None:
    make_run(tmp_path, "a", checkpoints={})
    plan = ask(tmp_path, **given("a"))
    assert plan.checkpoint is None
    assert plan.run_id == "a"
    assert "no checkpoint" in plan.message


def test_a_damaged_state_counts_as_unfinished(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", status="finished", step=10)
    (folder / "state.json").write_text('{"status": "fini')
    assert ask(tmp_path, **given("a")).checkpoint is not None


# auto without a run.id


def test_auto_continues_the_newest_unfinished_run_that_matches(tmp_path: Path) -> None:
    make_run(tmp_path, "older", updated=1)
    newest = make_run(tmp_path, "newest", updated=5)
    make_run(tmp_path, "z_other_experiment", experiment="other", updated=9)
    make_run(tmp_path, "z_other_config", width=99, updated=8)
    make_run(tmp_path, "z_finished", status="finished", step=10, updated=7)
    make_run(tmp_path, "z_nothing_saved", checkpoints={}, updated=6)
    plan = ask(tmp_path, resume="auto")
    assert plan.folder == newest
    assert str(newest) in plan.message


def test_auto_begins_when_there_is_nothing_to_continue(tmp_path: Path) -> None:
    assert ask(tmp_path / "not_there", resume="auto").run_id == "new"
    make_run(tmp_path, "other", width=99)
    plan = ask(tmp_path, resume="auto")
    assert plan.run_id == "new"
    assert "other" in plan.message
    assert "module.width" in plan.message


def test_auto_with_only_a_finished_run_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, "a", status="finished", step=10)
    plan = ask(tmp_path, resume="auto")
    assert plan.is_finished
    assert plan.run_id == "a"


def test_auto_makes_the_newest_run_longer_but_never_an_older_one(tmp_path: Path) -> None:
    make_run(tmp_path, "older", status="finished", step=3, updated=1)
    make_run(tmp_path, "newest", status="finished", step=5, updated=2)
    assert ask(tmp_path, resume="auto", max_steps=10).run_id == "newest"
    assert ask(tmp_path, resume="auto", max_steps=5).is_finished


def test_auto_passes_over_a_run_that_a_process_works_on(tmp_path: Path) -> None:
    idle = make_run(tmp_path, "idle", updated=1)
    busy = make_run(tmp_path, "busy", updated=2)
    plan = decide(request(tmp_path, resume="auto"), is_locked=lambda folder: folder == busy)
    assert plan.folder == idle


def test_a_given_run_that_a_process_works_on_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    with pytest.raises(ConfigError, match="another process"):
        decide(request(tmp_path, **given("a")), is_locked=lambda folder: True)


# resume=<run id> and resume=<path>


def test_a_run_is_named_by_its_id_or_its_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "outputs", "a")
    elsewhere = tmp_path / "other_root"
    assert ask(tmp_path / "outputs", resume="a").folder == folder
    plan = ask(elsewhere, resume=str(folder))
    assert plan.folder == folder
    assert plan.checkpoint == folder / "checkpoints" / "last.ckpt"


def test_an_unknown_run_lists_those_that_exist(tmp_path: Path) -> None:
    make_run(tmp_path, "first_run")
    with pytest.raises(ConfigError, match="first_run"):
        ask(tmp_path, resume="frist_run")
    with pytest.raises(ConfigError, match="holds no run"):
        ask(tmp_path / "nothing", resume="a")


def test_two_different_runs_at_once_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    with pytest.raises(ConfigError, match="one run"):
        ask(tmp_path, **given("b"), resume="a")
    assert ask(tmp_path, **given("a"), resume="a").run_id == "a"


def test_a_checkpoint_of_a_run_continues_that_run_from_there(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path,
        "a",
        status="finished",
        step=10,
        checkpoints={"checkpoints/last.ckpt": 10, "checkpoints/step_0000004.ckpt": 4},
    )
    path = folder / "checkpoints" / "step_0000004.ckpt"
    plan = ask(tmp_path, resume=str(path))
    assert (plan.folder, plan.checkpoint, plan.is_finished) == (folder, path, False)


def test_a_checkpoint_from_elsewhere_begins_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "downloads" / "x.ckpt"
    path.parent.mkdir()
    torch.save({"global_step": 3}, path)
    plan = ask(tmp_path / "outputs", resume=str(path))
    assert (plan.run_id, plan.checkpoint) == ("new", path)
    make_run(tmp_path / "outputs", "a")
    with pytest.raises(ConfigError, match="overwrite=true"):
        ask(tmp_path / "outputs", **given("a"), resume=str(path))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ConfigError, match="no checkpoint"):
        ask(tmp_path, resume=str(path))


# A job that the scheduler started again


def test_a_requeued_job_continues_its_own_run_whatever_it_was_told_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "job", checkpoints={"checkpoints/last.ckpt": 5, "hpc_ckpt_1.ckpt": 8})
    for first in ({}, {"resume": "never"}, {"overwrite": True}):
        plan = ask(tmp_path, run_id="job", is_restart=True, **first)
        assert plan.checkpoint == folder / "hpc_ckpt_1.ckpt"
        assert not plan.clears


def test_a_restart_without_a_run_id_continues_the_newest(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a")
    assert ask(tmp_path, is_restart=True).folder == folder


# Checkpoints


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    steps = {"checkpoints/last.ckpt": 5, "checkpoints/step_0000007.ckpt": 7, "hpc_ckpt_3.ckpt": 6}
    folder = make_run(tmp_path, "a", checkpoints={**steps, "checkpoints/best.ckpt": 9})
    assert newest_checkpoint(folder) == (folder / "checkpoints" / "step_0000007.ckpt", 7)


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_run(tmp_path, "a", checkpoints={"checkpoints/last.ckpt": 9, "checkpoints/step_0000007.ckpt": 7})
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-200])
    assert newest_checkpoint(folder) == (folder / "checkpoints" / "step_0000007.ckpt", 7)
    assert "last.ckpt" in caplog.text
    (folder / "checkpoints" / "step_0000007.ckpt").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of the checkpoints"):
        newest_checkpoint(folder)


def test_a_checkpoint_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"global_step": 3, "evil": Evil()}, tmp_path / "x.ckpt")
    assert checkpoint_step(tmp_path / "x.ckpt") is None
    assert not (tmp_path / "executed").exists()


def test_the_folder_of_a_sharded_checkpoint_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    torch.save({"global_step": 12}, tmp_path / "last.ckpt" / "meta.pt")
    assert checkpoint_step(tmp_path / "last.ckpt") == 12


# What makes two configs the same


def test_only_the_keys_that_may_change_are_left_out() -> None:
    old = {
        **{"run": {"id": "a"}, "resume": None, "overwrite": False, "strategy": {"x": 1}, "cluster": {"y": 1}},
        **{"logger": {"z": 1}, "debug": 1, "trainer": {"max_steps": 1, "devices": 1, "precision": "32-true"}},
        "seed": 0,
    }
    new = {
        **{"run": {"id": "b"}, "resume": "auto", "overwrite": True, "strategy": {"x": 2}, "cluster": {"y": 2}},
        **{"logger": {}, "debug": 2, "trainer": {"max_steps": 2, "devices": 2, "precision": "bf16-mixed"}},
        **{"seed": 0, "seeds": 1},
    }
    assert differing_keys(old, new) == [
        ("seeds", "absent", 1),
        ("trainer.precision", "32-true", "bf16-mixed"),
    ]
    assert "init_from" not in IGNORED_KEYS
