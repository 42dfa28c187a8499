"""Control videos of a sample: those that a set holds, and edges, which are extracted where it holds none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.shards import control_member, video_member
from datamodules.sources.base import SourceInfo
from longtake.errors import unknown_choice
from longtake.media.edges import edge_video
from longtake.media.read import read_video

if TYPE_CHECKING:
    from datamodules.loading.reading import Sample

EDGE = "edge"


def check_control(kinds: Iterable[str], source: SourceInfo, root: Path, key: str) -> None:
    """Checks that a set has control videos, or that they can be extracted.

    Args:
        kinds: control types.
        source: of the set.
        root: its folder, for the message.
        key: configuration key that holds `kinds`.

    Raises:
        ConfigError: for another type, with those that there are.
    """
    known = list(dict.fromkeys([*source.control_types, EDGE]))
    for kind in kinds:
        if kind not in known:
            raise unknown_choice(f"control type (of {root})", kind, known, key)


def is_extracted(kind: str, source: SourceInfo) -> bool:
    """Returns whether a control type is extracted from the views, and not in the set."""
    return kind == EDGE and EDGE not in source.control_types


def control_frames(
    sample: Sample, kind: str, source: SourceInfo, *, views: Sequence[str] | None = None
) -> list[np.ndarray | None]:
    """Returns the control video of each view, uint8 [t h w c]; None where a view has none.

    Args:
        sample: of the set.
        kind: a type that `check_control` accepts.
        source: of the set.
        views: names of the views; None: all of the set.

    Raises:
        BadSampleError: a video cannot be read.
    """
    found: list[np.ndarray | None] = []
    for view in views or source.view_names:
        if is_extracted(kind, source):
            member = video_member(view, source.view_names)
            found.append(edge_video(read_video(sample.read(member), verified=sample.verified)))
            continue
        member = control_member(kind, view)
        has = sample.has(member)
        found.append(read_video(sample.read(member), verified=sample.verified) if has else None)
    return found
