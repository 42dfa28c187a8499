"""Recorded clips that predict.py starts from or scores: 1X token folders, raw videos, and the sets of `data`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from longtake.errors import BadSampleError, ConfigError
from longtake.generate import VideoModel, fitted
from longtake.generate_tokens import TokenModel
from longtake.geometry import pixel_frames
from longtake.live_actions import ActionSource
from longtake.loading import find_weights
from longtake.token_evaluation import TokenClip

logger = logging.getLogger("longtake")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")


@dataclass(frozen=True)
class Job:
    """One start, from which `num_samples` videos are made.

    Attributes:
        name: what it is called; it also names the noise.
        start: frames [v t h w c], tokens [v t h w], the path of a file, or None for nothing.
        num_context_frames: how many frames of the start are given; None: all that can be used.
        prompt: a text, or None.
        actions: a mode, a file, an array [t a] or what gives them chunk by chunk, or None.
        truth: true frames [v t h w c], or None.
    """

    name: str
    start: np.ndarray | str | None = None
    num_context_frames: int | None = None
    prompt: str | None = None
    actions: np.ndarray | str | ActionSource | None = None
    truth: np.ndarray | None = None


def context_px(cfg: DictConfig, model: VideoModel) -> int:
    """Returns how many frames of a recorded clip are given: as asked for, else as stored.

    Windows begin with what the weights were trained to start from; of more, as much as they were is given, so that what
    comes after it is still the truth.
    """
    given = cfg.num_context_frames if cfg.num_context_frames is not None else model.spec.num_context_frames
    if model.rollout.kind != "sliding_window":
        return given
    trained = model.spec.trained_for
    legal = [pixel_frames(lat, trained.ratio) for lat in trained.starts_lat]
    if given in legal or given < min(legal):
        return given
    usable = max(px for px in legal if px <= given)
    logger.info(
        "%d frames are given, not %d: windows begin with %s frames.", usable, given, " or ".join(map(str, legal))
    )
    return usable


def recorded_jobs(cfg: DictConfig, model: VideoModel) -> Iterator[Job]:
    """Yields the starts of input_type=tokens and input_type=video; what comes after the given frames is the truth.

    Raises:
        ConfigError: the folder, or what is in it, does not fit the weights.
        DataError: a file is damaged.
    """
    given = context_px(cfg, model)
    if cfg.input_type == "tokens":
        tokens_model = _token_model(model)
        for clip in _onex_clips(cfg.input_tokens_dir, tokens_model, cfg.num_clips):
            truth = tokens_model.frames_of(torch.from_numpy(clip.tokens)[None])[0]
            actions = clip.actions if cfg.actions is None else cfg.actions
            yield Job(clip.key, clip.tokens, given, None, actions, truth if cfg.actions is None else None)
        return
    for path in video_files(Path(cfg.input))[: cfg.num_clips]:
        frames = _frames(path, model)
        if frames.shape[1] < given:
            raise ConfigError(
                f"{path} has {frames.shape[1]} frames; {given} are to be given. Change `num_context_frames` or `input`."
            )
        yield Job(path.stem, frames[:, :given], given, cfg.prompt, cfg.actions, frames)


def scored_clips(cfg: DictConfig, model: TokenModel) -> Iterator[TokenClip]:
    """Yields the clips that only_eval scores: `eval_clips` windows of the length that the weights were trained on."""
    num_frames = _length(model)
    if cfg.input_type == "tokens":
        yield from _onex_clips(cfg.input_tokens_dir, model, cfg.eval_clips)
        return
    if cfg.input_type == "video":
        left = cfg.eval_clips
        for path in video_files(Path(cfg.input)):
            frames = _frames(path, model)
            for start in range(0, frames.shape[1] - num_frames + 1, num_frames):
                if left == 0:
                    return
                left = None if left is None else left - 1
                part = frames[:, start : start + num_frames]
                yield TokenClip(f"{path.stem}-{start}", _tokens(part, model), None, part)
        return
    data = _data(cfg)
    if data is None:
        raise ConfigError(
            "the weights do not say which data they were trained on, so there are no held-out clips to score. Give "
            "`input_type`, or choose `data` (data=doom)."
        )
    yield from _windows(data, model, cfg.eval_clips, cfg.split or data.splits["test"])


def training_clips(cfg: DictConfig, model: TokenModel) -> Iterator[TokenClip] | None:
    """Returns clips that the baselines are fitted on; None where there are none.

    They are `baseline_tokens_dir`, or the training split of the tokens that the weights were trained on, or of `data`.
    """
    if cfg.baseline_tokens_dir is not None:
        return _onex_clips(cfg.baseline_tokens_dir, model, cfg.baseline_clips, key="baseline_tokens_dir")
    data = _trained_tokens(cfg, model) or _data(cfg)
    return None if data is None else _windows(data, model, cfg.baseline_clips, data.splits["train"])


def video_files(path: Path) -> list[Path]:
    """Returns a video, or all videos in a folder. Raises ConfigError where there is none."""
    found = [path] if path.is_file() else []
    if path.is_dir():
        found = sorted(child for child in path.rglob("*") if child.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ConfigError(f"no video at {path}; expected a video file, or a folder with some. Change `input`.")
    return found


def _windows(data: Any, model: TokenModel, count: int | None, split: str) -> Iterator[TokenClip]:
    from datamodules.windows import clip_windows

    for window in clip_windows(data, _length(model), count, split=split):
        tokens = window.tokens
        if tokens is None:
            assert window.frames is not None, "a window holds pixels or tokens"
            tokens = _tokens(window.frames, model)
        yield TokenClip(window.key, tokens, window.actions, window.frames)


def _onex_clips(
    folder: str, model: TokenModel, count: int | None, *, key: str = "input_tokens_dir"
) -> Iterator[TokenClip]:
    from datamodules.sources.onex import VERSIONS, read_onex_clips

    spec = model.spec
    settings: dict[str, Any] = {"vocab_size": spec.vocab_size, "use_states": bool(spec.action_names)}
    path = Path(folder).expanduser()
    if path.is_dir() and VERSIONS["v1.1"].matches(path) and not VERSIONS["v2.0"].matches(path):
        settings |= {"clip_frames": spec.grid_lat[0]}
    else:
        settings |= {"grid": list(spec.grid_lat), "state_names": list(spec.action_names) or None}
    found = read_onex_clips(path, limit=count, key=key, **settings)
    if found.geometry.ratio_time != spec.trained_for.ratio:
        raise ConfigError(
            f"the tokens in {folder} are of {found.geometry.ratio_time} frames each; these weights were trained on "
            f"tokens of {spec.trained_for.ratio}. Change `{key}` or `ckpt`."
        )
    wanted = len(spec.action_names)
    for clip in found.clips:
        actions = clip.states
        if wanted and (actions is None or actions.shape[1] != wanted):
            raise ConfigError(
                f"{folder} has {0 if actions is None else actions.shape[1]} columns of states; these weights were "
                f"trained on {wanted} of actions. Change `{key}` or `ckpt`."
            )
        if wanted and actions is not None:
            actions = np.concatenate([np.zeros_like(actions[:1]), actions[1:]])  # what led to frame 0 is not told
        yield TokenClip(clip.name, model.check_tokens(clip.tokens, f"{folder}, {clip.name}"), actions)


def _frames(path: Path, model: VideoModel) -> np.ndarray:
    """Returns the frames of a video in the model's size, uint8 [1 t h w c]."""
    from longtake.media.read import read_video

    try:
        frames = read_video(path)
    except BadSampleError as error:
        raise ConfigError(f"{error}; expected a video. Change `input`.") from error
    height, width = model.size
    return (frames if frames.shape[1:3] == (height, width) else fitted(frames, height, width))[None]


