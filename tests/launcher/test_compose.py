"""What a user reads after a mistake on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.compose import compose, flat, nearest, resolved
from longtake.errors import ConfigError
from tests.configs import compose_train


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_train(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_step=5", "trainer.max_steps"),
        ("max_steps=5", "trainer.max_steps"),
        ("batch_size=5", "data.batch_size"),
        ("overwite=true", "overwrite"),
        ("trainer.max_steps.deep=1", "trainer.max_steps"),
        ("strateg=ddp", "strategy"),
    ],
)
def test_an_unknown_key_names_the_nearest_ones_and_never_advises_plus(override: str, expected: str) -> None:
    text = message(override)
    assert f"`{override.partition('=')[0]}`" in text
    assert expected in text.partition("nearest: ")[2]
    assert "+" not in text


def test_all_unknown_keys_are_named_at_once() -> None:
    text = message("foo=1", "trainer.max_steps=5", "data.batchsize=2", "bar.baz=3")
    assert all(f"unknown key `{key}`" in text for key in ("foo", "data.batchsize", "bar.baz"))
    assert "`trainer.max_steps`" not in text


def test_an_unknown_choice_lists_the_valid_ones_nearest_first() -> None:
    text = message("strategy=dpd")
    assert "unknown strategy 'dpd'" in text
    assert text.index("ddp") < text.index("single")


@pytest.mark.parametrize("override", ["justaword", "trainer.max_steps=[1,2"])
def test_a_word_that_is_no_override_is_quoted_back(override: str) -> None:
    text = message(override)
    assert override in text
    assert "key=value" in text


def test_a_group_takes_a_name() -> None:
    assert "type int" in message("strategy=5")


def test_several_values_need_a_multirun() -> None:
    assert "-m" in message("seed=1,2")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.max_steps=many", "trainer.max_steps"),
        ("trainer.max_steps=1.5", "trainer.max_steps"),
        ("seed=abc", "seed"),  # data.seed repeats it, but is not what the user set
        ("data.batch_size=true", "data.batch_size"),
        ("optimizer.lr=high", "optimizer.lr"),
        ("optimizer.betas=0.9", "optimizer.betas"),
        ("callbacks.checkpoint.every_n_train_steps=often", "callbacks.checkpoint.every_n_train_steps"),
        ("scheduler.warmup_steps=null", "scheduler.warmup_steps"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_once(override: str, key: str) -> None:
    text = message(override)
    assert text.count("Change") == 1
    assert f"Change `{key}`" in text


def test_a_class_that_does_not_exist_is_named() -> None:
    text = message("module._target_=lightning_modules.nothing.Nothing")
    assert "module._target_" in text
    assert "cannot be imported" in text


def test_a_missing_value_is_named() -> None:
    assert "`seed` must be given" in message("seed=???")


def test_an_interpolation_that_leads_nowhere_names_its_key() -> None:
    text = message("seed=${no.such.key}")
    assert "`seed`" in text
    assert "no.such.key" in text


def test_a_group_that_must_be_chosen_lists_its_choices(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "camera.yaml").write_text("a: 1\n")
    (tmp_path / "main.yaml").write_text("defaults:\n  - source: ???\n  - _self_\n")
    with pytest.raises(ConfigError, match="source.*camera"):
        compose("main", [], tmp_path)
    assert compose("main", ["source=camera"], tmp_path).source.a == 1


def test_a_yaml_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "main.yaml").write_text("a: [1, 2\n")
    with pytest.raises(ConfigError, match="main.yaml"):
        compose("main", [], tmp_path)


def test_a_config_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing"):
        compose("nothing", [], tmp_path)


def test_the_experiment_is_noted_in_the_config() -> None:
    assert compose_train().run.experiment == "ar_chunk3f"


def test_resolved_follows_interpolations_to_plain_values() -> None:
    config = resolved(compose_train("run.id=a"))
    assert config["module"]["action_dim"] == config["data"]["action_dim"] == 3
    assert config["run"]["dir"] == "outputs/a"
    assert type(config["optimizer"]["betas"]) is list


def test_flat_keeps_lists_and_empty_nodes() -> None:
    assert dict(flat({"a": {"b": [1, 2], "c": {}}, "d": None})) == {"a.b": [1, 2], "a.c": {}, "d": None}


def test_nearest_knows_a_leaf_by_its_last_part() -> None:
    assert nearest("batch_size", ["data.batch_size", "data.root"])[0] == "data.batch_size"
    assert nearest("zzz", ["data.batch_size"]) == []
