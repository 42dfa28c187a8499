"""A spec, the command line and the weights together: what is generated, worked out and checked before anything runs.

A value on the command line wins over one of the spec, which wins over the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from launcher.spec_file import read_specs
from launcher.spec_videos import SpecVideos, view_names
from launcher.view_inputs import control_weight, is_text_file, read_prompt_embeddings, read_prompt_lines
from launcher.window_job import WindowJob, sliding_model
from longtake.actions import resolve_actions
from longtake.errors import ConfigError
from longtake.generate_windows import WindowInputs
from longtake.media.view_files import ViewLayout
from longtake.pretrained.weights_file import build
from longtake.rollout.sliding_plan import check_sliding
from longtake.rollout.sliding_window import SlidingWindowRollout


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
    diffusion = sliding_model(model)
    if cfg.spec_set is not None and not OmegaConf.is_dict(cfg.spec_set):
        raise ConfigError(f"spec_set is {cfg.spec_set!r}; expected keys of specs: {{seed: 3}}. Change `spec_set`.")
    overrides: Any = {} if cfg.spec_set is None else OmegaConf.to_container(cfg.spec_set)
    specs = read_specs(spec_paths(cfg), view_names(model), overrides)
    if not cfg.keep_going:
        for spec in specs:
            Resolving(spec, cfg, diffusion).job()
    for spec in specs:
        yield spec.name, lambda spec=spec: Resolving(spec, cfg, diffusion).job()


class Resolving(SpecVideos):
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
            text = getattr(self.model.network, "text", None)
            return None, read_prompt_embeddings(path, len(self.views), key, text)
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

    def _control_weight(self) -> float | dict[str, float]:
        return control_weight(self._pick("control_weight", 1.0))

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
        return dataclasses.replace(
            ViewLayout.of_rig(self.names, rig),
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
        if spec.get("preset_blur_strength") is not None:
            self.notices.append("preset_blur_strength has no effect: blurred video is no control type here.")
        extracts = any(own.extracted for view in self.views for own in self._controls_of(view))
        if spec.get("preset_edge_threshold") is not None and not extracts:
            self.notices.append("preset_edge_threshold has no effect: no edges are extracted.")

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
                "control_path": {own.kind: None if own.extracted else str(own.path) for own in self._controls_of(view)},
                "mask_path": {kind: str(path) for kind, path in view.mask_path.items()},
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


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Fraction):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value
