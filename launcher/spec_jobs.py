"""A spec, the command line and the weights together: what is generated, worked out and checked before anything runs.

A value on the command line wins over one of the spec, which wins over the default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from launcher.spec_file import read_specs
from launcher.spec_schema import Spec, ViewSpec, checked, given_px
from launcher.spec_videos import SpecVideos, view_names
from launcher.view_inputs import is_text_file, read_prompt_embeddings, read_prompt_lines, split_views
from longtake.actions import resolve_actions
from longtake.errors import ConfigError
from longtake.generate import read_start
from longtake.generate_diffusion import DiffusionModel
from longtake.generate_windows import WindowInputs
from longtake.media.grid import fitted
from longtake.media.view_files import ViewLayout
from longtake.pretrained.weights_file import build
from longtake.rollout.sliding_plan import check_sliding
from longtake.rollout.sliding_window import SlidingWindowRollout
from longtake.rollout_report import SampleReport, write_json, write_rollout

logger = logging.getLogger("longtake")


@dataclass(frozen=True, kw_only=True)
class WindowJob:
    """One video of several views, ready to be generated.

    Attributes:
        name: of the sample.
        folder: where its files go; None: a folder of its name in that of the prediction.
        inputs: what is given and told.
        given_px: how many frames each view is given.
        num_frames: length of the video.
        rollout: how it is rolled out.
        fps: frames per second of the files.
        layout: of the views.
        seed: of the noise.
        notices: what the user should know.
        resolved: the spec with every value that is used, plain JSON.
    """

    name: str
    folder: Path | None
    inputs: WindowInputs
    given_px: tuple[int, ...]
    num_frames: int
    rollout: SlidingWindowRollout
    fps: Fraction
    layout: ViewLayout
    seed: int
    notices: tuple[str, ...]
    resolved: dict[str, Any]


def spec_paths(cfg: DictConfig) -> list[str]:
    """Returns the files of `spec`. Raises ConfigError where it is something else."""
    value = OmegaConf.to_container(cfg.spec) if OmegaConf.is_list(cfg.spec) else [cfg.spec]
    assert isinstance(value, list)
    if not value or not all(isinstance(path, str) for path in value):
        raise ConfigError(f"spec is {cfg.spec!r}; expected a .json or .jsonl file, or a list of them. Change `spec`.")
    return [str(path) for path in value]


def spec_jobs(cfg: DictConfig, model: Any) -> Iterator[tuple[str, Callable[[], WindowJob]]]:
    """Yields the name of every sample of the spec files, and what makes it ready (its frames are read only then).

    Without keep_going all samples are checked before the first one is yielded.

    Raises:
        ConfigError: a file or a sample is wrong, or the weights cannot do it; from the function that is yielded, too.
    """
    diffusion = _sliding_model(model)
    specs = read_specs(spec_paths(cfg), view_names(model))
    if not cfg.keep_going:
        for spec in specs:
            _Resolving(spec, cfg, diffusion).job()
    for spec in specs:
        yield spec.name, lambda spec=spec: _Resolving(spec, cfg, diffusion).job()


def file_job(cfg: DictConfig, model: Any) -> tuple[str, Callable[[], WindowJob]]:
    """Returns the name of the one start of `input=<video of all views> n_views=<count>`, and what makes it ready."""
    diffusion = _sliding_model(model)
    path = Path(cfg.input)
    names = view_names(model)
    if cfg.n_views > len(names):
        raise ConfigError(
            f"n_views is {cfg.n_views}; expected at most {len(names)} for these weights ({', '.join(names)}). Change "
            "`n_views`."
        )
    views = tuple(ViewSpec(name) for name in names[: cfg.n_views])
    spec = Spec(path.stem, {}, views, f"input {path}", path.parent)
    return path.stem, lambda: _OneFile(spec, cfg, diffusion).job()


def make_views(cfg: DictConfig, model: Any, job: WindowJob, folder: Path) -> list[SampleReport]:
    """Makes the videos of one sample and returns their figures. The spec that was used is written beside them.

    Raises:
        ConfigError: the weights cannot do it.
        DataError: a file cannot be written.
    """
    for notice in job.notices:
        logger.info("%s: %s", job.name, notice)
    model.use(rollout=job.rollout)
    generation = model.generate_views(
        job.inputs,
        job.given_px,
        num_frames=job.num_frames,
        seed=job.seed,
        num_samples=cfg.num_samples,
        name="",  # the seed alone names the noise: a sample stays as it is under another name, or in another batch
    )
    place = job.folder or folder / job.name
    if job.folder is not None and (place / "metrics.json").exists():
        raise ConfigError(f"{place} holds a prediction already; expected a new folder. Change `output_dir`.")
    folders = [place] if cfg.num_samples == 1 else [place / f"sample_{n:03d}" for n in range(cfg.num_samples)]
    reports = write_rollout(generation, folders, fps=job.fps, only_eval=cfg.only_eval, layout=job.layout)
    write_json(place / "spec.json", job.resolved)
    logger.info("%s: %s, %d frames of %d views", place, job.name, job.num_frames, len(job.layout.names))
    return reports


def _sliding_model(model: Any) -> DiffusionModel:
    if not isinstance(model, DiffusionModel) or not isinstance(model.rollout, SlidingWindowRollout):
        raise ConfigError(
            f"the rollout is {model.rollout.kind}, and spec or n_views is given; a spec is rolled out by sliding "
            "windows, and so is n_views. Set rollout=sliding_window, or leave out `spec` and `n_views`."
        )
    return model


class _Resolving(SpecVideos):
    """Works out one sample."""

    def job(self) -> WindowJob:
        """Returns the sample, ready to be generated."""
        cfg, spec = self.cfg, self.spec
        rollout = self._rollout()
        given = self._given()
        fps, stride = self._rate()
        available = self._available(stride)
        num_frames = self._num_frames(rollout.chunk_overlap, available)
        prompts, embeddings = self._prompts()
        negative = self._pick("negative_prompt") if spec.get("use_negative_prompt", True) else None
        seed = cfg.seed if "seed" in self.command_line else spec.get("seed", cfg.seed)
        inputs = WindowInputs(
            start=self._start(given, stride),
            view_ids=tuple(view_names(self.model).index(name) for name in self.names),
            prompts=prompts,
            embeddings=embeddings,
            negative_prompt=negative,
            actions=self._actions(num_frames, seed),
            control=self._control(stride),
            control_weight=self._control_weight(),
        )
        self._expectations()
        output = spec.get("output_dir") if cfg.output_dir is None else None
        return WindowJob(
            name=spec.name,
            folder=None if output is None else spec.folder / output,
            inputs=inputs,
            given_px=given,
            num_frames=num_frames,
            rollout=rollout,
            fps=fps,
            layout=self._layout(),
            seed=seed,
            notices=tuple(self.notices),
            resolved=self._resolved(rollout, given, fps, num_frames, seed, negative),
        )

    # Told

    def _rollout(self) -> SlidingWindowRollout:
        """Returns the rollout with the spec's settings where the command line has none."""
        spec, node = self.spec, OmegaConf.to_container(self.cfg.rollout, resolve=True)
        assert isinstance(node, dict)
        for key in ("num_steps", "chunk_overlap"):
            if f"rollout.{key}" not in self.command_line and spec.get(key) is not None:
                node[key] = spec.get(key)
        if "rollout.guidance" not in self.command_line:
            strength = spec.get("guidance")
            if strength is not None:
                node["guidance"] = 1.0 + strength
                self.notices.append(
                    f"guidance {strength} of such a spec means c + {strength} (c - u); that is rollout.guidance="
                    f"{1 + strength} here, u + {1 + strength} (c - u)."
                )
            elif self.model.text_encoder is None and self.cfg.prompt is None:
                node["guidance"] = 1.0  # there is nothing that could be left out
        rollout = build({str(key): value for key, value in node.items()}, list(self.cfg.trust))
        overlap = rollout.chunk_overlap
        check_sliding(overlap, self.trained, allow_untrained_overlap=rollout.allow_untrained_overlap)
        self.model.solver.begin(rollout.num_steps)
        return rollout

    def _prompts(self) -> tuple[tuple[tuple[str, ...], ...] | None, Any]:
        """Returns the texts of each view, or the embeddings of one text a view."""
        override = self.cfg.prompt
        path = self.spec.get("prompt_path") if override is None else None
        if override is not None and is_text_file(str(override)):
            path = Path(str(override))
        key = "prompt_path" if override is None else "prompt"
        if path is not None and path.suffix.lower() != ".txt":
            return None, read_prompt_embeddings(path, len(self.views), key)
        if path is not None:
            of_view: list[tuple[str, ...] | None] = [(line,) for line in read_prompt_lines(path, self.names, key)]
        else:
            texts = self.spec.get("prompt") if override is None else (str(override),)
            of_view = [texts] * len(self.views)
        if override is None:
            of_view = [view.prompt or texts for view, texts in zip(self.views, of_view, strict=True)]
        if all(texts is None for texts in of_view):
            return None, None
        return tuple(texts or ("",) for texts in of_view), None

    def _control_weight(self) -> float:
        weight = self._pick("control_weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise ConfigError(f"control_weight is {weight!r}; expected a number from 0 to 1. Change `control_weight`.")
        return float(weight)

    def _actions(self, num_frames: int, seed: int) -> np.ndarray | None:
        if self.cfg.actions is None:
            return None
        spec = self.model.spec
        return resolve_actions(
            self.cfg.actions, spec.action_names, spec.action_typical, num_frames, f"{seed}/{self.spec.name}"
        )

    # What is written

    def _layout(self) -> ViewLayout:
        rig: Mapping[str, object] | None = self.model.spec.data.get("rig")
        places = ViewLayout.of_rig(self.names, rig).places
        return ViewLayout(
            self.names,
            places,
            combined=bool(self._pick("save_combined_views", True)),
            individual=self.spec.get("save_individual_views", True),
            grid=self.spec.get("save_view_grid", True),
        )

    def _expectations(self) -> None:
        """Compares what a spec says of the weights that it was written for with these weights."""
        spec, (height, width) = self.spec, self.model.size
        chunk = spec.get("num_video_frames_per_chunk")
        if chunk is not None and chunk != self.chunk_px:
            raise spec.error("num_video_frames_per_chunk", chunk, f"{self.chunk_px}, the chunk of these weights")
        for key, own in (("target_height", height), ("target_width", width)):
            if spec.get(key) is not None and spec.get(key) != own:
                self.notices.append(f"{key} is {spec.get(key)}; these weights make {own}.")
        for key in ("preset_edge_threshold", "preset_blur_strength"):
            if spec.get(key) is not None:
                self.notices.append(f"{key} has no effect: the control videos are files.")

    def _resolved(
        self,
        rollout: SlidingWindowRollout,
        given: tuple[int, ...],
        fps: Fraction,
        num_frames: int,
        seed: int,
        negative: str | None,
    ) -> dict[str, Any]:
        """Returns the spec with every value that is used, paths in full; plain JSON."""
        plain = {key: _plain(value) for key, value in self.spec.values.items()}
        settings = {
            "name": self.spec.name,
            "negative_prompt": negative,
            "seed": seed,
            "fps": str(fps),
            "num_steps": rollout.num_steps,
            "chunk_overlap": rollout.chunk_overlap,
            "control_weight": self._control_weight(),
            "enable_autoregressive": bool(self._pick("enable_autoregressive", False)),
        }
        if self.cfg.prompt is not None:
            plain.pop("prompt_path", None)
            settings["prompt"] = str(self.cfg.prompt)
        views = {
            view.name: {
                "input_path": None if view.input_path is None else str(view.input_path),
                "control_path": {kind: str(path) for kind, path in view.control_path.items()},
                "num_conditional_frames_per_view": count,
                "prompt": _plain(view.prompt),
            }
            for view, count in zip(self.views, given, strict=True)
        }
        return {
            "spec": {**plain, **settings, **views},
            "num_frames": num_frames,
            "rollout.guidance": rollout.guidance.scale,
            "hand_off": rollout.hand_off,
            "noise": rollout.noise,
        }


class _OneFile(_Resolving):
    """All views in one video, one after another in time or beside each other; its last frames are given."""

    def _active(self) -> tuple[ViewSpec, ...]:
        return self.spec.views

    def _given(self) -> tuple[int, ...]:
        count = 1 if self.cfg.num_conditional_frames is None else self.cfg.num_conditional_frames
        return (checked("predict", "num_conditional_frames", count, given_px),) * len(self.views)

    def _rate(self) -> tuple[Fraction, int]:
        return Fraction(str(self._pick("fps", self.model.fps))), 1

    def _num_frames(self, overlap: int, available: int | None) -> int:
        return self.cfg.num_frames or self.chunk_px

    def _start(self, given: tuple[int, ...], stride: int) -> np.ndarray:
        frames = split_views(read_start(Path(self.cfg.input)), len(given), self.cfg.input_layout)
        count = max(given)
        if frames.shape[1] < count:
            raise ConfigError(
                f"{self.cfg.input} has {frames.shape[1]} frames a view; {count} are to be given. Change "
                "`num_conditional_frames`, `input_layout` or `input`."
            )
        last = frames[:, frames.shape[1] - count :]
        height, width = self.model.size
        return np.stack([view if view.shape[1:3] == (height, width) else fitted(view, height, width) for view in last])


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Fraction):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value
