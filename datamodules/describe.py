"""What weights should remember of the data that they were trained on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from datamodules.shards import DatasetInfo, iterate_entries, read_member
from longtake.errors import BadSampleError

_SAMPLES = 64


def describe(info: DatasetInfo, split: str) -> dict[str, Any]:
    """Returns {"action_names", "action_typical", "view_names", "rig", "tokens", "text"} of a set, plain JSON.

    "rig" says where the views belong; None for one view. "tokens" is what the set says of its tokens; None where it has
    none. "text" is the config node of the encoder that made cached texts, with its vocabulary; None where there are
    none.

    Args:
        info: the set.
        split: whose actions are looked at.
    """
    source = info.source
    return {
        "action_names": list(source.action_names),
        "action_typical": typical_sizes(info, split) if source.action_names else [],
        "view_names": list(source.view_names),
        "rig": source.rig,
        "tokens": source.tokens,
        "text": (source.latents or {}).get("text"),
    }


def typical_sizes(info: DatasetInfo, split: str) -> list[float]:
    """Returns the mean magnitude of each action column where it is not zero, in some samples; 1 where it always is."""
    columns = len(info.source.action_names)
    total, count = np.zeros(columns), np.zeros(columns)
    for table in action_tables(info, split, _SAMPLES):
        sizes = np.abs(np.asarray(table, np.float64)).reshape(-1, columns)
        total += sizes.sum(0)
        count += (sizes > 0).sum(0)
    return [float(value) for value in np.where(count > 0, total / np.maximum(count, 1), 1.0)]


def action_tables(info: DatasetInfo, split: str, count: int) -> Iterator[np.ndarray]:
    """Yields the actions [t a] of about `count` samples, spread evenly over a split; damaged ones are left out."""
    every = max(1, info.split(split).num_samples // count)
    for number, (shard, entry) in enumerate(iterate_entries(info, split)):
        if number % every:
            continue
        try:
            with shard.open("rb", buffering=0) as file:
                yield np.load(io.BytesIO(read_member(file, entry, "actions.npy")), allow_pickle=False)
        except (BadSampleError, OSError, ValueError):
            continue  # counted and named by whoever trains on it
