"""The files of a video of several views, written chunk by chunk: side by side, each by itself, as a grid in space."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from longtake.media.grid import hstack, view_grid, vstack
from longtake.media.write import VideoWriter

Place = tuple[int, int]


@dataclass(frozen=True)
class ViewLayout:
    """What the views of a video are called and where they belong.

    Attributes:
        names: of the views, in the order of the view axis.
        places: (row, column) of each in the grid, as the rig has them; None: row by row.
        combined: whether output.mp4 is written.
        individual: whether a file is written for each view.
        grid: whether the grids are written.
    """

    names: tuple[str, ...]
    places: Mapping[str, Place] | None = None
    combined: bool = True
    individual: bool = True
    grid: bool = True

    @property
    def placement(self) -> dict[str, Place]:
        """(row, column) of each view."""
        if self.places is not None and all(name in self.places for name in self.names):
            return {name: self.places[name] for name in self.names}
        columns = math.ceil(math.sqrt(len(self.names)))
        return {name: divmod(index, columns) for index, name in enumerate(self.names)}

    @classmethod
    def of_rig(cls, names: Sequence[str], rig: Mapping[str, object] | None) -> ViewLayout:
        """Returns the layout of views of a rig, `{"views": {name: {"place": [row, column]}}}`; places may be absent."""
        views = (rig or {}).get("views")
        places: dict[str, Place] = {}
        for name, settings in views.items() if isinstance(views, Mapping) else ():
            place = settings.get("place") if isinstance(settings, Mapping) else None
            if isinstance(place, Sequence) and len(place) == 2:
                places[str(name)] = (int(place[0]), int(place[1]))
        return cls(tuple(names), places or None)

    def writing(self, combined: bool | None) -> ViewLayout:
        """Returns this layout with or without output.mp4 of several views; None: as it is."""
        return self if combined is None else dataclasses.replace(self, combined=combined)


def wide(views: np.ndarray) -> np.ndarray:
    """Returns views [v t h w c] side by side, [t h w c]."""
    return hstack(list(views)) if len(views) > 1 else views[0]


def grid_of(views: np.ndarray, layout: ViewLayout, prefix: str = "") -> np.ndarray:
    """Returns views [v t h w c] where they belong, each under its name, uint8 [t h w c]."""
    placement = layout.placement
    named = {prefix + name: frames for name, frames in zip(layout.names, views, strict=True)}
    return view_grid(named, {prefix + name: placement[name] for name in layout.names})


class ViewFiles:
    """Writes the files of one video with constant memory; they appear under their names when they are whole.

    output.mp4 has the views side by side. Of several views there are also views/<view>.mp4, output_grid.mp4, and with
    control output_with_control_grid.mp4: a grid of each control type above that of the generated views.

    Args:
        folder: where they go.
        fps: frames per second.
        layout: of the views.
    """

    def __init__(self, folder: Path, *, fps: Fraction, layout: ViewLayout) -> None:
        self.folder, self.fps, self.layout = folder, fps, layout
        self._stack = contextlib.ExitStack()
        self._writers: dict[str, VideoWriter] = {}

    def write(self, views: np.ndarray, control: Mapping[str, np.ndarray] | None = None) -> None:
        """Appends frames.

        Args:
            views: uint8 [v t h w c].
            control: of the same frames, by type, each of the shape of `views`; given always or never.

        Raises:
            DataError: a file cannot be written.
        """
        layout, several = self.layout, len(views) > 1
        if layout.combined or not several:
            self._append("output.mp4", wide(views))
        if several and layout.individual:
            for name, frames in zip(layout.names, views, strict=True):
                self._append(f"views/{name}.mp4", frames)
        if layout.grid and (several or control):
            generated = grid_of(views, layout)
            if several:
                self._append("output_grid.mp4", generated)
            if control:
                panels = [grid_of(frames, layout, f"{kind}: ") for kind, frames in control.items()]
                self._append("output_with_control_grid.mp4", vstack([*panels, generated]))

    def _append(self, name: str, frames: np.ndarray) -> None:
        if name not in self._writers:
            height, width = frames.shape[1:3]
            writer = VideoWriter(self.folder / name, fps=self.fps, height=height, width=width)
            self._writers[name] = self._stack.enter_context(writer)
        self._writers[name].write(frames)

    def __enter__(self) -> ViewFiles:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the files, or removes them after an exception."""
        self._stack.__exit__(kind, error, trace)
