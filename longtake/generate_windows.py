"""Videos of one or several views by sliding windows, from given frames, texts, actions and control video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.geometry import group_by_latent
from longtake.rollout.control_inputs import Weight, control_chunks, latent_weights
from longtake.rollout.noise import NoiseKey
from longtake.rollout.sliding_plan import SlidingPlan
from longtake.rollout.sliding_window import WindowChunk
from longtake.streaming import VideoChunk, finite, to_uint8, to_unit_range
from longtake.types import Conditions

if TYPE_CHECKING:
    from longtake.generate_diffusion import DiffusionModel


class ControlWindows(Protocol):
    """Control video that is read window by window, in order."""

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the control types."""
        ...

    def there(self, kind: str) -> list[bool]:
        """Returns which views have a video of a type."""
        ...

    def window(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns frames [start, stop) by type, uint8 [v t h w c]; past the end the last one is repeated."""
        ...

    def where(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns how much control counts in each place, 0..1, float32 [v t h w], of the types that have masks."""
        ...


@dataclass(frozen=True, kw_only=True)
class WindowInputs:
    """What a sliding rollout is given and told.

    Attributes:
        start: the given frames, uint8 [v t h w c] with t = the most that a view is given; t may be 0.
        view_ids: number of each view in the rig; the others are absent.
        prompts: texts of each view, one a chunk, the last of them for all further chunks; None: no text.
        embeddings: of one text a view, [v l d], in place of `prompts`.
        negative_prompt: what guidance leads away from; None: no text.
        actions: of every frame, float32 [t a], or None.
        control: control video, or None.
        control_weight: 0..1, of all types or by type.
    """

    start: np.ndarray
    view_ids: tuple[int, ...]
    prompts: tuple[tuple[str, ...], ...] | None = None
    embeddings: Tensor | None = None
    negative_prompt: str | None = None
    actions: np.ndarray | None = None
    control: ControlWindows | None = None
    control_weight: Weight = 1.0


def window_stream(
    model: DiffusionModel, inputs: WindowInputs, plan: SlidingPlan, key: NoiseKey
) -> Iterator[VideoChunk]:
    """Returns the videos of one set of inputs, one for each sample of `key`, window by window, as an iterator.

    Raises:
        ConfigError: texts or control that these weights were not trained with.
    """
    told = _Told(model, inputs, plan, len(key))
    negative = told.negative()
    start = to_unit_range(inputs.start, model.device)[None].expand(len(key), -1, -1, -1, -1, -1)
    more = {} if negative is None else {"negative": negative}
    chunks = model.rollout(
        model.network, start, told.conditions, plan, model.solver, key, codec=model.video_encoder, **more
    )
    return _with_control(model.in_precision(finite(chunks, lambda chunk: chunk.frames)), told)


def _with_control(chunks: Iterator[WindowChunk], told: _Told) -> Iterator[VideoChunk]:
    for chunk in chunks:
        frames = to_uint8(chunk.frames)
        yield VideoChunk(chunk.index, chunk.start, frames, chunk.num_given, told.shown(chunk.start, frames.shape[2]))


class _Told:
    """What the network is told of each window; control is read and encoded when its window comes."""

    def __init__(self, model: DiffusionModel, inputs: WindowInputs, plan: SlidingPlan, count: int) -> None:
        self._model, self._inputs, self._plan, self._count = model, inputs, plan, count
        self._views = len(inputs.view_ids)
        assert inputs.start.shape[0] == self._views, f"{inputs.start.shape[0]} views start, {self._views} have ids"
        self._numbers: dict[str, int] = {}  # of each different text
        self._texts = self._text_fields()
        self._window: dict[str, np.ndarray] = {}
        self._window_start = 0
        if inputs.control is not None and getattr(model.network, "control", None) is None:
            raise ConfigError(
                f"a control video is given ({', '.join(inputs.control.types)}), but these weights were trained without "
                "control. Leave out `control_path`, or take other weights (`ckpt`)."
            )

    def conditions(self, chunk: int) -> Conditions:
        """Returns the conditions of one window, one slot."""
        plan, model, count = self._plan, self._model, self._count
        control, weights = self._control(chunk)
        ids = torch.tensor(self._inputs.view_ids, device=model.device).expand(count, -1)
        return Conditions(
            **self._texts,
            text_index=self._text_index(chunk),
            actions=self._actions(*plan.windows.window_of(chunk)),
            fps=torch.full((count,), float(model.fps), device=model.device),
            view_ids=ids,
            control=control or None,
            control_weight=weights or None,
        )

    def negative(self) -> Conditions | None:
        """Returns the text of the unconditional branch, as often as there are texts."""
        text = self._inputs.negative_prompt
        if text is None:
            return None
        fields: dict[str, Any] = self._model.text_fields([text] * self._num_texts)
        if not fields:
            raise ConfigError("negative_prompt is given, but these weights were trained without text. Leave it out.")
        told: dict[str, Any] = {name: self._of_every_sample(value) for name, value in fields.items()}
        return Conditions(**told)

    def shown(self, start: int, count: int) -> dict[str, np.ndarray] | None:
        """Returns the control frames beside new frames, uint8 [v t h w c] by type; None: there is no control."""
        if not self._window:
            return None
        first = start - self._window_start
        return {kind: frames[:, first : first + count] for kind, frames in self._window.items()}

    @property
    def _num_texts(self) -> int:
        embeddings = self._inputs.embeddings
        return len(embeddings) if embeddings is not None else max(1, len(self._numbers))

    def _of_every_sample(self, texts: Tensor) -> Tensor:
        """Returns the fields of texts [n 1 ...] as [samples n ...]."""
        return texts[:, 0][None].expand(self._count, *[-1] * (texts.ndim - 1))

    def _text_fields(self) -> dict[str, Any]:
        inputs, model = self._inputs, self._model
        if inputs.embeddings is not None:
            return {"text_emb": self._of_every_sample(inputs.embeddings[:, None].to(model.device))}
        if model.text_encoder is None:
            if inputs.prompts is not None:
                raise ConfigError(
                    "prompt is given, but these weights were trained without text. Leave out `prompt`, or take other "
                    "weights (`ckpt`)."
                )
            return {}
        for texts in inputs.prompts or (("",),):
            for text in texts:
                self._numbers.setdefault(text, len(self._numbers))
        fields = model.text_fields(list(self._numbers))
        return {name: self._of_every_sample(value) for name, value in fields.items()}

    def _text_index(self, chunk: int) -> Tensor | None:
        """Returns which text each view is told, int64 [b 1 v]; None: there is one."""
        if self._num_texts == 1:
            return None
        if self._inputs.embeddings is not None:
            numbers = list(range(self._views))
        else:
            assert self._inputs.prompts is not None, "several texts come from prompts"
            numbers = [self._numbers[texts[min(chunk, len(texts) - 1)]] for texts in self._inputs.prompts]
        return torch.tensor(numbers, device=self._model.device).expand(self._count, 1, -1)

    def _actions(self, start: int, stop: int) -> Tensor | None:
        actions = self._inputs.actions
        if actions is None:
            return None
        own = torch.from_numpy(actions[start:stop])[None].to(self._model.device)
        grouped = window_actions(own, stop - start, self._plan.trained.ratio)
        return grouped[:, None].expand(self._count, -1, -1, -1)

    def _control(self, chunk: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        source, model = self._inputs.control, self._model
        if source is None:
            return {}, {}
        start, stop = self._plan.windows.window_of(chunk)
        self._window, self._window_start = source.window(start, stop), start
        latents = {kind: model.encode(frames[None]) for kind, frames in self._window.items()}
        there = {kind: torch.tensor([source.there(kind)]) for kind in latents}
        where = {
            kind: latent_weights(torch.from_numpy(mask)[None].to(model.device), _places(latents[kind]))
            for kind, mask in source.where(start, stop).items()
        }
        control, weights = control_chunks(
            latents,
            chunk_lat=self._plan.trained.chunk_lat,
            num_chunks=1,
            weight=self._inputs.control_weight,
            there=there,
            where=where,
        )
        return self._of_all(control), self._of_all(weights)

    def _of_all(self, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {kind: value.expand(self._count, *[-1] * (value.ndim - 1)) for kind, value in group.items()}


def _places(latents: Tensor) -> tuple[int, int, int]:
    """Returns frames, rows and columns of latents [b v t c h w]."""
    return latents.shape[2], latents.shape[4], latents.shape[5]


def window_actions(actions: Tensor, num_frames: int, ratio: int) -> Tensor:
    """Returns the actions of one window, grouped by latent frame, [b f ratio*a].

    The first row is null, as it is in every clip of training: what led to a window's first frame lies before it.

    Args:
        actions: of the frames of the window, [b t a]; fewer where the video ends inside of it.
        num_frames: frames of the window; those past the end repeat the last action.
        ratio: pixel frames a latent frame.
    """
    missing = num_frames - actions.shape[1]
    own = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, 1:]], dim=1)
    return group_by_latent(torch.cat([own, actions[:, -1:].expand(-1, missing, -1)], dim=1), ratio)


def default_inputs(
    start: np.ndarray, prompt: str | None, negative_prompt: str | None, actions: np.ndarray | None
) -> WindowInputs:
    """Returns the inputs of a plain rollout: all views from the first on, one text for all of them."""
    views = len(start)
    prompts = None if prompt is None else ((prompt,),) * views
    return WindowInputs(
        start=start,
        view_ids=tuple(range(views)),
        prompts=prompts,
        negative_prompt=negative_prompt,
        actions=actions,
    )
