"""Every yaml of every group composes, passes the checks and builds; the README's commands need no `+`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launcher.check_config import check_config
from launcher.compose import CONF, compose, flat, resolved
from launcher.resume import IGNORED_KEYS

DEFAULTS = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
GROUPS = [next(iter(entry)) for entry in DEFAULTS if isinstance(entry, dict)]
GROUPS = [group for group in GROUPS if not group.startswith("override")]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
README = (CONF.parent / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


# values without a default, which a user of that choice has to give
MUST_BE_GIVEN = {
    "wan_vae": "encoder.video.path=somewhere",
    "cosmos_dv8x8x8": "encoder.video.path=somewhere",
    "cosmos_dv8x16x16": "encoder.video.path=somewhere",
    "cosmos_dv4x8x8": "encoder.video.path=somewhere",
    "cosmos_jit": "encoder.video.path=somewhere",
    "umt5": "encoder.text.path=somewhere",
}
# and choices of another group without which that one makes no sense
PARTNERS = {"bidirectional": "rollout=one_shot", "one_shot": "objective=bidirectional"}
PARTNERS |= {"frame_conditioned": "rollout=sliding_window", "sliding_window": "objective=frame_conditioned"}
TOKENS = ("next_token", "temporal_forcing", "tokens_jacobi", "ar_tokens")
PARTNERS |= dict.fromkeys(TOKENS, "experiment=ar_tokens")
PARTNERS |= dict.fromkeys(("doom_blocks", "doom_blocks_latents", "context_target"), "experiment=ar_context9")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group: str, choice: str) -> None:
    given = [table[choice] for table in (MUST_BE_GIVEN, PARTNERS) if choice in table]
    given += ["experiment=ar_tokens"] if (group, choice) == ("rollout", "tokens") else []
    given += ["network.actions=null"] if group == "data" and choice in ("video", "latents", "tokens") else []
    cfg = compose("train", [f"{group}={choice}", *given])  # refuses keys that a constructor does not take
    resolved(cfg)
    if group != "trainer":  # trainer=gpu is refused where there is none
        check_config(cfg)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_valid_and_builds(experiment: str, tmp_path: Path) -> None:
    cfg = compose("train", [f"experiment={experiment}", "run.id=a", f"run.root={tmp_path}"])
    check_config(cfg)
    instantiate(cfg.data)
    instantiate(cfg.module)
    callbacks = [instantiate(node) for node in cfg.callbacks.values()]
    loggers = [instantiate(node) for node in cfg.logger.values()]
    strategy = {"strategy": cfg.strategy.strategy, "plugins": cfg.strategy.plugins}
    trainer = instantiate(cfg.trainer, **strategy, callbacks=callbacks, logger=loggers)
    assert trainer.max_steps == cfg.trainer.max_steps
    assert not (tmp_path / "a").exists()  # building alone writes nothing


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_holds_overrides_only_below_a_header_of_three_lines(experiment: str) -> None:
    path = CONF / "experiment" / f"{experiment}.yaml"
    first, *lines = path.read_text().splitlines()
    assert first == "# @package _global_"
    for line, word in zip(lines, ("What", "Hardware", "Expected"), strict=False):
        assert line.startswith(f"# {word}: ")
    content = yaml.safe_load(path.read_text())
    groups = [
        f"{key.removeprefix('override /')}={value}"
        for entry in content.pop("defaults", [])
        if entry != "_self_"
        for key, value in ({"experiment": entry} if isinstance(entry, str) else entry).items()  # built on another one
    ]
    known = {key for key, _ in flat(OmegaConf.to_container(compose("train", groups), resolve=False))}
    assert {key for key, _ in flat(content) if key} <= known


@pytest.mark.parametrize("strategy", sorted(path.stem for path in (CONF / "strategy").glob("*.yaml")))
def test_every_strategy_says_what_it_supports(strategy: str) -> None:
    supports = compose("train", [f"strategy={strategy}"]).strategy.supports
    assert set(supports) == {"accelerators", "max_devices", "precisions", "gradient_clip"}


def test_debug_settings_of_the_trainer_do_not_make_another_run() -> None:
    for path in (CONF / "debug").glob("*.yaml"):
        for key, _ in flat(yaml.safe_load(path.read_text())):
            assert not key.startswith("trainer.") or key in IGNORED_KEYS, f"{path.name}: {key}"


def test_several_loggers_or_one_or_none() -> None:
    assert set(compose("train", ["logger=[tensorboard,csv]"]).logger) == {"tensorboard", "csv"}
    assert set(compose("train", ["logger=csv"]).logger) == {"csv"}


def test_geometry_is_stated_once() -> None:
    cfg = compose("train", ["experiment=ar_chunk3f", "video.num_frames=33"])
    assert cfg.data.num_frames == 33


def test_the_readme_begins_with_the_two_commands() -> None:
    assert COMMANDS[:2] == [
        "pip install -r requirements.txt && python train.py experiment=ar_chunk3f",
        "pip install -r requirements-dev.txt && python -m pytest",
    ]


@pytest.mark.parametrize("command", [line for line in COMMANDS if "train.py" in line or "scripts." in line])
def test_no_command_of_the_readme_needs_a_plus(command: str) -> None:
    assert not any(word.startswith(("+", "~")) for word in shlex.split(command))


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if ("train.py" in line or "scripts." in line) and "--help" not in line]
)
def test_every_command_of_the_readme_composes(command: str) -> None:
    words = shlex.split(command.rpartition("&& ")[2], comments=True)
    name = words[2].rpartition(".")[2] if words[1] == "-m" else "train"
    overrides = [word for word in words[1:] if "=" in word and not word.startswith("-")]
    compose(name, [re.sub(r"=(\w+)(,\w+)+$", r"=\1", word) for word in overrides])  # the first value of a sweep
