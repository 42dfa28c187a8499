"""Names and splits: from what a file is called to the keys of a shard, from an episode to its split."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from datamodules.sources.base import SPLITS
from longtake.errors import ConfigError

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_SLUG_LENGTH = 48  # with the clip number and the longest member name it still fits the 100 bytes of a ustar header
_SPLIT_FOLDERS = {name: name for name in SPLITS} | {
    "valid": "val",
    "validation": "val",
    "eval": "val",
    "training": "train",
}


def printable(text: str) -> str:
    """Returns `text` fit for a log or a json file: file names need not be valid unicode."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def short_hash(text: str) -> str:
    """Returns 8 hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def slug(text: str) -> str:
    """Returns `text` with everything outside `[A-Za-z0-9_-]` replaced; a long or empty one gets a hash."""
    safe = _UNSAFE.sub("_", text).strip("_")
    if not safe or len(safe) > _SLUG_LENGTH:
        return f"{safe[: _SLUG_LENGTH - 9]}-{short_hash(text)}".lstrip("-")
    return safe


def unique_slugs(names: Mapping[str, str]) -> dict[str, str]:
    """Returns a slug for each thing; those whose slugs are alike (also apart from case) all get a hash of
    what they are.

    Args:
        names: for each thing, by what tells it apart, the text that its slug is made of.
    """
    slugs = {identity: slug(name) for identity, name in names.items()}
    counts = Counter(value.lower() for value in slugs.values())
    return {
        identity: value if counts[value.lower()] == 1 else f"{value[: _SLUG_LENGTH - 9]}-{short_hash(identity)}"
        for identity, value in slugs.items()
    }


def natural_key(text: str) -> tuple[Any, ...]:
    """Returns a sort key that puts `clip2` before `clip10`."""
    parts = re.split(r"([0-9]+)", text)
    return tuple((0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts) + (
        (2, 0, text),
    )


def folder_split(path: str) -> str | None:
    """Returns the split that the first folder of a relative path names (train, valid, test, ...), or None."""
    parts = PurePosixPath(path).parts
    return _SPLIT_FOLDERS.get(parts[0].lower()) if len(parts) > 1 else None


def draw_split(episode: str, *, val_fraction: float, test_fraction: float, seed: int) -> str:
    """Returns the split of an episode: a pure function of the seed and of its name."""
    draw = _draw(episode, seed)
    return "test" if draw < test_fraction else "val" if draw < test_fraction + val_fraction else "train"


def assign_splits(episodes: Iterable[str], *, val_fraction: float, test_fraction: float, seed: int) -> dict[str, str]:
    """Returns the split of each episode as `draw_split` gives it, so that new files do not move old ones.

    Exceptions for small sets: there is at least one episode for training, from two on at least one for
    validation where its fraction is above 0, and from three on likewise for the test split.
    """
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    order = sorted(set(episodes), key=lambda name: (_draw(name, seed), name))
    splits = {name: draw_split(name, **fractions, seed=seed) for name in order}
    if order and "train" not in splits.values() and val_fraction + test_fraction < 1:
        splits[order[-1]] = "train"
    for split, fraction, minimum in (("val", val_fraction, 2), ("test", test_fraction, 3)):
        if fraction > 0 and len(order) >= minimum and split not in splits.values():
            counts = Counter(splits.values())
            # From the largest split, so that filling one does not empty another.
            donor = next(name for name in order if counts[splits[name]] == max(counts.values()))
            splits[donor] = split
    return splits


def _draw(name: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raises ConfigError when the two do not leave a share for training."""
    for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"{value!r} is not a share; expected a number from 0 to 1. Change `source.{key}`.")
    if val_fraction + test_fraction > 1:
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} add up to more than 1. "
            "Change `source.val_fraction` or `source.test_fraction`."
        )


def plain(value: Any) -> Any:
    """Returns a setting as plain Python containers, whatever the configuration library wrapped it in."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value
