"""Several views without a spec: from a folder of `<view>.mp4`, from one file that holds them all, or from nothing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from launcher.recorded import VIDEO_SUFFIXES
from launcher.spec_jobs import Resolving
from launcher.spec_schema import Spec, ViewSpec
from launcher.spec_videos import given_counts, view_names
from launcher.view_inputs import split_views
from launcher.window_job import WindowJob, control_types, sliding_model
from longtake.errors import ConfigError, unknown_choice
from longtake.generate import read_start
from longtake.media.grid import fitted
from longtake.media.window_reader import probe


def file_job(cfg: DictConfig, model: Any) -> tuple[str, Callable[[], WindowJob]]:
    """Returns the name of the one start of `input=<folder>`, or of `n_views=<count>` with a file or without, and what
    makes it ready.

    Raises:
        ConfigError: the weights are for other views, or the files are.
    """
    diffusion = sliding_model(model)
    names = view_names(model)
    if cfg.n_views is not None and cfg.n_views > len(names):
        raise ConfigError(
            f"n_views is {cfg.n_views}; expected at most {len(names)} for these weights ({', '.join(names)}). Change "
            "`n_views`."
        )
    path = Path("nothing" if cfg.input in (None, "nothing") else cfg.input)
    if path.is_dir():
        spec = Spec(path.resolve().name, {}, _views_in(path, names, control_types(diffusion)), f"input {path}", path)
        return spec.name, lambda: _Folder(spec, cfg, diffusion).job()
    views = tuple(ViewSpec(name) for name in names[: cfg.n_views])
    spec = Spec(path.stem, {}, views, f"input {path}", path.parent)
    return spec.name, lambda: _OneFile(spec, cfg, diffusion).job()


def _views_in(folder: Path, names: tuple[str, ...], types: tuple[str, ...]) -> tuple[ViewSpec, ...]:
    """Returns the views of a folder: `<view>.mp4`, and their control videos `<type>/<view>.mp4`."""
    inputs = _by_view(folder, names)
    controls = {kind: _by_view(folder / kind, names) for kind in types if (folder / kind).is_dir()}
    found = []
    for name in names:
        control = {kind: paths[name] for kind, paths in controls.items() if name in paths}
        if name in inputs or control:
            found.append(ViewSpec(name, inputs.get(name), control))
    if not found:
        raise ConfigError(
            f"{folder} has no video of a view; expected files that are called as the views are, such as "
            f"{names[0]}.mp4 (views: {', '.join(names)}). Change `input`."
        )
    return tuple(found)


def _by_view(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Returns the videos of a folder by view. Raises ConfigError where one is called otherwise."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        if path.stem not in names:
            raise unknown_choice(f"view (the video {path})", path.stem, names, "input")
        if path.stem in found:
            raise ConfigError(f"{found[path.stem]} and {path} are both of view {path.stem}; expected one. Remove one.")
        found[path.stem] = path
    return found


class _Folder(Resolving):
    """A video a view. With control videos both begin at the same frame; without, the last frames are given."""

    def _num_frames(self, overlap: int, available: int | None) -> int:
        wanted = self.cfg.num_frames or available or self.chunk_px
        if available is not None and wanted > available:
            raise ConfigError(
                f"num_frames is {wanted}, but the control videos in {self.spec.folder} have {available} frames; "
                f"expected at most {available}. Change `num_frames`."
            )
        return wanted

    def _start(self, given: tuple[int, ...], stride: int) -> np.ndarray:
        if not any(self._controls_of(view) for view in self.views) and max(given):
            paths = [view.input_path for view in self.views if view.input_path is not None]
            self.first = max(0, probe(paths[0], "input").num_frames - 1 - stride * (max(given) - 1))
        return super()._start(given, stride)


class _OneFile(Resolving):
    """All views in one video, one after another in time or beside each other; its last frames are given. Or nothing."""

    def _active(self) -> tuple[ViewSpec, ...]:
        return self.spec.views

    @property
    def _is_nothing(self) -> bool:
        return self.cfg.input in (None, "nothing")

    def _given(self) -> tuple[int, ...]:
        asked = self.cfg.num_conditional_frames
        asked = int(not self._is_nothing) if asked is None else asked
        counts = given_counts(asked, self.names)
        if self._is_nothing and max(counts):
            raise ConfigError(
                f"num_conditional_frames is {max(counts)}, but there is nothing to take them from; expected 0. Give "
                "`input`, or leave out `num_conditional_frames`."
            )
        return counts

    def _rate(self) -> tuple[Fraction, int]:
        return Fraction(str(self._pick("fps", self.model.fps))), 1

    def _num_frames(self, overlap: int, available: int | None) -> int:
        return self.cfg.num_frames or self.chunk_px

    def _start(self, given: tuple[int, ...], stride: int) -> np.ndarray:
        height, width = self.model.size
        if self._is_nothing:
            return np.zeros((len(given), 0, height, width, 3), np.uint8)
        frames = split_views(read_start(Path(self.cfg.input)), len(given), self.cfg.input_layout)
        count = max(given)
        if frames.shape[1] < count:
            raise ConfigError(
                f"{self.cfg.input} has {frames.shape[1]} frames a view; {count} are to be given. Change "
                "`num_conditional_frames`, `input_layout` or `input`."
            )
        last = frames[:, frames.shape[1] - count :]
        return np.stack([view if view.shape[1:3] == (height, width) else fitted(view, height, width) for view in last])
