"""A trained model from one file, and videos from it: what `longtake.load(path).generate(...)` does.

Everything is rebuilt from what the weights file says of itself. Nothing in it is executed: its config may name classes
of this package only, plus those of packages that the caller trusts.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtake.actions import resolve_actions
from longtake.errors import ConfigError
from longtake.geometry import covering_latent_frames, pixel_frames
from longtake.live_actions import ActionSource
from longtake.media.grid import fitted
from longtake.media.images import IMAGE_SUFFIXES, read_image
from longtake.media.read import read_video
from longtake.model_spec import ModelSpec
from longtake.rollout.plan import TrainedFor, check_rollout
from longtake.rollout.sliding_plan import AnyPlan, plan_of
from longtake.streaming import VideoChunk

logger = logging.getLogger("longtake")

Frames = np.ndarray
"""Frames of one start, uint8 [t h w c] for one view or [v t h w c]; for token models also their tokens, of another
integer type, [t h w] or [v t h w]."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted of one generation, everything worked out.

    Attributes:
        plan: what is given and what is predicted.
        start: the given frames, uint8 [v t h w c]; t may be 0.
        tokens: the given frames as tokens, int64 [v t h w], where they were given as such; else None.
        live: gives the actions while the video is made, in place of `actions`; None: nobody does.
        actions: of every frame, float32 [t a], or None.
        prompt: the text, or None.
        negative_prompt: the text of the branch that guidance leads away from; None: no text.
        names: what names the noise of each sample.
        seed: of the noise.
        notices: what the caller should know.
    """

    plan: AnyPlan
    start: Frames
    actions: np.ndarray | None
    prompt: str | None
    negative_prompt: str | None
    names: tuple[str, ...]
    seed: int
    notices: tuple[str, ...]
    tokens: np.ndarray | None = None
    live: ActionSource | None = None


class Generation(Iterator[VideoChunk]):
    """Videos under way: yields `VideoChunk`s as they are made, [samples v t h w c].

    Attributes:
        request: what is being made.
    """

    def __init__(self, request: Request, chunks: Iterator[VideoChunk]) -> None:
        self.request = request
        self._chunks = chunks

    def __next__(self) -> VideoChunk:
        return next(self._chunks)

    @property
    def num_frames(self) -> int:
        """Frames of the whole video, the given ones included."""
        return self.request.plan.num_frames_px

    def video(self) -> np.ndarray:
        """Returns all frames that are still to come at once, uint8 [samples v t h w c]."""
        return np.concatenate([chunk.frames for chunk in self], axis=2)


class VideoModel(ABC):
    """A network with all that a rollout needs. Made by `longtake.load`.

    Args:
        spec: what the weights say of themselves.
        network: predicts what comes next.
        encoders: the frozen encoders by name: "video" (pixels <-> codes), "text" (captions -> fields of `Clip`),
            "actions"; absent: none.
        rollout: how what comes next follows what was there.
    """

    def __init__(self, spec: ModelSpec, network: nn.Module, encoders: Mapping[str, Any], rollout: Any) -> None:
        self.spec = spec
        self.network: Any = network.eval().requires_grad_(False)
        self.encoders = dict(encoders)
        self.rollout = rollout
        self.precision = spec.precision
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> VideoModel:
        """Moves the model to a device and returns it."""
        self.device = torch.device(device)
        self.network.to(self.device)
        for encoder in self.encoders.values():
            if hasattr(encoder, "to"):
                encoder.to(self.device)
        return self

    def use(self, *, rollout: Any = None, solver: Any = None) -> None:
        """Takes another rollout, and another solver where the rollout has one.

        Raises:
            ConfigError: the weights were not trained for it.
        """
        if solver is not None:
            raise ConfigError(f"a model of kind {self.spec.kind} has no solver. Leave out `solver`.")
        if rollout is not None:
            check_rollout(rollout.kind, self.spec.trained_for)
            self.rollout = rollout

    @property
    def video_encoder(self) -> Any:
        """Pixels <-> codes."""
        return self.encoders.get("video")

    @property
    def text_encoder(self) -> Any:
        """Captions -> text fields of `Clip`; None where the network takes no text."""
        return self.encoders.get("text")

    @property
    def fps(self) -> Fraction:
        """Frames per second of its videos."""
        return Fraction(str(self.spec.video["fps"]))

    @property
    def size(self) -> tuple[int, int]:
        """Pixel rows and columns of its frames."""
        return int(self.spec.video["height"]), int(self.spec.video["width"])

    def generate(
        self,
        *,
        num_frames: int | None = None,
        start: Frames | str | Path | None = None,
        num_context_frames: int | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        actions: str | np.ndarray | ActionSource | None = None,
        seed: int = 0,
        num_samples: int = 1,
        name: str = "",
    ) -> Generation:
        """Returns videos as an iterator of chunks; nothing is computed before the first one is asked for.

        Args:
            num_frames: length of the video, the given frames included; None: as in training. Any length: it is rounded
                up to whole chunks and trimmed again.
            start: what the video begins with: frames uint8 [t h w c] (or [v t h w c]), the path of an image or of a
                video, or None for nothing. Of a video the last frames are taken, as many as make whole chunks. For
                token models also tokens, int [t h w] (or [v t h w]) from a causal start on, of which the first count.
            num_context_frames: how many frames of `start` are given; None: all that can be used.
            prompt: a text.
            negative_prompt: a text to lead away from (with guidance); None: no text.
            actions: a mode (forward, backward, left, right, random), an .npy or .csv file, an array [t a], or what
                gives them chunk by chunk (`live_actions.ActionSource`; rollout=memory only).
            seed: of all noise. The same seed gives the same videos, whatever `num_samples` is.
            num_samples: videos of the same wish, each with noise of its own.
            name: tells the noise of several wishes with one seed apart.

        Raises:
            ConfigError: something that cannot be done, or that the weights were not trained for.
        """
        request = self.request(
            num_frames=num_frames,
            start=start,
            num_context_frames=num_context_frames,
            prompt=prompt,
            negative_prompt=negative_prompt,
            actions=actions,
            seed=seed,
            num_samples=num_samples,
            name=name,
        )
        return Generation(request, self._stream(request))

    def request(
        self,
        *,
        num_frames: int | None,
        start: Frames | str | Path | None,
        num_context_frames: int | None,
        prompt: str | None,
        negative_prompt: str | None,
        actions: str | np.ndarray | ActionSource | None,
        seed: int,
        num_samples: int,
        name: str,
    ) -> Request:
        """Returns what `generate` will do with these arguments. Raises ConfigError as it does."""
        counts = {"num_frames": num_frames, "num_context_frames": num_context_frames}
        for key, value in {**counts, "seed": seed, "num_samples": num_samples}.items():
            _check_count(key, value, optional=key in counts)
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        _check_kind(texts, str, "text")
        _check_kind({"start": start}, np.ndarray | str | Path, "frames uint8 [t h w 3], or the path of a file")
        _check_kind({"actions": actions}, np.ndarray | str | Path | ActionSource, "a mode, a file, or an array [t a]")
        frames, tokens, notices = self._given(start, num_context_frames)
        plan = plan_of(
            self.rollout,
            num_frames_px=int(self.spec.video["num_frames"]) if num_frames is None else num_frames,
            context_px=frames.shape[1],
            trained=self._trained,
        )
        for what, text in texts.items():
            if text is not None and self.text_encoder is None:
                raise ConfigError(f"{what} is given, but these weights were trained without text. Leave out `{what}`.")
        live, told = (actions, None) if isinstance(actions, ActionSource) else (None, actions)
        if live is not None and self.rollout.kind != "memory":
            raise ConfigError(
                f"actions come while the video is made, and rollout={self.rollout.kind} needs all of them before; "
                "expected rollout=memory. Change `actions`."
            )
        return Request(
            plan=plan,
            start=frames[:, frames.shape[1] - plan.start_px :],
            actions=self._actions(told, plan.num_frames_px, f"{seed}/{name}"),
            prompt=prompt,
            negative_prompt=negative_prompt,
            names=tuple(f"{name}#{sample}" for sample in range(num_samples)),
            seed=seed,
            notices=(*notices, *plan.notices()),
            tokens=tokens,
            live=live,
        )

    @property
    def _trained(self) -> TrainedFor:
        return self.spec.trained_for

    def _given(
        self, start: Frames | str | Path | None, num_context_frames: int | None
    ) -> tuple[Frames, np.ndarray | None, list[str]]:
        """Returns the frames of a start that can be used, their tokens if these were given, and what was done."""
        frames, notices = self._start(start)
        frames, more = _used(frames, num_context_frames, self._trained.ratio, self._trained.block_lat)
        return frames, None, [*notices, *more]

    def _actions(self, given: str | np.ndarray | None, num_frames: int, seed: str) -> np.ndarray | None:
        if given is None:
            return None
        names, typical = self.spec.action_names, self.spec.action_typical
        return resolve_actions(given, names, typical, num_frames, seed)

    def _start(self, start: Frames | str | Path | None) -> tuple[Frames, list[str]]:
        """Returns the frames [v t h w c] of a start in the model's size, and what was done to them."""
        height, width = self.size
        if start is None:
            return np.zeros((1, 0, height, width, 3), np.uint8), []
        frames = read_start(Path(start)) if isinstance(start, str | Path) else start
        frames = frames if frames.ndim == 5 else frames[None]
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ConfigError(f"a start of {frames.dtype} {frames.shape}; expected uint8 [t h w 3]. Change `input`.")
        views = self.spec.data.get("view_names") or [""] * len(frames)
        if len(frames) > len(views) or min(frames.shape[2:4]) < 1:
            raise ConfigError(
                f"a start of {list(frames.shape)}; expected [v t h w 3] with pixels and no more views than these "
                f"weights show ({len(views)}). Change `input` or `ckpt`."
            )
        found = frames.shape[2:4]
        if found == (height, width):
            return frames, []
        notice = f"the start has {found[1]}x{found[0]} pixels; it is resized to {width}x{height}, as in training."
        return np.stack([fitted(view, height, width) for view in frames]), [notice]

    @abstractmethod
    def _stream(self, request: Request) -> Iterator[VideoChunk]:
        """Yields the videos of a request."""

    def text_fields(self, captions: list[str]) -> dict[str, Tensor]:
        """Returns the text fields of `Clip` for captions; none where the network takes no text."""
        if self.text_encoder is None:
            return {}
        return {name: value.to(self.device) for name, value in self.text_encoder(captions).items()}


