"""What weights were trained with becomes part of the config of predict.py, before the command line is applied.

The groups video, rollout, solver and data get a choice named "stored", which conf/predict.yaml takes by default. So a key
on the command line changes one value of what is stored, and a group choice replaces the stored node whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launcher.compose import CONF
from longtake.errors import ConfigError

_NAME = "stored"


def use_stored(overrides: Sequence[str]) -> None:
    """Reads the weights that `ckpt=` names and registers what they say. Does nothing without `ckpt`.

    Raises:
        ConfigError: the weights cannot be read, or name what they may not.
    """
    given = {override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(list(overrides))}
    if not isinstance(given.get("ckpt"), str):
        return
    from longtake.loading import find_weights, load_spec

    path = Path(given["ckpt"])
    spec = load_spec(path, [str(name) for name in given.get("trust") or []])
    store = ConfigStore.instance()
    for group, node in (("video", spec.video), ("rollout", spec.rollout), ("solver", spec.solver)):
        _check_plain(node, path)
        store.store(group=group, name=_NAME, node=node)
    data = _data(path, find_weights(path), spec.data.get("name"))
    if data is not None:
        store.store(group="data", name=_NAME, node=data)


def _data(path: Path, file: Path, name: object) -> dict[str, Any] | None:
    """Returns the data node: that of the run folder if it has pixels, else the yaml that the weights name."""
    for folder in (path if path.is_dir() else file.parent, file.parent.parent):
        config = folder / "config.yaml"
        if config.is_file():
            node = OmegaConf.to_container(OmegaConf.load(config).get("data"), resolve=True)
            if isinstance(node, dict) and not node.get("pixels"):
                return {str(key): value for key, value in node.items()}
            break
    if isinstance(name, str) and name.isidentifier() and (CONF / "data" / f"{name}.yaml").is_file():
        return {"defaults": [name, "_self_"]}
    return None


def _check_plain(node: Any, path: Path) -> None:
    """A config in a file must not reach for anything outside of itself: no interpolation, no list of defaults."""
    for key, value in _leaves(node):
        if key.split(".")[0] == "defaults" or "${" in str(value) or "${" in key:
            raise ConfigError(f"{path} holds {key}={value!r}, which is no plain value. Take other weights (`ckpt`).")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield prefix, node
        return
    for key, child in children:
        yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
