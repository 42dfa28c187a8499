"""Schedules of settings: values by step, the learning rate, resume, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.curriculum import Curriculum, Schedule, check_schedules
from longtake.errors import ConfigError
from tests.tiny_module import TinyModule, fit

CHUNKS = {"key": "objective.num_chunks", "points": [[0, 1], [3, 2], [6, 4]]}
CONFIG: dict[str, Any] = {
    "objective": {
        "_target_": "tests.tiny_module.Knobs",
        "num_chunks": 1,
        "context_noise": 0.0,
        "shares": {"none": 1.0},
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.0},
    "data": {"batch_size": 4},
}


def test_constant_and_linear_segments() -> None:
    constant = Schedule.of({"key": "a", "points": [[0, 1], [10, 2], [20, 5]]})
    assert [constant.at(step) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 2, 2, 5, 5]
    linear = Schedule.of({"key": "a", "kind": "linear", "points": [[10, 0.0], [20, 1.0], [40, 0.0]]})
    assert [linear.at(step) for step in (0, 10, 15, 20, 30, 40, 99)] == [0, 0, 0.5, 1, 0.5, 0, 0]


@pytest.mark.parametrize(
    "node",
    [
        {"points": []},
        {"points": [[3, 1], [3, 2]]},
        {"points": [[-1, 1]]},
        {"points": [[0.5, 1]]},
        {"points": [[0, 1]], "kind": "cubic"},
        {"points": [[0, 1]], "until": 3},
        {"points": [[0, "a"], [4, "b"]], "kind": "linear"},
    ],
)
def test_a_schedule_that_cannot_be_names_its_key(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\ba\b.*Change `callbacks\.curriculum\.schedules`"):
        Schedule.of({"key": "a", **node})


def test_values_are_set_before_each_step(tmp_path: Path) -> None:
    module = TinyModule()
    schedules = [CHUNKS, {"key": "objective.context_noise", "kind": "linear", "points": [[2, 0.0], [6, 0.4]]}]
    fit(module, tmp_path, 8, Curriculum(schedules))
    assert [row[1] for row in module.seen] == [1, 1, 1, 2, 2, 2, 4, 4]
    assert [row[2] for row in module.seen] == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_a_linear_schedule_of_a_whole_number_is_rounded(tmp_path: Path) -> None:
    module = TinyModule()
    fit(
        module, tmp_path, 6, Curriculum([{"key": "objective.num_chunks", "kind": "linear", "points": [[0, 1], [4, 3]]}])
    )
    assert [row[1] for row in module.seen] == [1, 2, 2, 2, 3, 3]
    assert all(isinstance(row[1], int) for row in module.seen)


def test_a_linear_schedule_from_nothing_through_whole_numbers_is_rounded(tmp_path: Path) -> None:
    module = TinyModule()
    module.objective.num_chunks = None  # type: ignore[assignment]
    fit(
        module, tmp_path, 6, Curriculum([{"key": "objective.num_chunks", "kind": "linear", "points": [[0, 1], [4, 3]]}])
    )
    assert [row[1] for row in module.seen] == [1, 2, 2, 2, 3, 3]


def test_the_rate_is_scheduled_under_the_warm_up(tmp_path: Path) -> None:
    module = TinyModule()
    fit(module, tmp_path, 7, Curriculum([{"key": "optimizer.lr", "points": [[0, 0.1], [2, 0.2], [5, 0.01]]}]))
    factors = [min(1.0, (step + 1) / 4) for step in range(7)]
    rates = [0.1, 0.1, 0.2, 0.2, 0.2, 0.01, 0.01]
    assert [row[3] for row in module.seen] == pytest.approx([rate * f for rate, f in zip(rates, factors, strict=True)])


def test_weight_decay_is_scheduled_and_groups_without_stay_without(tmp_path: Path) -> None:
    class Grouped(TinyModule):
        def param_groups(self) -> list[dict[str, Any]]:
            assert self.network is not None
            weight, bias = self.network.parameters()
            return [{"params": [weight], "lr_scale": 10.0}, {"params": [bias], "weight_decay": 0.0}]

    module = Grouped()
    curriculum = Curriculum(
        [{"key": "optimizer.weight_decay", "points": [[0, 0.5]]}, {"key": "optimizer.lr", "points": [[0, 0.02]]}]
    )
    trainer = fit(module, tmp_path, 4, curriculum)
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [group["lr"] for group in groups] == pytest.approx([0.2, 0.02])


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    schedules = [CHUNKS, {"key": "optimizer.lr", "kind": "linear", "points": [[0, 0.1], [8, 0.01]]}]
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    whole, first, second = TinyModule(), TinyModule(), TinyModule()
    fit(whole, tmp_path / "whole", 9, Curriculum(schedules))
    fit(first, tmp_path / "cut", 4, Curriculum(schedules), save_every=4)
    fit(second, tmp_path / "cut", 9, Curriculum(schedules), first=4, ckpt=last)
    assert first.seen + second.seen == whole.seen
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))


def test_changes_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="longtake"):
        fit(TinyModule(), tmp_path, 8, Curriculum([CHUNKS]))
    lines = [record.message for record in caplog.records if record.message.startswith("curriculum")]
    assert lines == [f"curriculum at step {step}: objective.num_chunks={n}" for step, n in ((0, 1), (3, 2), (6, 4))]


def test_disabled_leaves_everything_as_configured(tmp_path: Path) -> None:
    module = TinyModule()
    fit(module, tmp_path, 4, Curriculum([CHUNKS], enabled=False))
    assert {row[1] for row in module.seen} == {1}


def test_an_unknown_key_lists_the_nearest() -> None:
    schedules = {"objective.num_chunk": Schedule(((0, 1),))}
    with pytest.raises(ConfigError, match=r"'objective\.num_chunk'; expected one of: objective\.num_chunks"):
        check_schedules(schedules, CONFIG)
    with pytest.raises(ConfigError, match=r"data\.batch_size"):  # fixed once the plan is made
        check_schedules({"data.batch_size": Schedule(((0, 1),))}, CONFIG)


def test_a_value_that_its_owner_refuses_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.num_chunks is 0"):
        check_schedules({"objective.num_chunks": Schedule(((0, 1), (5, 0)))}, CONFIG)
    with pytest.raises(ConfigError, match=r"optimizer\.lr=-1"):
        check_schedules({"optimizer.lr": Schedule(((0, -1),))}, CONFIG)
    check_schedules({"objective.shares.none": Schedule(((0, 0.5),)), "optimizer.lr": Schedule(((0, 1),))}, CONFIG)
    module = TinyModule()
    module.run_config = CONFIG
    with pytest.raises(ConfigError, match=r"objective\.num_chunks is 0"):
        fit(module, tmp_path, 2, Curriculum([{"key": "objective.num_chunks", "points": [[0, 0]]}]))
