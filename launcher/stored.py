"""What weights were trained with becomes part of the config of predict.py, before the command line is applied.

The groups video, encoder, rollout, solver and data get a choice named "stored", which conf/predict.yaml takes by
default. So a key on the command line changes one value of what is stored, and a group choice replaces the node whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import OmegaConf

from launcher.compose import CONF
from longtake.errors import ConfigError

_NAME = "stored"
_SETTINGS = ("root", "video_reader", "views", "control", "frame_stride", "reduce_actions", "splits", "action_dim")


def use_stored(overrides: Sequence[str]) -> None:
    """Reads the weights that `ckpt=` names and registers what they say. Does nothing without `ckpt`.

    Raises:
        ConfigError: the weights cannot be read, or name what they may not.
    """
    given = {
        override.key_or_group: override.value()
        for override in OverridesParser.create().parse_overrides(list(overrides))
    }
    ckpt, trust = given.get("ckpt"), given.get("trust")
    if not isinstance(ckpt, str):
        return
    if "trust" in given and not isinstance(trust, list):
        raise ConfigError(f"trust is {trust!r}; expected a list of packages, such as trust=[my_pkg]. Change `trust`.")
    from longtake.loading import find_weights, load_spec

    path = Path(ckpt)
    spec = load_spec(path, [str(name) for name in trust] if isinstance(trust, list) else [])
    store = ConfigStore.instance()
    _forget(store)
    # several views are rolled out by windows, unless something else is asked for
    several = given.get("spec") is not None or given.get("n_views") is not None
    slides = several and not str(spec.rollout.get("_target_")).endswith("SlidingWindowRollout")
    groups = {"video": spec.video, **{name: node for name, node in spec.nodes.items() if name in ("rollout", "solver")}}
    for group, node in groups.items():
        _check_plain(node, path)
        stored = {"defaults": ["sliding_window"]} if slides and group == "rollout" else _with_defaults(node)
        store.store(group=group, name=_NAME, node=stored)
    for name, node in _encoders(path, spec).items():
        _check_plain(node, path)
        store.store(group=f"encoder/{name}", name=_NAME, node=node)
    data = _data(path, find_weights(path), spec.data.get("name"))
    if data is not None:
        store.store(group="data", name=_NAME, node=data)


def _data(path: Path, file: Path, name: object) -> dict[str, Any] | None:
    """Returns the node of the data with the pixels of the training clips, or None where it is not known.

    It is a yaml of conf/data by its name; from a run folder come only plain settings, never what to build or to open.
    """
    settings: dict[str, Any] = {}
    for folder in (path if path.is_dir() else file.parent, file.parent.parent):
        if (folder / "config.yaml").is_file():
            config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
            node = config.get("data") if isinstance(config, dict) else None
            if isinstance(node, dict):
                settings = (
                    _latents_settings(node) if node.get("pixels") else {k: node[k] for k in _SETTINGS if k in node}
                )
                _check_plain(settings, folder)
            break
    if isinstance(name, str) and name.isidentifier() and (CONF / "data" / f"{name}.yaml").is_file():
        return {"defaults": [name, "_self_"], **settings}
    return None


def _forget(store: ConfigStore) -> None:
    """Takes out what an earlier call in this process registered."""
    for path in ("video", "rollout", "solver", "data", "encoder/video", "encoder/text"):
        group: Any = store.repo
        for part in path.split("/"):
            group = group.get(part, {})
        group.pop(f"{_NAME}.yaml", None)


def _latents_settings(node: dict[str, Any]) -> dict[str, Any]:
    """Returns where the pixels lie that were encoded, if they are still there."""
    source = (node.get("build") or {}).get("source") or {}
    root = source.get("input")
    return {"root": root, "build": None} if isinstance(root, str) and (Path(root) / "dataset.json").is_file() else {}


def _encoders(path: Path, spec: Any) -> dict[str, dict[str, Any]]:
    """Returns the nodes of the encoders. In a run folder paths of the machine are known; elsewhere they are not."""
    found = {name: dict(node) for name, node in spec.encoder.items() if node and name in ("video", "text")}
    config = path / "config.yaml"
    if config.is_file():
        stored = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
        for name, node in found.items():
            local = (stored.get("encoder") or {}).get(name) if isinstance(stored, dict) else None
            if isinstance(local, dict) and local.get("_target_") == node.get("_target_"):
                node |= {key: value for key, value in local.items() if isinstance(value, str) and "/" in value}
    return found


def _with_defaults(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a node with the settings that came after the weights, at the values that hold without them."""
    if "_target_" not in node:
        return dict(node)
    parameters = inspect.signature(get_class(node["_target_"])).parameters.values()
    lacking = {entry.name: entry.default for entry in parameters if entry.default is not entry.empty}
    plain = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in lacking.items()
        if value is None or isinstance(value, bool | int | float | str | tuple)
    }
    return {**plain, **node}


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
