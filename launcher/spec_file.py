"""Reads multi-view spec files: .json with one object (or a list of them), .jsonl with one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.spec_schema import Spec, check_finite, parse_spec
from longtake.errors import ConfigError

_MAX_BYTES = 1 << 24


def read_specs(
    paths: Sequence[str | Path], view_names: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> list[Spec]:
    """Returns the samples of spec files, in order.

    Args:
        paths: of .json and .jsonl files.
        view_names: of the rig of the weights, in its order.
        overrides: values that every sample takes instead of its own, by key.

    Raises:
        ConfigError: a file cannot be read, a sample is wrong, or two have one name.
    """
    specs = [spec for path in paths for spec in _read(Path(path), tuple(view_names), overrides or {})]
    if not specs:
        raise ConfigError(f"{', '.join(map(str, paths))} holds no sample; expected at least one. Change `spec`.")
    first: dict[str, Spec] = {}
    for spec in specs:
        if spec.name in first:
            raise ConfigError(
                f"{spec.where}: name is {spec.name!r}, and so is that of {first[spec.name].where}; expected different "
                "names, since each names a folder. Change `name`."
            )
        first[spec.name] = spec
    return specs


def _read(path: Path, view_names: tuple[str, ...], overrides: Mapping[str, Any]) -> Iterator[Spec]:
    rows = list(_rows(path))
    for number, (where, content) in enumerate(rows):
        content = {**content, **overrides} if isinstance(content, dict) else content
        name = path.stem if len(rows) == 1 else f"{path.stem}-{number:03d}"
        yield parse_spec(content, where=where, name=name, folder=path.parent.resolve(), view_names=view_names)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where it stands, content) of every sample."""
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{path} ends in {path.suffix!r}; expected .json or .jsonl. Change `spec`.")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the spec {path} cannot be read ({reason}). Change `spec`.") from error
    if path.suffix == ".json":
        content = _parsed(text, str(path))
        several = isinstance(content, list)
        for number, entry in enumerate(content if several else [content]):
            yield (f"{path}, sample {number}" if several else str(path)), entry
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=check_finite)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON ({error}); expected an object in JSON. Change `spec`.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; a key that stands there twice is refused, since one of its values would be lost."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the key `{twice}` stands there twice")
    return dict(pairs)
