"""From what the user names to tars: folders, patterns, lists, and urls where they are allowed."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from datamodules.sources.naming import natural_key
from longtake.errors import ConfigError, DataError

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive


def expand_inputs(inputs: str | list[str] | None, *, allow_remote: bool) -> list[str]:
    """Returns the tars that the input names, each once, in order.

    Args:
        inputs: folders, files, patterns (`*`, `{000..009}`) or urls, one or a list of them.
        allow_remote: the user's word that urls may be opened; a `pipe:` url runs a shell command.

    Raises:
        ConfigError: nothing was named, a url without consent, or a file or folder that does not exist.
        DataError: no tar was found.
    """
    if not inputs:
        raise ConfigError("no input was given; expected a folder of tars, a pattern or a list. Change `input`.")
    found: list[str] = []
    for entry in [inputs] if isinstance(inputs, str) else inputs:
        for path in _braces(str(entry)):
            found += _tars_of(path, allow_remote)
    if not found:
        raise DataError(f"no tar in {inputs}; expected files ending in {', '.join(TAR_ENDINGS)}. Change `input`.")
    return list(dict.fromkeys(found))


@contextmanager
def open_tar(tar: str, *, allow_remote: bool) -> Iterator[BinaryIO]:
    """Opens a tar for reading from its beginning; a url only with `allow_remote`."""
    if not is_url(tar):
        with Path(tar).open("rb") as file:
            yield file
        return
    if not allow_remote:
        raise _remote_error(tar)
    from webdataset.gopen import gopen  # imports torch: only where a url is really opened

    with gopen(tar, "rb") as remote:
        yield cast(BinaryIO, remote)


def is_url(path: str) -> bool:
    """Returns whether a path is a url, `pipe:` included."""
    return _URL.match(path) is not None


def _tars_of(entry: str, allow_remote: bool) -> list[str]:
    if is_url(entry):
        if not allow_remote:
            raise _remote_error(entry)
        return [entry]
    path = Path(entry).expanduser().absolute()
    if path.is_dir():
        inside = [
            p for p in path.rglob("*") if p.name.endswith(TAR_ENDINGS) and p.is_file() and not p.name.startswith(".")
        ]
        return sorted((str(p) for p in inside), key=natural_key)
    if path.is_file():
        return [str(path)]
    if glob.has_magic(entry):
        found = (str(p) for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
        return sorted(found, key=natural_key)
    raise ConfigError(
        f"input {entry!r} does not exist; expected a folder of tars, a tar, a pattern or a url. Change `input`."
    )


def _braces(pattern: str) -> list[str]:
    """Returns what a pattern with `{a,b}` or `{000..009}` stands for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None or is_url(pattern) and pattern.startswith("pipe:"):
        return [pattern]
    bounds = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", match[1])
    if bounds:
        first, last, width = int(bounds[1]), int(bounds[2]), len(bounds[1])
        step = 1 if last >= first else -1
        parts = [str(number).zfill(width) for number in range(first, last + step, step)]
    elif "," in match[1]:
        parts = match[1].split(",")
    else:
        raise ConfigError(f"{{{match[1]}}} is neither {{first..last}} nor {{a,b}}. Change `input`.")
    return [whole for part in parts for whole in _braces(pattern[: match.start()] + part + pattern[match.end() :])]


def _remote_error(url: str) -> ConfigError:
    what = "runs a shell command" if url.startswith("pipe:") else "is opened over the network"
    return ConfigError(
        f"{url!r} {what}; expected local files. Change `input`, or allow it with `source.allow_remote=true`."
    )
