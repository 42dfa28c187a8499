"""Composes a config of `conf/` and says in our words what is wrong with a command line.

Hydra's own messages advise `+key=value` for a key that does not exist; that hides typing errors, so here an
unknown key is an error that lists the nearest ones.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launcher.signatures import check_targets
from longtake.errors import ConfigError, unknown_choice

CONF = Path(__file__).resolve().parent.parent / "conf"
_SWEEP = re.compile(r"(?:Sweep parameters?|Ambiguous value for argument) '(.+)'")


def compose(config_name: str, overrides: Sequence[str], config_dir: str | Path = CONF) -> DictConfig:
    """Returns the composed config: every key known, every value set, every interpolation resolvable.

    The config itself is not resolved yet, because `run.id` is only known later.

    Raises:
        ConfigError: whatever the command line or a yaml file has wrong.
    """
    try:
        cfg = _compose(config_name, overrides, config_dir)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise explain(error, config_name, overrides, config_dir) from error
    choices, given = cfg.hydra.runtime.choices, cfg.hydra.overrides.task
    with open_dict(cfg):
        del cfg["hydra"]
    finish(cfg, choices, given)
    return cfg


def finish(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Notes the chosen experiment in `run.experiment` and the keys that were given in `given`, and checks the config.

    Raises:
        ConfigError: a value that must be given is missing, an interpolation leads nowhere, or a value does
            not fit the constructor that it goes to.
    """
    if "run" in cfg:
        cfg.run.experiment = choices.get("experiment") or "train"
        cfg.run.data = choices.get("data")
    if "given" in cfg:
        # not resolved: an override may hold an interpolation, which leads somewhere in `cfg` only
        texts = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_list(overrides) else overrides
        cfg.given = [_key_of(str(text)) for text in texts or ()]
    written = dict(flat(OmegaConf.to_container(cfg, resolve=False)))
    missing = sorted(key for key, value in written.items() if isinstance(value, str) and value == "???")
    if missing:
        example = " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"{_listed(missing)} must be given and {_has(missing)} no default. Add {example}")

    def origin(key: str) -> str:
        match = re.fullmatch(r"\$\{([\w.]+)\}", str(written.get(key)))
        return origin(match[1]) if match else key

    problems = check_targets(resolved(cfg), origin=origin)
    if problems:
        raise ConfigError("\n       ".join(problems))


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Returns the config as plain dicts, lists and values, every interpolation replaced.

    Raises:
        ConfigError: an interpolation leads nowhere.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "?"
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(
            f"the value of `{key}` cannot be worked out: {reason}. Change `{key}` or what it refers to."
        ) from error
    assert isinstance(container, dict), f"a config is a mapping, not {type(container)}"
    return {str(key): value for key, value in container.items()}


