"""The views of a spec: which take part, what they start from, how long and how fast their videos are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from launcher.spec_schema import Spec, SpecError, ViewSpec, given_px
from launcher.view_inputs import start_frames
from launcher.window_job import control_types
from longtake.errors import ConfigError, unknown_choice
from longtake.generate_diffusion import DiffusionModel
from longtake.geometry import pixel_frames
from longtake.media.window_reader import ControlReader, EdgeReader, FrameReader, Windows, probe, stride_of, taken
from longtake.rollout.sliding_plan import most_chunks, whole_length

logger = logging.getLogger("longtake")
_EDGE = "edge"


@dataclass(frozen=True)
class ControlFile:
    """One control video of one view.

    Attributes:
        kind: its type; "" is the only one that the weights know.
        key: that holds its path, for messages.
        path: the file; of edges that are extracted, the view itself.
        extracted: whether edges are extracted from it.
    """

    kind: str
    key: str
    path: Path
    extracted: bool = False


def given_counts(value: Any, names: Sequence[str]) -> tuple[int, ...]:
    """Returns how many frames each view is given, from one number or from numbers by view (1 for those left out).

    Raises:
        ConfigError: something else than 0, 1 or 5, or a view that does not take part.
    """
    key = "num_conditional_frames"
    by_view: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else dict.fromkeys(names, value)
    for name, count in by_view.items():
        if name not in names:
            raise unknown_choice("view", str(name), names, key)
        try:
            given_px(count)
        except SpecError as error:
            raise ConfigError(f"{key} is {count!r}; expected {error}. Change `{key}`.") from None
    return tuple(by_view.get(name, 1) for name in names)


def view_names(model: Any) -> tuple[str, ...]:
    """Returns the names of the views that weights know, in rig order."""
    return tuple(model.spec.data.get("view_names") or ("main",))


class SpecVideos:
    """The views of one sample and their videos.

    Args:
        spec: the sample.
        cfg: of predict.py, for what the command line says.
        model: what will be rolled out.

    Attributes:
        notices: what the user should know.
        views: those that take part, in rig order.
    """

    def __init__(self, spec: Spec, cfg: DictConfig, model: DiffusionModel) -> None:
        self.spec, self.cfg, self.model = spec, cfg, model
        self.command_line = set(cfg.given)
        self.notices: list[str] = []
        self.types = control_types(model)
        self.views = self._active()
        self.names = tuple(view.name for view in self.views)
        self.first = int(spec.get("minimum_start_index", 0))
        self.trained = model.spec.trained_for
        self.chunk_px = pixel_frames(self.trained.chunk_lat, self.trained.ratio)

    def _pick(self, key: str, default: Any = None) -> Any:
        """Returns a value that has the same name, and null as default, on the command line."""
        given = self.cfg[key]
        return self.spec.get(key, default) if given is None else given

    # Views

    def _active(self) -> tuple[ViewSpec, ...]:
        """Returns the views that take part: those with control, or, where no view has any, those with an input."""
        spec = self.spec
        views = [view for view in spec.views if self._controls_of(view)]
        views = views or [view for view in spec.views if view.input_path]
        count = self._pick("n_views")
        if not views and count is not None:
            views = [ViewSpec(name) for name in view_names(self.model)[:count]]
        if not views:
            raise ConfigError(
                f"{spec.where}: no view has a control_path or an input_path; expected at least one of "
                f"{', '.join(view_names(self.model))}. Give `{view_names(self.model)[0]}.control_path`."
            )
        if count is not None and count != len(views):
            raise spec.error(
                "n_views", count, f"{len(views)}, as many views as have files ({', '.join(v.name for v in views)})"
            )
        left_out = [view.name for view in spec.views if view not in views]
        if left_out:
            self.notices.append(f"views without control take no part: {', '.join(left_out)}.")
        return tuple(views)

    def _given(self) -> tuple[int, ...]:
        """Returns how many frames each view is given, and checks that each has a video to take them from."""
        spec, override = self.spec, self.cfg.num_conditional_frames
        if override is not None:
            counts = list(given_counts(override, self.names))
        else:
            of_all, by_view = (
                spec.get("num_conditional_frames", 1),
                spec.get("num_conditional_frames_per_view", {}),
            )
            counts = [
                view.given_px if view.given_px is not None else by_view.get(view.name, of_all) for view in self.views
            ]
            if spec.get("no_cond_rear_tele"):
                self.notices.append(f"no_cond_rear_tele: the last view, {self.names[-1]}, is given no frames.")
                counts[-1] = 0
        for view, count in zip(self.views, counts, strict=True):
            if count and view.input_path is None:
                raise ConfigError(
                    f"{spec.where}: num_conditional_frames of {view.name} is {count}, and it has no input_path; "
                    f"expected a video to take them from. Give `{view.name}.input_path`, or set "
                    "`num_conditional_frames` to 0."
                )
        return tuple(counts)

    def _start(self, given: tuple[int, ...], stride: int) -> np.ndarray:
        """Returns the given frames, uint8 [v t h w c]; black after those of a view that is given fewer."""
        start = np.zeros((len(given), max(given), *self.model.size, 3), np.uint8)
        for index, (view, count) in enumerate(zip(self.views, given, strict=True)):
            if count and view.input_path is not None:
                start[index, :count] = start_frames(
                    view.input_path,
                    count,
                    self.model.size,
                    key=f"{view.name}.input_path",
                    first=self.first,
                    stride=stride,
                )
        return start

    # Time

    def _rate(self) -> tuple[Fraction, int]:
        """Returns frames per second of the result, and every how many frames of the files one is taken."""
        spec = self.spec
        wanted = Fraction(str(self._pick("fps", self.model.fps)))
        files = [(f"{view.name}.{key}", path) for view in self.views for key, path in self._files_of(view)]
        rates = {key: probe(path, key).fps for key, path in files}
        if not rates:
            return wanted, 1
        first = next(iter(rates))
        for key, rate in rates.items():
            if rate != rates[first]:
                raise ConfigError(
                    f"{spec.where}: {key} has {rate} frames a second and {first} has {rates[first]}; expected one rate "
                    f"for all videos. Change `{key}`."
                )
        loaded = spec.get("num_video_frames_loaded_per_view")
        if loaded is not None:
            stride = (loaded - 1) // max(1, spec.get("num_video_frames_per_view") - 1)
            self.notices.append(f"one of {stride} frames of the videos is taken, as the two counts of frames say.")
            return wanted, max(1, stride)
        stride = stride_of(rates[first], wanted)
        if stride is None:
            raise ConfigError(
                f"{spec.where}: fps is {wanted}, and {first} has {rates[first]} frames a second; expected a rate that "
                f"it is a whole multiple of, for example {rates[first]}. Change `fps`."
            )
        return wanted, stride

    def _available(self, stride: int) -> int | None:
        """Returns the frames of the control videos; None: there is no control. All views must have equally many."""
        counts: dict[str, dict[str, int]] = {"control": {}, "input": {}}
        for view in self.views:
            if view.input_path is not None:
                key = f"{view.name}.input_path"
                counts["input"][key] = probe(view.input_path, key).num_frames
            for own in self._controls_of(view):
                counts["control"][own.key] = probe(own.path, own.key).num_frames
        for found in counts.values():
            for key, count in found.items():
                first = next(iter(found))
                if count != found[first]:
                    raise ConfigError(
                        f"{self.spec.where}: {key} has {count} frames and {first} has {found[first]}; expected views "
                        f"of one length. Change `{key}`."
                    )
        if not counts["control"]:
            return None
        return taken(min(counts["control"].values()), self.first, stride)

    def _num_frames(self, overlap: int, available: int | None) -> int:
        """Returns the length of the video."""
        spec, chunk, wanted = self.spec, self.chunk_px, self.cfg.num_frames
        key = "num_frames"
        if wanted is None and spec.get("num_video_frames_per_view") is not None:
            key, wanted = "num_video_frames_per_view", spec.get("num_video_frames_per_view")
        is_long = bool(self._pick("enable_autoregressive", False))
        if not is_long and wanted is not None and wanted > chunk:
            raise ConfigError(
                f"{spec.where}: {key} is {wanted}, but enable_autoregressive is false, and a chunk has {chunk} frames. "
                f"Set `enable_autoregressive` to true, or lower `{key}`."
            )
        if wanted is not None:
            if available is not None and wanted > available:
                raise ConfigError(
                    f"{spec.where}: {key} is {wanted}, but the control videos have {available} frames; expected at "
                    f"most {available}. Change `{key}`."
                )
            return wanted
        if available is not None and available < chunk:
            raise ConfigError(
                f"{spec.where}: control_path has {available} frames, and a chunk has {chunk}; expected at least one "
                "chunk. Change `control_path`, or say with `num_frames` how many of them are wanted."
            )
        chunks = int(self._pick("num_chunks", 2)) if is_long else 1
        most = chunks if available is None else most_chunks(available, chunk, overlap)
        if chunks > most:
            logger.warning(
                "%s: num_chunks is %d, and the control videos have room for %d of them; %d are made.",
                spec.where,
                chunks,
                most,
                most,
            )
        return whole_length(min(chunks, most), chunk, overlap)

    # Control

    def _files_of(self, view: ViewSpec) -> Iterator[tuple[str, Path]]:
        """Yields (key, path) of the videos of a view that must have one rate; a mask of one frame has none."""
        if view.input_path is not None:
            yield "input_path", view.input_path
        for own in self._controls_of(view):
            yield own.key.removeprefix(f"{view.name}."), own.path
        for kind, path in view.mask_path.items():
            key = f"mask_path.{kind}" if kind else "mask_path"
            if probe(path, f"{view.name}.{key}").num_frames > 1:
                yield key, path

    def _controls_of(self, view: ViewSpec) -> list[ControlFile]:
        """Returns the control videos of a view. Edges come from the view itself where no file of them is given: where
        control_path says so ({"edge": null}), or where the weights know no other control and the view has none."""
        found, preset = [], self.spec.get("preset_edge_threshold")
        given = dict(view.control_path)
        if not given and self.types == (_EDGE,) and view.input_path is not None and preset != "none":
            given = {_EDGE: None}
        for kind, path in given.items():
            key = f"{view.name}.control_path.{kind}" if kind else f"{view.name}.control_path"
            if path is not None:
                found.append(ControlFile(kind, key, path))
                continue
            if kind != _EDGE or view.input_path is None or preset == "none":
                raise ConfigError(
                    f"{self.spec.where}: {key} is null; expected a path: only edges can be extracted, from an "
                    f"input_path, and where preset_edge_threshold is not none. Change `{key}`."
                )
            found.append(ControlFile(kind, f"{view.name}.input_path", view.input_path, extracted=True))
        return found

    def _control(self, stride: int) -> ControlReader | None:
        readers: dict[str, list[Windows | None]] = {}
        masks: dict[str, list[Windows | None]] = {}
        none: list[Windows | None] = [None] * len(self.views)
        preset = self.spec.get("preset_edge_threshold") or "medium"
        for index, view in enumerate(self.views):
            for own in self._controls_of(view):
                kind = self._type_of(own.key, own.kind)
                frames = self._reader(own.path, own.key, stride)
                readers.setdefault(kind, list(none))[index] = EdgeReader(frames, preset) if own.extracted else frames
        for index, view in enumerate(self.views):
            for kind, path in view.mask_path.items():
                key = f"{view.name}.mask_path"
                for each in [self._type_of(key, kind)] if kind else list(readers):
                    masks.setdefault(each, list(none))[index] = self._reader(path, key, stride)
        if not readers:
            return None
        extracted = [view.name for view in self.views if any(own.extracted for own in self._controls_of(view))]
        if extracted:
            self.notices.append(f"edges ({preset}) are extracted from the input of {', '.join(extracted)}.")
        return ControlReader(readers, self.model.size, {kind: own for kind, own in masks.items() if kind in readers})

    def _reader(self, path: Path, key: str, stride: int) -> FrameReader:
        return FrameReader(path, key=key, size=self.model.size, first=self.first, stride=stride)

    def _type_of(self, key: str, kind: str) -> str:
        """Returns the type of control that is meant. Raises ConfigError where the weights know no such type."""
        if not self.types:
            raise ConfigError(
                f"{self.spec.where}: {key} is given, but these weights were trained without control. Leave out "
                f"`{key}`, or take other weights (`ckpt`)."
            )
        if (kind and kind not in self.types) or (not kind and len(self.types) > 1):
            found = f"of type {kind!r}" if kind else "a path without its type"
            key = key.removesuffix(f".{kind}")
            raise ConfigError(
                f"{self.spec.where}: {key} is {found}; these weights know {', '.join(self.types)}. Write "
                f'{{"{self.types[0]}": path}}. Change `{key}`.'
            )
        return kind or next(iter(self.types))
