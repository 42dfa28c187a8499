"""The views of a spec: which take part, what they start from, how long and how fast their videos are."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from launcher.spec_schema import Spec, SpecError, ViewSpec, given_px
from launcher.view_inputs import start_frames
from longtake.errors import ConfigError
from longtake.generate_diffusion import DiffusionModel
from longtake.geometry import pixel_frames
from longtake.media.window_reader import ControlReader, FrameReader, probe, stride_of, taken
from longtake.rollout.sliding_plan import most_chunks, whole_length

logger = logging.getLogger("longtake")


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
        views = [view for view in spec.views if view.control_path] or [view for view in spec.views if view.input_path]
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
            try:
                given_px(override)
            except SpecError as error:
                raise ConfigError(
                    f"num_conditional_frames is {override!r}; expected {error}. Change `num_conditional_frames`."
                ) from None
            counts = [override] * len(self.views)
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
        files = [
            (f"{view.name}.{key}", path)
            for view in self.views
            for key, path in (("input_path", view.input_path), *self._controls_of(view))
            if path is not None
        ]
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
            for key, path in (("input_path", view.input_path), *self._controls_of(view)):
                if path is not None:
                    kind = "input" if key == "input_path" else "control"
                    counts[kind][f"{view.name}.{key}"] = probe(path, f"{view.name}.{key}").num_frames
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

    def _control_types(self) -> tuple[str, ...]:
        control = getattr(self.model.network, "control", None)
        return () if control is None else tuple(control.types)

    def _controls_of(self, view: ViewSpec) -> list[tuple[str, Path]]:
        """Returns (key, path) of the control videos of a view."""
        return [(f"control_path.{kind}" if kind else "control_path", path) for kind, path in view.control_path.items()]

    def _control(self, stride: int) -> ControlReader | None:
        types = self._control_types()
        readers: dict[str, list[FrameReader | None]] = {}
        for index, view in enumerate(self.views):
            for (key, path), kind in zip(self._controls_of(view), view.control_path, strict=True):
                kind = self._type_of(view, kind, types)
                of_type = readers.setdefault(kind, [None] * len(self.views))
                of_type[index] = FrameReader(
                    path, key=f"{view.name}.{key}", size=self.model.size, first=self.first, stride=stride
                )
        return ControlReader(readers, self.model.size) if readers else None

    def _type_of(self, view: ViewSpec, kind: str, types: tuple[str, ...]) -> str:
        key = f"{view.name}.control_path"
        if not types:
            raise ConfigError(
                f"{self.spec.where}: {key} is given, but these weights were trained without control. Leave out "
                f"`{key}`, or take other weights (`ckpt`)."
            )
        if (kind and kind not in types) or (not kind and len(types) > 1):
            found = f"of type {kind!r}" if kind else "a path without its type"
            raise ConfigError(
                f"{self.spec.where}: {key} is {found}; these weights know {', '.join(types)}. Write "
                f'{{"{types[0]}": path}}. Change `{key}`.'
            )
        return kind or next(iter(types))