def _check_count(key: str, value: Any, *, optional: bool) -> None:
    """Raises ConfigError unless a value is a whole number from 0 on (1 for samples)."""
    least = {"num_samples": 1}.get(key, 0)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{key} is {value!r}; expected a whole number. Change `{key}`.")
    if key in ("num_samples", "seed") and value < least:
        raise ConfigError(f"{key} is {value}; expected {least} or more. Change `{key}`.")


def _check_kind(given: Mapping[str, Any], kind: Any, what: str) -> None:
    for key, value in given.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{key} is a {type(value).__name__}; expected {what}. Change `{key}`.")


def with_given(chunk: VideoChunk, start: Frames) -> VideoChunk:
    """Returns a chunk in which given frames are shown as they were given."""
    if chunk.num_given:
        given = start[:, chunk.start : chunk.start + chunk.num_given]
        chunk.frames[:, :, : chunk.num_given] = given[None]
    return chunk


def read_start(path: Path) -> Frames:
    """Returns the frames of an image or a video, uint8 [t h w c].

    Raises:
        ConfigError: there is no such file, or it is damaged.
    """
    from longtake.errors import BadSampleError

    try:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return read_image(path)[None]
        return read_video(path)
    except BadSampleError as error:
        raise ConfigError(f"{error}; expected an image or a video to start from. Change `input`.") from error


def _used(
    frames: Frames, num_context_frames: int | None, ratio: int, block_lat: int | None
) -> tuple[Frames, list[str]]:
    """Returns the last frames of a start that an encoder can code, and what is left out."""
    there = frames.shape[1]
    if num_context_frames is not None:
        if num_context_frames < 0 or num_context_frames > there:
            raise ConfigError(
                f"num_context_frames is {num_context_frames}, but the start has {there} frames; expected 0 to {there}. "
                "Change `num_context_frames` or `input`."
            )
        return frames[:, there - num_context_frames :], []
    count = covering_latent_frames(there, ratio, block_lat)
    usable = pixel_frames(count, ratio, block_lat)
    if usable > there:
        usable = pixel_frames(count - 1, ratio, block_lat)
    if usable == there:
        return frames, []
    lattice = f"1 + k*{ratio}" if block_lat is None else f"blocks of {pixel_frames(block_lat, ratio)}"
    return frames[:, there - usable :], [f"the start has {there} frames; the last {usable} are used ({lattice})."]
