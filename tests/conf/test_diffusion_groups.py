"""Every objective, solver and rollout of conf/ composes, fits its constructor and builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from launcher.signatures import check_targets
from longtake.objectives.next_token import NextToken
from longtake.objectives.slot_objective import SlotObjective
from longtake.objectives.teacher_forcing import TeacherForcing

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = [
    (group, path.stem) for group in ("objective", "solver", "rollout") for path in sorted((CONF / group).glob("*.yaml"))
]
WHOLE_CLIPS = ("bidirectional", "frame_conditioned")


def build(group: str, name: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose(overrides=[f"+{group}={name}"])
    with open_dict(cfg):
        cfg.video = {"chunk_lat": 3, "num_frames": 81, "block_frames": 9}
        if group != "solver":
            cfg.solver = {"_target_": "longtake.rollout.solvers.Euler"}
    node = OmegaConf.to_container(cfg, resolve=True)[group]  # type: ignore[index, call-overload]
    assert check_targets(node, group) == []
    return instantiate(node)


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_choice_builds(group: str, name: str) -> None:
    built = build(group, name)
    assert type(built).__module__.startswith("longtake.")
    if group == "objective" and name in ("next_token", "temporal_forcing"):
        assert isinstance(built, NextToken)
        assert built.context_lat == 2
    elif group == "objective":
        assert isinstance(built, SlotObjective)
        assert built.trained_for(num_frames_px=81, ratio=4).chunk_lat == (21 if name in WHOLE_CLIPS else 3)


def test_the_default_is_the_released_code_and_the_paper_is_one_override_away() -> None:
    released, paper = build("objective", "teacher_forcing"), build("objective", "teacher_forcing_paper")
    assert isinstance(released, TeacherForcing)
    levels = released.noise_levels
    assert (levels.shift_by_tokens, levels.weight_mean, levels.weight_std) == (True, 0.0, 1.0)
    assert released.noise_repeats == 1
    assert released.context_sees == "self"
    levels = paper.noise_levels
    assert (levels.shift_by_tokens, levels.shift, levels.weight_mean, levels.weight_std) == (False, 3.0, 0.5, 1.0)
    assert paper.noise_repeats == 2
