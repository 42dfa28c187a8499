"""Held-out clips of several views as starts of rollouts, with their control video, read window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from datamodules.held_out import HeldOutViews, held_out_views, pixel_data
from launcher.predict_jobs import told_actions
from launcher.recorded import context_px
from launcher.spec_videos import given_counts, view_names
from launcher.view_inputs import control_weight, text_of_views
from launcher.window_job import WindowJob, control_types
from longtake.errors import ConfigError
from longtake.generate_diffusion import DiffusionModel
from longtake.generate_windows import ControlWindows, WindowInputs
from longtake.media.view_files import ViewLayout
from longtake.truth import TrueVideo

CONTROL_FROM = ("own", "other", "none")


def held_out_jobs(cfg: DictConfig, model: DiffusionModel) -> Iterator[tuple[str, Callable[[], WindowJob]]]:
    """Yields the name of every held-out clip, and what makes its rollout ready.

    Raises:
        ConfigError: there is no data with pixels, it has not the control that the weights know, or it is too short.
    """
    if cfg.get("data") is None:
        raise ConfigError(
            "the weights do not say which data they were trained on, so there are no held-out clips to start from. "
            "Give `spec` or `input`, or choose `data` (data=doom_rig)."
        )
    data = pixel_data(instantiate(cfg.data))
    if cfg.n_views is not None:
        if cfg.n_views > len(view_names(model)):
            raise ConfigError(
                f"n_views is {cfg.n_views}; expected at most {len(view_names(model))} for these weights. Change "
                "`n_views`."
            )
        data.views = view_names(model)[: cfg.n_views]
    types = control_types(model) if cfg.control_from != "none" else ()
    clips = held_out_views(data, cfg.num_clips, control=types, split=cfg.split)
    for clip, donor in _with_donors(clips, cfg.control_from):
        yield clip.key, lambda clip=clip, donor=donor: _job(cfg, model, clip, donor if types else None)


def _with_donors(clips: Iterator[HeldOutViews], control_from: str) -> Iterator[tuple[HeldOutViews, HeldOutViews]]:
    """Yields every clip with the one whose control it gets: itself, or the one half of all clips further on."""
    if control_from != "other":
        yield from ((clip, clip) for clip in clips)
        return
    found = list(clips)
    if len(found) < 2:
        raise ConfigError(
            f"control_from is other, and there is {len(found)} held-out clip; expected 2 or more. Raise `num_clips`, "
            "or change `split`."
        )
    for index, clip in enumerate(found):
        yield clip, found[(index + len(found) // 2) % len(found)]


def _job(cfg: DictConfig, model: DiffusionModel, clip: HeldOutViews, donor: HeldOutViews | None) -> WindowJob:
    names = tuple(view_names(model)[view] for view in clip.views)
    given, num_frames = _given(cfg, model, names), cfg.num_frames or int(model.spec.video["num_frames"])
    actions = told_actions(cfg, model, clip.actions, min(given), num_frames, clip.key)
    if actions is not None and not isinstance(actions, np.ndarray):
        raise ConfigError(
            f"actions is {cfg.actions}, and windows of several views are told theirs beforehand; expected a mode or a "
            "file. Change `actions`."
        )
    control: ControlWindows | None = None if donor is None else donor.control
    _check_length(clip, donor, num_frames, control is not None or (cfg.actions is None and actions is not None))
    start = np.zeros((len(names), 0, *model.size, 3), np.uint8)
    weight = control_weight(cfg.control_weight)
    prompts, embeddings = text_of_views(cfg.prompt, names, model, default=clip.caption)
    return WindowJob(
        name=clip.key,
        folder=None,
        inputs=WindowInputs(
            start=clip.frames.window(0, max(given)) if max(given) else start,
            view_ids=clip.views,
            prompts=prompts,
            embeddings=embeddings,
            negative_prompt=cfg.negative_prompt,
            actions=actions,
            control=control,
            control_weight=weight,
        ),
        given_px=given,
        num_frames=num_frames,
        rollout=model.rollout,
        fps=Fraction(str(cfg.fps)) if cfg.fps is not None else model.fps,
        layout=ViewLayout.of_rig(names, model.spec.data.get("rig")).writing(cfg.save_combined_views),
        seed=cfg.seed,
        notices=(),
        resolved=_resolved(cfg, clip, donor, names, given, num_frames, weight),
        truth=TrueVideo(clip.frames, clip.num_frames) if cfg.actions is None else None,
        noise_name=clip.key,
        numbered=True,
    )


def _given(cfg: DictConfig, model: DiffusionModel, names: tuple[str, ...]) -> tuple[int, ...]:
    if cfg.num_conditional_frames is None:
        return (context_px(cfg, model),) * len(names)
    if cfg.num_context_frames is not None:
        raise ConfigError(
            "num_context_frames and num_conditional_frames are both given; expected one of them. Leave out "
            "`num_context_frames`."
        )
    return given_counts(cfg.num_conditional_frames, names)


def _check_length(clip: HeldOutViews, donor: HeldOutViews | None, num_frames: int, is_told: bool) -> None:
    """Refuses a video that goes on where control or actions have ended."""
    shortest = min([clip, donor or clip], key=lambda own: own.num_frames)
    if is_told and num_frames > shortest.num_frames:
        raise ConfigError(
            f"num_frames is {num_frames}, but held-out clip {shortest.key} has {shortest.num_frames} frames, and its "
            "control and actions end there. Lower `num_frames`, or choose a `split` of longer clips (split=long)."
        )


def _resolved(
    cfg: DictConfig,
    clip: HeldOutViews,
    donor: HeldOutViews | None,
    names: tuple[str, ...],
    given: tuple[int, ...],
    num_frames: int,
    weight: Any,
) -> dict[str, Any]:
    """Returns what the rollout of a clip was told, plain JSON."""
    return {
        "clip": clip.key,
        "views": list(names),
        "num_frames": num_frames,
        "num_conditional_frames": dict(zip(names, given, strict=True)),
        "control_from": cfg.control_from,
        "control_of": None if donor is None else donor.key,
        "control_weight": weight,
        "seed": cfg.seed,
    }
