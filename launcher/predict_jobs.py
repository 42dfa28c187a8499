"""What predict.py is asked to make: checked, and as a list of starts."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from launcher.recorded import Job, context_px, recorded_jobs
from longtake.errors import ConfigError
from longtake.generate import VideoModel
from longtake.live_actions import ActionSource
from longtake.loading import find_weights, load
from longtake.media.images import IMAGE_SUFFIXES
from longtake.pretrained.weights_file import build
from longtake.provenance import commit

_MAX_PROMPTS_BYTES = 1 << 24
_MAX_COUNT = (1 << 31) - 1
_FILES = ("metrics.json", "spec.json", "sample_*/[!.]*")
INTERACTIVE = "interactive"
"""The value of `actions` that reads keys while the video is made."""


def check_predict(cfg: DictConfig) -> None:
    """Checks what can be known before any weight is loaded.

    Raises:
        ConfigError: one message with everything that is wrong.
    """
    problems = list(_problems(cfg))
    if problems:
        raise ConfigError("\n       ".join(problems))


def _problems(cfg: DictConfig) -> Iterator[str]:
    least = {"num_frames": 1, "num_context_frames": 0, "num_clips": 1, "num_samples": 1, "seed": 0}
    yield from _type_problems(cfg)
    least |= {"eval_clips": 1, "baseline_clips": 1, "eval_batch_size": 1}
    for key, minimum in least.items():
        value = cfg[key]
        if value is None and key in ("num_frames", "num_context_frames", "eval_clips", "baseline_clips"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            yield f"{key} is {value!r}; expected a whole number of {minimum} or more. Change `{key}`."
        elif key != "seed" and value > _MAX_COUNT:
            yield f"{key} is {value}; expected at most {_MAX_COUNT}. Change `{key}`."
    for key in ("only_eval", "keep_going", "overlay_actions"):
        if not isinstance(cfg[key], bool):
            yield f"{key} is {cfg[key]!r}; expected true or false. Change `{key}`."
    if cfg.prompt is not None and cfg.prompts_file is not None:
        yield "prompt and prompts_file are both given; expected one of them. Leave one out."
    if cfg.input is not None and (not isinstance(cfg.input, str) or not cfg.input):
        yield f"input is {cfg.input!r}; expected a path, held_out or nothing. Change `input`."
    yield from _input_problems(cfg)
    yield from _spec_problems(cfg)
    if cfg.precision not in (None, "float32", "bfloat16"):
        yield f"precision is {cfg.precision!r}; expected float32, bfloat16 or null. Change `precision`."
    if cfg.device not in ("auto", "cpu", "cuda"):
        yield f"device is {cfg.device!r}; expected auto, cpu or cuda. Change `device`."
    elif cfg.device == "cuda" and not torch.cuda.is_available():
        yield "device is cuda, and there is no GPU that torch can use. Change `device`."
    try:
        if cfg.fps is not None and Fraction(str(cfg.fps)) <= 0:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        yield f"fps is {cfg.fps!r}; expected a number above 0 or a fraction such as 35/3. Change `fps`."


def _type_problems(cfg: DictConfig) -> Iterator[str]:
    """Yields which keys that are texts hold something else."""
    for key in ("prompt", "negative_prompt", "prompts_file", "actions", "output_dir", "split", "input_tokens_dir"):
        value = cfg[key]
        if value is not None and not isinstance(value, str):
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            yield f"{key} is {value!r}; expected text (a number in quotes: {key}='\"5\"'). Change `{key}`."
    if not isinstance(cfg.ckpt, str) or not cfg.ckpt:
        yield f"ckpt is {cfg.ckpt!r}; expected a run folder, a .safetensors file or a .ckpt. Change `ckpt`."
    if not OmegaConf.is_list(cfg.trust) or not all(isinstance(name, str) for name in cfg.trust):
        yield f"trust is {cfg.trust!r}; expected a list of packages, such as trust=[my_pkg]. Change `trust`."


_OF_SPECS = ("enable_autoregressive", "num_chunks", "spec_set")
OF_VIEWS = ("num_conditional_frames", "save_combined_views", "control_weight", "n_views")
"""Keys for weights of several views."""


def _spec_problems(cfg: DictConfig) -> Iterator[str]:
    if cfg.input_layout not in ("time", "vertical", "horizontal"):
        yield f"input_layout is {cfg.input_layout!r}; expected time, vertical or horizontal. Change `input_layout`."
    for key in ("n_views", "num_chunks"):
        value = cfg[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield f"{key} is {value!r}; expected a whole number of 1 or more. Change `{key}`."
    for key in ("enable_autoregressive", "save_combined_views"):
        if cfg[key] is not None and not isinstance(cfg[key], bool):
            yield f"{key} is {cfg[key]!r}; expected true or false. Change `{key}`."
    if cfg.control_from not in ("own", "other", "none"):
        yield f"control_from is {cfg.control_from!r}; expected own, other or none. Change `control_from`."
    elif cfg.control_from != "own" and not _is_held_out(cfg):
        yield "control_from is for held-out clips, and something else is given to start from. Leave out `control_from`."
    if cfg.spec is None:
        yield from _view_problems(cfg)
        return
    for key in ("input", "input_type", "prompts_file", "num_context_frames"):
        if cfg[key] is not None:
            yield f"{key} and spec are both given; a spec says what to start from. Leave out `{key}`."


def _view_problems(cfg: DictConfig) -> Iterator[str]:
    """Yields what is wrong without a spec."""
    for key in _OF_SPECS:
        if cfg[key] is not None:
            yield f"{key} is given without spec; it changes what a spec says. Give `spec`, or leave out `{key}`."
    for key in ("prompts_file", "num_context_frames", "input_type"):
        if cfg.n_views is not None and cfg[key] is not None and not _is_held_out(cfg):
            yield f"{key} and n_views are both given; prompt and num_conditional_frames serve here. Leave out `{key}`."


def _is_held_out(cfg: DictConfig) -> bool:
    """Returns whether held-out clips are continued."""
    has_prompts = cfg.prompt is not None or cfg.prompts_file is not None
    return cfg.spec is None and (cfg.input == "held_out" or (cfg.input is None and not has_prompts))


def _input_problems(cfg: DictConfig) -> Iterator[str]:
    if cfg.input_type not in (None, "tokens", "video", "image"):
        yield f"input_type is {cfg.input_type!r}; expected tokens, video, image or null. Change `input_type`."
    elif cfg.input_type == "tokens" and cfg.input_tokens_dir is None:
        yield "input_type is tokens, and there is no folder of them. Give `input_tokens_dir`."
    elif cfg.input_type in ("video", "image") and cfg.input in (None, "held_out", "nothing"):
        yield f"input_type is {cfg.input_type}, and input is {cfg.input!r}; expected a path. Give `input`."
    elif cfg.input_type == "image" and Path(str(cfg.input)).suffix.lower() not in IMAGE_SUFFIXES:
        yield (
            f"input_type is image, and input is {cfg.input!r}; expected a file that ends in "
            f"{', '.join(IMAGE_SUFFIXES)}. Change `input_type` or `input`."
        )
    if cfg.input_type != "tokens" and cfg.input_tokens_dir is not None:
        yield "input_tokens_dir is given, but input_type is not tokens. Set input_type=tokens."
    if cfg.submission is not None and not cfg.only_eval:
        yield "submission is given without only_eval; a submission holds figures, not videos. Set only_eval=true."


def prepared(cfg: DictConfig) -> VideoModel:
    """Returns the model with the rollout that was chosen.

    Raises:
        ConfigError: it cannot be loaded, or its weights were not trained for that rollout.
    """
    trust = list(cfg.trust)
    device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else cfg.device
    encoder: Any = OmegaConf.to_container(cfg.encoder, resolve=True) if "encoder" in cfg else {}
    model = load(cfg.ckpt, trust, "cpu" if device == "auto" else device, encoder=encoder)
    if cfg.submission is not None and model.spec.kind != "ar_tokens":
        raise ConfigError(
            f"submission is given, and weights of kind {model.spec.kind} score no tokens. Leave out `submission`."
        )
    nodes = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("rollout", "solver") if name in cfg}
    model.use(**{name: build(node, trust) for name, node in nodes.items()})
    if cfg.precision is not None:
        model.precision = cfg.precision
    return model


def jobs(cfg: DictConfig, model: VideoModel) -> Iterator[Job]:
    """Yields every start.

    Raises:
        ConfigError: prompts cannot be read, or there is nothing to start from.
    """
    if cfg.input_type in ("tokens", "video"):
        yield from recorded_jobs(cfg, model)
        return
    prompts = _prompts(cfg)
    kind = cfg.input or ("held_out" if not prompts else "nothing")
    if kind == "held_out":
        for number, prompt in enumerate(prompts or [None]):
            yield from _held_out(cfg, model, prompt, f"{number:03d} " if len(prompts) > 1 else "")
        return
    start = None if kind == "nothing" else kind
    context = 0 if start is None else cfg.num_context_frames
    if start is None and cfg.num_context_frames:
        raise ConfigError(
            f"num_context_frames is {cfg.num_context_frames}, but there is nothing to take them from; expected 0. Give "
            "`input`, or leave out `num_context_frames`."
        )
    for number, prompt in enumerate(prompts or [None]):
        actions = _from_keys(model, None) if cfg.actions == INTERACTIVE else cfg.actions
        yield Job(f"{number:03d}", start, context if start is not None else None, prompt, actions)


def _held_out(cfg: DictConfig, model: VideoModel, prompt: str | None, prefix: str) -> Iterator[Job]:
    from hydra.utils import instantiate

    from datamodules.held_out import held_out_clips, pixel_data

    if "data" not in cfg or cfg.data is None:
        raise ConfigError(
            "the weights do not say which data they were trained on, so there are no held-out clips to start from. "
            "Give `input` or `prompt`, or choose `data` (data=doom)."
        )
    given = context_px(cfg, model)
    length = cfg.num_frames or int(model.spec.video["num_frames"])
    count = 1 if cfg.actions == INTERACTIVE else cfg.num_clips  # nobody wants to play the same keys from several starts
    for clip in held_out_clips(pixel_data(instantiate(cfg.data)), length, count, split=cfg.split):
        if length < given:
            raise ConfigError(
                f"num_frames is {length}, and {given} frames are given at the start; expected more than {given}. "
                "Change `num_frames` or `num_context_frames`."
            )
        if clip.frames.shape[1] < given:
            raise ConfigError(
                f"num_context_frames is {given}, but held-out clip {clip.key} has {clip.frames.shape[1]} frames. "
                "Change `num_context_frames` or `split`."
            )
        yield Job(
            name=f"{prefix}{clip.key}",
            start=clip.frames[:, :given],
            num_context_frames=given,
            prompt=prompt if prompt is not None else (clip.caption if model.text_encoder is not None else None),
            actions=told_actions(cfg, model, clip.actions, given, length, clip.key),
            truth=clip.frames if cfg.actions is None else None,
        )


def told_actions(
    cfg: DictConfig, model: VideoModel, true: np.ndarray | None, given: int, length: int, key: str
) -> np.ndarray | ActionSource | None:
    """Returns the actions of a held-out clip: the true ones, or those asked for after the given frames."""
    from longtake.actions import resolve_actions

    if cfg.actions == INTERACTIVE:
        return _from_keys(model, None if true is None else true[:given])
    if not model.spec.action_names:
        return None
    if cfg.actions is None:
        return true
    spec = model.spec
    wanted = resolve_actions(cfg.actions, spec.action_names, spec.action_typical, length, f"{cfg.seed}/{key}")
    if true is not None:
        wanted[:given] = true[:given]
    return wanted


def _from_keys(model: VideoModel, known: np.ndarray | None) -> ActionSource:
    """Returns the actions that keys stand for, asked for while the video is made; `known` led to the given frames."""
    from launcher.keyboard import read_key
    from longtake.live_actions import KeyActions

    return KeyActions(model.spec.action_names, model.spec.action_typical, read_key, known)


def _prompts(cfg: DictConfig) -> list[str]:
    if cfg.prompts_file is None:
        return [] if cfg.prompt is None else [str(cfg.prompt)]
    path = Path(cfg.prompts_file)
    try:
        if path.stat().st_size > _MAX_PROMPTS_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"prompts_file {path} cannot be read ({reason}). Change `prompts_file`.") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ConfigError(f"prompts_file {path} is empty; expected a prompt a line. Change `prompts_file`.")
    return prompts


@contextlib.contextmanager
def output_folder(cfg: DictConfig) -> Iterator[Path]:
    """Makes the folder of this prediction; where nothing came of it, it is gone again.

    Raises:
        ConfigError: it cannot be made or written to, or holds a prediction.
    """
    folder = _folder(cfg)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be made ({error.strerror}); expected a place that can be written. Change "
            "`output_dir`."
        ) from error
    try:
        yield folder
    except BaseException:
        for place in [*folder.glob("sample_*"), *missing]:
            with contextlib.suppress(OSError):
                place.rmdir()  # only what is empty
        raise


def _folder(cfg: DictConfig) -> Path:
    """Returns where a prediction goes. Raises ConfigError where there is one already."""
    if cfg.output_dir is not None:
        folder = Path(cfg.output_dir)
        there = next((path.relative_to(folder) for name in _FILES for path in folder.glob(name)), None)
        if there is not None:
            raise ConfigError(
                f"{folder} holds a prediction already ({there}); expected a new folder. Change `output_dir`."
            )
        return folder
    file = find_weights(cfg.ckpt)
    run = next((place for place in (file.parent, file.parent.parent) if (place / "config.yaml").is_file()), None)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return (run or Path("outputs")) / "predictions" / stamp


def provenance(cfg: DictConfig, model: VideoModel) -> dict[str, Any]:
    """Returns what the figures depend on."""
    return {
        "ckpt": str(cfg.ckpt),
        "step": model.spec.step,
        "weights_commit": model.spec.commit,
        "commit": commit(),
        "seed": cfg.seed,
        "device": str(model.device),
        "precision": model.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
