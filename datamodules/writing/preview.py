"""A contact sheet of a set: a few samples of every split, with actions, views and control video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.shards import DatasetInfo, SampleEntry, control_member, read_index, read_member, video_member
from datamodules.writing.sample_rules import load_npy
from longtake.errors import BadSampleError, DataError
from longtake.media.grid import contact_sheet, evenly, side_by_side, view_grid
from longtake.media.overlay import draw_actions
from longtake.media.read import read_video

_COLUMNS, _RIG_COLUMNS = 8, 5
_TILE_WIDTH, _RIG_TILE_WIDTH = 128, 64


def dataset_sheet(info: DatasetInfo, samples_per_split: int | None = None) -> np.ndarray | None:
    """Returns an image with a labelled row a sample (and one for each type of its control), uint8 [h w c].

    Samples that cannot be read are left out; None where there is nothing to show. Without a number, four samples
    a split are shown, two where there are several views.
    """
    if samples_per_split is None:
        samples_per_split = 4 if len(info.source.view_names) == 1 else 2
    rows = [row for split in info.splits for row in _split_rows(info, split, samples_per_split)]
    return contact_sheet(rows, columns=_COLUMNS, numbers=False) if rows else None


def _split_rows(info: DatasetInfo, split: str, count: int) -> Iterator[tuple[str, np.ndarray]]:
    total = info.splits[split].num_samples
    for number in sorted(set(evenly(total, min(count, total)))) if total else ():
        try:
            path, entry = _entry(info, split, number)
            with path.open("rb") as file:
                members = {name: read_member(file, entry, name) for name in entry.members}
            yield from _sample_rows(info, split, entry, members)
        except (BadSampleError, DataError, OSError):
            continue  # the sheet shows what is there; what is wrong is told by check_shards


def _entry(info: DatasetInfo, split: str, number: int) -> tuple[Path, SampleEntry]:
    for path, shard in zip(info.shard_paths(split), info.splits[split].shards, strict=True):
        if number < shard.num_samples:
            entries = read_index(path, shard)
            if number >= len(entries):
                raise DataError(f"the index of {path} is shorter than dataset.json says")
            return path, entries[number]
        number -= shard.num_samples
    raise DataError(f"split {split!r} has fewer samples than dataset.json says")


def _sample_rows(
    info: DatasetInfo, split: str, entry: SampleEntry, members: dict[str, bytes]
) -> Iterator[tuple[str, np.ndarray]]:
    names = info.source.view_names
    picked = evenly(entry.num_frames, min(_COLUMNS if len(names) == 1 else _RIG_COLUMNS, entry.num_frames))
    views = {view: video_member(view, names) for view in names}
    frames = _tiles(info, views, members, picked)
    if frames is None:
        return
    if "actions.npy" in members:
        actions = load_npy(members["actions.npy"])
        ranges = {name: _range(actions[:, i]) for i, name in enumerate(info.source.action_names)}
        frames = draw_actions(frames, actions[picked], info.source.action_names, ranges=ranges)
    caption = members.get("txt", b"").decode("utf-8", "replace").split("\n")[0]
    shown = f"frames {', '.join(map(str, picked))} of {entry.num_frames}"
    yield "   ".join(filter(None, (split, entry.key, shown, caption))), frames
    for kind in info.source.control_types:
        control = _tiles(info, {view: control_member(kind, view) for view in names}, members, picked)
        if control is not None:
            yield f"{split}   {entry.key}   control {kind}", control


def _range(column: np.ndarray) -> tuple[float, float]:
    """Returns the least and largest value in the clip; (0, 1) for a button, also one never pressed."""
    return (0.0, 1.0) if np.isin(column, (0, 1)).all() else (float(column.min()), float(column.max()))


def _tiles(
    info: DatasetInfo, wanted: dict[str, str], members: dict[str, bytes], picked: list[int]
) -> np.ndarray | None:
    """Returns the picked frames, all views in one picture, or None where the sample has none."""
    videos = {
        view: read_video(members[name], frames=picked, backend="pyav")
        for view, name in wanted.items()
        if name in members
    }
    if len(info.source.view_names) == 1 or not videos:
        return next(iter(videos.values()), None)
    placement = _placement(info.source.rig, list(videos))
    if placement is None:
        return side_by_side(videos, min_width=_RIG_TILE_WIDTH)
    return view_grid(videos, placement, min_width=_RIG_TILE_WIDTH)


def _placement(rig: dict[str, Any] | None, views: list[str]) -> dict[str, tuple[int, int]] | None:
    """Returns (row, column) of every view where the rig states them all: {"views": {name: {"place": [1, 0]}}}."""
    try:
        places = {view: (rig or {})["views"][view]["place"] for view in views}
        cells = {view: (int(row), int(column)) for view, (row, column) in places.items()}
    except (KeyError, TypeError, ValueError):  # a rig is free-form: without places the views stand in a row
        return None
    return cells if len(set(cells.values())) == len(cells) else None
