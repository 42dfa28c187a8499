"""Holds every `_target_` node of a config against the signature of what it names.

The constructors are the schema: an argument that a class does not take, one that it needs and does not get,
or a value of another type is found before anything is built.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

from hydra.utils import get_object

_HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
_LISTS = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def check_targets(config: Any, path: str = "", origin: Callable[[str], str] = str) -> list[str]:
    """Returns what is wrong with the `_target_` nodes of a resolved config, one sentence each.

    Args:
        config: plain containers.
        path: dotted key of `config` in the whole config.
        origin: the key whose value another key repeats; the message names that one.
    """
    problems, seen = [], []
    for key, node in sorted(_nodes(config, path), key=lambda pair: pair[0].count(".")):
        if node not in seen:  # an interpolation repeats a node; it is named where it stands highest
            seen.append(node)
            problems += _check_node(node, key, origin)
    # one key may go to several constructors: it is named once
    return list({text.rpartition("Change ")[2]: text for text in reversed(problems)}.values())[::-1]


def _nodes(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from _nodes(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _nodes(child, f"{path}[{index}]")


def _check_node(node: dict[str, Any], path: str, origin: Callable[[str], str]) -> Iterator[str]:
    name = node["_target_"]
    try:
        target = get_object(name)
    except Exception as error:  # whatever a module raises while it is imported
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        yield (f"`{path}._target_` names {name!r}, which cannot be imported: {reason}. Change `{path}._target_`.")
        return
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return
    given = {key: value for key, value in node.items() if key not in _HYDRA_KEYS}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        yield from _check_names(node, path, parameters, given)
    hints = _hints(target)
    for key, value in given.items():
        if key not in hints or (value is None and (key not in parameters or parameters[key].default is None)):
            continue
        if not fits(value, hints[key]):
            source = origin(f"{path}.{key}")
            yield f"`{source}` is {value!r}; {name} expects {_written(hints[key])}. Change `{source}`."


def _check_names(
    node: dict[str, Any], path: str, parameters: typing.Mapping[str, inspect.Parameter], given: dict[str, Any]
) -> Iterator[str]:
    name = node["_target_"]
    named = [
        key for key, value in parameters.items() if value.kind in (value.POSITIONAL_OR_KEYWORD, value.KEYWORD_ONLY)
    ]
    for key in sorted(set(given) - set(named)):
        yield f"`{path}.{key}` is no argument of {name}; it takes: {', '.join(named)}. Remove `{path}.{key}`."
    if node.get("_partial_") or "_args_" in node:
        return
    for key in named:
        if parameters[key].default is inspect.Parameter.empty and key not in given:
            yield f"{name} needs `{key}`, which is not set. Add `{path}.{key}`."


def _hints(target: Any) -> dict[str, Any]:
    """Returns the types of the arguments; where a class takes `**kwargs`, also those that its bases take."""
    hints: dict[str, Any] = {}
    for owner in target.__mro__[:-1] if inspect.isclass(target) else [target]:
        function = owner.__dict__.get("__init__") if inspect.isclass(owner) else owner
        if function is None:
            continue
        try:
            hints = {**typing.get_type_hints(function), **hints}
            takes_more = any(
                value.kind is value.VAR_KEYWORD for value in inspect.signature(function).parameters.values()
            )
        except (
            NameError,
            TypeError,
            ValueError,
            AttributeError,
        ):  # builtins; names that only a type checker sees
            return hints
        if not takes_more:
            break
    return hints


def fits(value: Any, hint: Any) -> bool:
    """Returns False if a value from a yaml file certainly has another type than `hint` says."""
    if isinstance(value, dict) and "_target_" in value:
        return True  # an object that will be built; its own constructor decides
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str or (inspect.isclass(hint) and issubclass(hint, PurePath)):
        return isinstance(value, str)
    kind = origin or hint
    if kind in _LISTS:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value if args)
    if kind in _MAPPINGS:
        return isinstance(value, dict)
    return not _is_torchs(hint)


def _is_torchs(hint: Any) -> bool:
    """A tensor never comes from yaml; for other classes a constructor may well accept text or numbers."""
    return inspect.isclass(hint) and hint.__module__.partition(".")[0] == "torch"


def _written(hint: Any) -> str:
    if inspect.isclass(hint) and not typing.get_args(hint):
        return (
            "nothing"
            if hint is type(None)
            else {"int": "a whole number", "str": "text"}.get(hint.__name__, hint.__name__)
        )
    return str(hint).replace("typing.", "").replace("NoneType", "None")
