"""What weights should remember of the data that they were trained on."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from datamodules.shards import DatasetInfo, iterate_entries, read_member
from longtake.errors import BadSampleError

_SAMPLES = 64


def describe(info: DatasetInfo, split: str) -> dict[str, Any]:
    """Returns {"action_names", "action_typical", "view_names", "text"} of a set, plain JSON.

    "text" is the config node of the encoder that made cached texts, with its vocabulary; None where there are none.

    Args:
        info: the set.
        split: whose actions are looked at.
    """
    source = info.source
    return {
        "action_names": list(source.action_names),
        "action_typical": typical_sizes(info, split) if source.action_names else [],
        "view_names": list(source.view_names),
        "text": (source.latents or {}).get("text"),
    }


def typical_sizes(info: DatasetInfo, split: str) -> list[float]:
    """Returns the mean magnitude of each action column where it is not zero, in some samples; 1 where it always is."""
    columns = len(info.source.action_names)
    total, count = np.zeros(columns), np.zeros(columns)
    num_samples = info.split(split).num_samples
    every = max(1, num_samples // _SAMPLES)
    for number, (shard, entry) in enumerate(iterate_entries(info, split)):
        if number % every:
            continue
        try:
            with shard.open("rb", buffering=0) as file:
                table = np.load(io.BytesIO(read_member(file, entry, "actions.npy")), allow_pickle=False)
        except (BadSampleError, OSError, ValueError):
            continue  # counted and named by whoever trains on it
        sizes = np.abs(np.asarray(table, np.float64)).reshape(-1, columns)
        total += sizes.sum(0)
        count += (sizes > 0).sum(0)
    return [float(value) for value in np.where(count > 0, total / np.maximum(count, 1), 1.0)]
