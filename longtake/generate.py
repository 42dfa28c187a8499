"""A trained model from one file, and videos from it: what `longtake.load(path).generate(...)` does.

Everything is rebuilt from what the weights file says of itself. Nothing in it is executed: its config may name classes
of this package only, plus those of packages that the caller trusts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtake.actions import resolve_actions
from longtake.errors import ConfigError
from longtake.geometry import pixel_frames
from longtake.media.grid import resize
from longtake.media.images import IMAGE_SUFFIXES, read_image
from longtake.media.read import read_video
from longtake.model_spec import ModelSpec
from longtake.rollout.conditions import clip_conditions
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan, plan_rollout
from longtake.streaming import VideoChunk, decoded, to_unit_range
from longtake.types import Clip, Conditions

logger = logging.getLogger("longtake")

Frames = np.ndarray
"""Frames of one start, uint8 [t h w c] for one view or [v t h w c]."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted of one generation, everything worked out.

    Attributes:
        plan: what is given and what is predicted.
        start: the given frames, uint8 [v t h w c]; t may be 0.
        actions: of every frame, float32 [t a], or None.
        prompt: the text, or None.
        negative_prompt: the text of the branch that guidance leads away from; None: no text.
        names: what names the noise of each sample.
        seed: of the noise.
        notices: what the caller should know.
    """

    plan: RolloutPlan
    start: Frames
    actions: np.ndarray | None
    prompt: str | None
    negative_prompt: str | None
    names: tuple[str, ...]
    seed: int
    notices: tuple[str, ...]


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


class VideoModel:
    """A network with all that a rollout needs. Made by `longtake.load`.

    Args:
        spec: what the weights say of themselves.
        network: predicts velocities.
        video_encoder: pixels <-> latents.
        text_encoder: captions -> text fields of `Clip`; None where the network takes no text.
        rollout: how chunks follow each other.
        solver: denoises a chunk.
    """

    def __init__(
        self, spec: ModelSpec, network: nn.Module, video_encoder: Any, text_encoder: Any, rollout: Any, solver: Any
    ) -> None:
        self.spec = spec
        self.network = network.eval().requires_grad_(False)
        self.video_encoder, self.text_encoder = video_encoder, text_encoder
        self.rollout, self.solver = rollout, solver
        self.precision = spec.precision
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> VideoModel:
        """Moves the model to a device and returns it."""
        self.device = torch.device(device)
        self.network.to(self.device)
        for encoder in (self.video_encoder, self.text_encoder):
            if hasattr(encoder, "to"):
                encoder.to(self.device)
        return self

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
        actions: str | np.ndarray | None = None,
        seed: int = 0,
        num_samples: int = 1,
        name: str = "",
    ) -> Generation:
        """Returns videos as an iterator of chunks; nothing is computed before the first one is asked for.

        Args:
            num_frames: length of the video, the given frames included; None: as in training. Any length: it is rounded
                up to whole chunks and trimmed again.
            start: what the video begins with: frames uint8 [t h w c] (or [v t h w c]), the path of an image or of a
                video, or None for nothing. Of a video the last frames are taken, as many as make whole chunks.
            num_context_frames: how many frames of `start` are given; None: all that can be used.
            prompt: a text.
            negative_prompt: a text to lead away from (with guidance); None: no text.
            actions: a mode (forward, backward, left, right, random), an .npy or .csv file, or an array [t a].
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
        actions: str | np.ndarray | None,
        seed: int,
        num_samples: int,
        name: str,
    ) -> Request:
        """Returns what `generate` will do with these arguments. Raises ConfigError as it does."""
        if num_samples < 1:
            raise ConfigError(f"num_samples is {num_samples}; expected 1 or more. Change `num_samples`.")
        frames, notices = self._start(start)
        frames, more = _used(frames, num_context_frames, self._trained.ratio)
        plan = plan_rollout(
            self.rollout.kind,
            num_frames_px=int(self.spec.video["num_frames"]) if num_frames is None else num_frames,
            context_px=frames.shape[1],
            trained=self._trained,
        )
        for what, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and self.text_encoder is None:
                raise ConfigError(f"{what} is given, but these weights were trained without text. Leave out `{what}`.")
        return Request(
            plan=plan,
            start=frames[:, frames.shape[1] - plan.start_px :],
            actions=self._actions(actions, plan.num_frames_px, f"{seed}/{name}"),
            prompt=prompt,
            negative_prompt=negative_prompt,
            names=tuple(f"{name}#{sample}" for sample in range(num_samples)),
            seed=seed,
            notices=(*notices, *more, *plan.notices()),
        )

    @property
    def _trained(self) -> Any:
        return self.spec.trained_for

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
        found = frames.shape[2:4]
        if found == (height, width):
            return frames, []
        notice = f"the start has {found[1]}x{found[0]} pixels; it is resized to {width}x{height}, as in training."
        return np.stack([_fitted(view, height, width) for view in frames]), [notice]

    def roll_out(
        self, clip: Clip, plan: RolloutPlan, key: NoiseKey, *, negative: Conditions | None = None
    ) -> Iterator[VideoChunk]:
        """Yields the frames of rollouts for a batch of clips, chunk by chunk; the lower level of `generate`.

        Args:
            clip: what is given and told: `latents` of the start [b v t c h w] (t = plan.start_lat), actions of every
                frame, texts encoded, fps, view_ids.
            plan: from `plan_rollout`.
            key: names the noise, one sample an entry of the batch.
            negative: text of the unconditional branch; None: no text.
        """
        assert clip.latents is not None, "a rollout starts from latents; t = 0 starts from nothing"
        conditions = clip_conditions(
            clip,
            chunk_lat=plan.trained.chunk_lat,
            num_chunks=plan.num_chunks,
            ratio=plan.trained.ratio,
            num_frames_px=plan.num_frames_px,
        )
        more = {} if negative is None else {"negative": negative}
        chunks = self.rollout(self.network, clip.latents, conditions, plan, self.solver, key, **more)
        yield from self._in_precision(decoded(chunks, self.video_encoder, plan))

    def encode(self, frames: np.ndarray) -> Tensor:
        """Returns the latents [b v t c h w] of frames, uint8 [b v t h w c]; t = 0 for none."""
        video = to_unit_range(frames, self.device)
        if video.shape[2]:
            return self.video_encoder.encode(video)
        geometry = self.video_encoder.geometry
        return video.new_zeros(*video.shape[:2], 0, geometry.channels, *geometry.grid(*self.size))

    def _stream(self, request: Request) -> Iterator[VideoChunk]:
        count = len(request.names)
        for notice in request.notices:
            logger.info(notice)
        actions = None
        if request.actions is not None:
            actions = torch.from_numpy(request.actions)[None].expand(count, -1, -1).to(self.device)
        clip = Clip(
            latents=self.encode(request.start[None]).expand(count, -1, -1, -1, -1, -1),
            actions=actions,
            fps=torch.full((count,), float(self.fps), device=self.device),
            view_ids=torch.arange(request.start.shape[0], device=self.device).expand(count, -1),
        )
        clip = dataclasses.replace(clip, **self.text_fields([request.prompt or ""] * count))
        negative = None
        if request.negative_prompt is not None:
            negative = Conditions(**self.text_fields([request.negative_prompt] * count))
        for chunk in self.roll_out(clip, request.plan, NoiseKey(request.seed, request.names), negative=negative):
            if chunk.num_given:  # given frames are shown as they were given
                given = request.start[:, chunk.start : chunk.start + chunk.num_given]
                chunk.frames[:, :, : chunk.num_given] = given[None]
            yield chunk

    def text_fields(self, captions: list[str]) -> dict[str, Tensor]:
        """Returns the text fields of `Clip` for captions; none where the network takes no text."""
        if self.text_encoder is None:
            return {}
        return {name: value.to(self.device) for name, value in self.text_encoder(captions).items()}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _in_precision(self, chunks: Iterator[VideoChunk]) -> Iterator[VideoChunk]:
        """Computes each chunk in the model's precision, and leaves that of the caller alone between chunks."""
        while True:
            with self._precision():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


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


def _used(frames: Frames, num_context_frames: int | None, ratio: int) -> tuple[Frames, list[str]]:
    """Returns the last frames of a start that an encoder can code, and what is left out."""
    there = frames.shape[1]
    if num_context_frames is not None:
        if num_context_frames < 0 or num_context_frames > there:
            raise ConfigError(
                f"num_context_frames is {num_context_frames}, but the start has {there} frames; expected 0 to {there}. "
                "Change `num_context_frames` or `input`."
            )
        return frames[:, there - num_context_frames :], []
    usable = 0 if there == 0 else pixel_frames(1 + (there - 1) // ratio, ratio)
    if usable == there:
        return frames, []
    return frames[:, there - usable :], [f"the start has {there} frames; the last {usable} are used (1 + k*{ratio})."]


def _fitted(frames: Frames, height: int, width: int) -> Frames:
    """Returns frames [t h w c] cut to the wanted aspect ratio around the middle and resized."""
    rows, columns = frames.shape[1:3]
    scale = min(rows / height, columns / width)
    cut_rows, cut_columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
    return resize(frames[:, top : top + cut_rows, left : left + cut_columns], height, width)
