"""Into which split a tar goes: kept, read from its name, drawn, or left to the episodes in it."""

from __future__ import annotations

import re
from pathlib import Path

from datamodules.shards import DatasetInfo
from datamodules.sources.base import SPLITS
from datamodules.sources.naming import assign_splits, folder_split
from longtake.errors import ConfigError

TAR_SPLITS = ("auto", "set", "name", "shard", "episode")


def split_tars(
    tars: list[str],
    *,
    how: str,
    known: DatasetInfo | None,
    has_episodes: bool,
    fractions: tuple[float, float],
    seed: int,
) -> tuple[str, dict[str, str]]:
    """Returns the way in which the tars are split, and the split of each; a tar that is left out is split by
    episode.

    Args:
        tars: the tars.
        how: one of `TAR_SPLITS`.
        known: the Longtake set that the tars are of, or None.
        has_episodes: the user said how to tell the episode of a sample.
        fractions: shares of the validation and the test split.
        seed: of the draw.

    Raises:
        ConfigError: `how` does not fit these tars.
    """
    named = {tar: split for tar in tars if (split := _named_split(tar))}
    if how == "auto":
        if known:
            how = "set"
        elif len(named) == len(tars) and len(set(named.values())) > 1:
            how = "name"
        else:
            how = "episode" if has_episodes or len(tars) == 1 else "shard"
    if how == "set":
        if known is None:
            raise ConfigError(
                "source.split_by=set keeps the splits of a Longtake set, and the input is none. "
                "Change `source.split_by`."
            )
        return how, {str(path): split for split in known.splits for path in known.shard_paths(split)}
    if how == "name":
        if len(named) < len(tars):
            tar = next(tar for tar in tars if tar not in named)
            raise ConfigError(
                f"{tar} names no split; expected {', '.join(SPLITS)} in its name. Change `source.split_by`."
            )
        return how, named
    if how == "shard":
        return how, assign_splits(tars, val_fraction=fractions[0], test_fraction=fractions[1], seed=seed)
    return how, {}


def _named_split(tar: str) -> str | None:
    """Returns the split in the folder or the first word of a name (`val/01.tar`, `val-01.tar`), or None."""
    path = Path(tar)
    word = re.split(r"[^A-Za-z]", path.name)[0]
    return folder_split(f"{path.parent.name}/x") or folder_split(f"{word}/x")