def explain(error: Exception, config_name: str, overrides: Sequence[str], config_dir: str | Path = CONF) -> ConfigError:
    """Returns our error for one of Hydra's, OmegaConf's or the yaml reader's."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"cannot read `{error.override}` on the command line; expected key=value, for example "
            "trainer.max_steps=100 "
            f"(put quotes around a value with spaces, commas or brackets: 'key=\"a, b\"')."
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if error.options:
            return unknown_choice(group or "config", choice, error.options, group or "--config-name")
        return ConfigError(
            f"no yaml file {error.missing_cfg_file!r} in {config_dir}. Change `{group or '--config-name'}`."
        )
    if match := re.match(r"You must specify '([^']+)'", text):
        options = [line.strip() for line in text.splitlines()[2:]]
        return ConfigError(f"`{match[1]}` must be given; expected one of: {', '.join(options)}. Add {match[1]}=...")
    if match := _SWEEP.match(text):
        return ConfigError(
            f"`{match[1]}` lists several values. Add -m for one run a value, or write a list as key=[a,b] "
            "and text as 'key=\"a,b\"'."
        )
    if text.startswith("Config group override must be"):
        kind = text.rpartition(" ")[2]
        return ConfigError(
            f"a group was given a value of type {kind}; expected the name of one of its yaml files, for example "
            "strategy=ddp. Change that override."
        )
    if _unknown_key(error):
        return _explain_unknown_keys(error, config_name, overrides, config_dir)
    if isinstance(error, YAMLError):
        return ConfigError(f"a yaml file cannot be read: {' '.join(text.split())}")
    if isinstance(error, OmegaConfBaseException):
        return ConfigError(f"{text.splitlines()[0]}. Change `{error.full_key}`.")
    cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ else ""
    return ConfigError(f"the config cannot be composed: {text.splitlines()[0]}{cause}")


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every leaf of nested dicts with its dotted key; lists and empty dicts are leaves."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def nearest(key: str, known: Iterable[str], limit: int = 4) -> list[str]:
    """Returns the known keys that `key` was probably meant to be, best first; empty if none is close."""
    names = list(known)
    last = key.rpartition(".")[2]

    def score(name: str) -> float:
        whole = difflib.SequenceMatcher(None, key, name).ratio()
        return max(whole, 0.95 * difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio())

    ranked = sorted(((score(name), name) for name in names), key=lambda pair: (-pair[0], pair[1]))
    return [name for value, name in ranked if value >= 0.7][:limit]


def _compose(config_name: str, overrides: Sequence[str], config_dir: str | Path) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(Path(config_dir).resolve())):
        cfg = hydra.compose(config_name, overrides=list(overrides), return_hydra_config=True)
        check_choices(cfg.hydra.runtime.choices, config_name, overrides)
        return cfg


def check_choices(choices: Mapping[str, Any], config_name: str, overrides: Sequence[str]) -> None:
    """Checks the groups that were chosen, while Hydra is initialised: of an `optional` one it drops a wrong name.

    Raises:
        ConfigError: a group has no such yaml.
    """
    loader = GlobalHydra.instance().config_loader()
    for group in {_key_of(str(override)) for override in overrides} & set(choices):
        choice = choices[group]
        there = loader.get_group_options(group, ObjectType.CONFIG, config_name, list(overrides))
        if isinstance(choice, str) and choice not in there:
            raise unknown_choice(group, choice, there, group)


def _unknown_key(error: Exception) -> str | None:
    match = re.match(r"Could not override '([^']+)'", str(error))
    return match[1] if isinstance(error, ConfigCompositionException) and match else None


def _explain_unknown_keys(
    error: Exception, config_name: str, overrides: Sequence[str], config_dir: str | Path
) -> ConfigError:
    """Leaves the unknown keys out one by one: all of them are named at once, beside the keys that exist."""
    problem: Exception | None = error
    kept, unknown, cfg = list(overrides), [], None
    while cfg is None:
        if problem is not None:
            key = _unknown_key(problem)
            sweep = _SWEEP.match(str(problem))  # of a multirun; its key exists, or it will be named below
            left = [entry for entry in kept if entry != (sweep and sweep[1]) and _key_of(entry) != key]
            if len(left) == len(kept):
                return ConfigError(f"the config cannot be composed: {str(problem).splitlines()[0]}")
            unknown += [key] if key else []
            kept, problem = left, None
        try:
            cfg = _compose(config_name, kept, config_dir)
        except (HydraException, OmegaConfBaseException) as another:
            problem = another
    with open_dict(cfg):
        del cfg["hydra"]
    keys = [key for key, _ in flat(OmegaConf.to_container(cfg, resolve=False))]
    nodes = {".".join(parts[:depth]) for parts in (key.split(".") for key in keys) for depth in range(1, len(parts))}
    return ConfigError("\n       ".join(_unknown_key_message(key, [*keys, *sorted(nodes)]) for key in unknown))


def _key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _unknown_key_message(key: str, known: list[str]) -> str:
    near = nearest(key, known)
    if near:
        return f"unknown key `{key}`; nearest: {', '.join(near)}. --cfg job lists every key."
    top = sorted({name.partition(".")[0] for name in known})
    return f"unknown key `{key}`; the config holds: {', '.join(top)}. --cfg job lists every key."


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _has(keys: Sequence[str]) -> str:
    return "has" if len(keys) == 1 else "have"