def _tokens(frames: np.ndarray, model: TokenModel) -> np.ndarray:
    return model.tokens_of(frames[None])[0].cpu().numpy()


def _length(model: VideoModel) -> int:
    assert isinstance(model, TokenModel)
    return pixel_frames(model.spec.grid_lat[0], model.spec.trained_for.ratio)


def _token_model(model: VideoModel) -> TokenModel:
    if not isinstance(model, TokenModel):
        raise ConfigError(
            f"input_type is tokens, but the weights are of kind {model.spec.kind}; expected those of a token model. "
            "Change `input_type` or `ckpt`."
        )
    return model


def _data(cfg: DictConfig) -> Any:
    from hydra.utils import instantiate

    return instantiate(cfg.data) if cfg.get("data") is not None else None


def _trained_tokens(cfg: DictConfig, model: TokenModel) -> Any:
    """Returns the tokens that a run was trained on, where its folder names them and they are still there; else None."""
    from datamodules.shards import DatasetInfo
    from datamodules.tokens import TokensDataModule

    file = find_weights(cfg.ckpt)
    for folder in (file.parent, file.parent.parent):
        if not (folder / "config.yaml").is_file():
            continue
        root = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "data.root")
        if not isinstance(root, str) or not (Path(root) / "dataset.json").is_file():
            return None
        tokens = DatasetInfo.load(Path(root)).source.tokens
        if not tokens or tokens.get("encoder_fingerprint") != model.spec.encoder_fingerprint:
            return None
        return TokensDataModule(root=root, num_frames=_length(model))
    return None
