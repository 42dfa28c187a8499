"""The files of one video of a rollout, written chunk by chunk: views, grids, actions, comparison, contact sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from longtake.media.gif import comparison, save_gif
from longtake.media.grid import contact_sheet, evenly
from longtake.media.overlay import ActionPanel
from longtake.media.view_files import ViewFiles, ViewLayout, wide
from longtake.media.write import VideoWriter, save_image
from longtake.streaming import VideoChunk
from longtake.truth import TrueFrames

_SHEET_FRAMES = 16
_GIF_FRAMES = 240  # a GIF is held in memory, and players read all of it


class SampleFiles:
    """Writes the files of one video; what is held does not grow with its length (but for the GIF, which ends early).

    Args:
        folder: where they go.
        fps: frames per second.
        num_frames: of the video.
        layout: of its views; None: by their numbers, row by row.
        actions: of all its frames, numbers [t a]; None: no output_actions.mp4.
        action_names: names of their columns.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fps: Fraction,
        num_frames: int,
        layout: ViewLayout | None = None,
        actions: np.ndarray | None = None,
        action_names: Sequence[str] = (),
    ) -> None:
        self.folder, self.fps, self.num_frames, self._layout = folder, fps, num_frames, layout
        self._panel = ActionPanel(actions, action_names) if actions is not None and action_names else None
        self._shown = set(evenly(num_frames, min(_SHEET_FRAMES, num_frames)))
        self._stack = contextlib.ExitStack()
        self._writers: dict[str, VideoWriter] = {}
        self._views: ViewFiles | None = None
        self._sheet: list[np.ndarray] = []
        self._written = 0
        self._gif: list[np.ndarray] = []

    def write(self, chunk: VideoChunk, sample: int, true: TrueFrames | None) -> None:
        """Appends what a chunk adds to a sample. Raises DataError where a file cannot be written."""
        views = chunk.frames[sample]
        if self._views is None:
            layout = self._layout or ViewLayout(tuple(f"view_{index}" for index in range(len(views))))
            self._views = self._stack.enter_context(ViewFiles(self.folder, fps=self.fps, layout=layout))
        self._views.write(views, chunk.control)
        frames = wide(views)
        self._written = chunk.stop
        self._sheet += [frames[n - chunk.start].copy() for n in range(chunk.start, chunk.stop) if n in self._shown]
        if self._panel is not None:
            self._append("output_actions.mp4", self._panel.under(frames, chunk.start))
        if true is not None and true.frames.shape[1]:
            self._compare(frames, wide(true.frames), several=len(views) > 1)

    def _compare(self, frames: np.ndarray, truth: np.ndarray, *, several: bool) -> None:
        """Appends generated | truth | difference; the truth may end earlier. Several views are too wide for a GIF."""
        pictures = comparison(np.ascontiguousarray(frames[: len(truth)]), np.ascontiguousarray(truth))
        self._append("comparison.mp4", pictures)
        room = 0 if several else _GIF_FRAMES - sum(map(len, self._gif))
        if room > 0:
            self._gif.append(pictures[:room])

    def _append(self, name: str, frames: np.ndarray) -> None:
        if name not in self._writers:
            height, width = frames.shape[1:3]
            writer = VideoWriter(self.folder / name, fps=self.fps, height=height, width=width)
            self._writers[name] = self._stack.enter_context(writer)
        self._writers[name].write(frames)

    def finish(self) -> None:
        """Writes the pictures of the whole: contact sheet and GIF."""
        if self._gif:
            save_gif(self.folder / "comparison.gif", np.concatenate(self._gif), fps=self.fps)
        if self._sheet:
            rows = [(f"{self.folder.name}  {self._written} frames", np.stack(self._sheet))]
            save_image(self.folder / "output.png", contact_sheet(rows, columns=_SHEET_FRAMES, numbers=False))

    def __enter__(self) -> SampleFiles:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the videos, or removes them after an exception."""
        self._stack.__exit__(kind, error, trace)
