"""Videos from a network that predicts velocities of latents."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from longtake.errors import DataError
from longtake.generate import Generation, Request, VideoModel, logger, with_given
from longtake.generate_windows import WindowInputs, default_inputs, window_stream
from longtake.live_actions import ActionSource, VideoEnded, live_conditions
from longtake.model_spec import DiffusionSpec
from longtake.rollout.conditions import ConditionSource, clip_conditions
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan, check_rollout
from longtake.rollout.sliding_plan import AnyPlan, SlidingPlan, plan_of
from longtake.streaming import VideoChunk, decoded, finite, to_unit_range
from longtake.types import Clip, Conditions

T = TypeVar("T")


class DiffusionModel(VideoModel):
    """See `VideoModel`.

    Args:
        spec: what the weights say of themselves.
        network: predicts velocities.
        encoders: see `VideoModel`.
        rollout: how chunks follow each other.
        solver: denoises a chunk.
    """

    def __init__(
        self, spec: DiffusionSpec, network: nn.Module, encoders: Mapping[str, Any], rollout: Any, solver: Any
    ) -> None:
        super().__init__(spec, network, encoders, rollout)
        self.solver = solver

    def use(self, *, rollout: Any = None, solver: Any = None) -> None:
        super().use(rollout=rollout)
        self.solver = self.solver if solver is None else solver
        self.solver.begin(self.rollout.num_steps)

    def roll_out(
        self,
        clip: Clip,
        plan: RolloutPlan,
        key: NoiseKey,
        *,
        negative: Conditions | None = None,
        live: ActionSource | None = None,
    ) -> Iterator[VideoChunk]:
        """Yields the frames of rollouts for a batch of clips, chunk by chunk; the lower level of `generate`.

        Args:
            clip: what is given and told: `latents` of the start [b v t c h w] (t = plan.start_lat), actions of every
                frame, texts encoded, fps, view_ids.
            plan: from `plan_rollout`.
            key: names the noise, one sample an entry of the batch.
            negative: text of the unconditional branch; None: no text.
            live: gives the actions chunk by chunk, in place of those of the clip; the video may then end early.
        """
        assert clip.latents is not None, "a rollout starts from latents; t = 0 starts from nothing"
        conditions: ConditionSource = clip_conditions(
            clip if live is None else dataclasses.replace(clip, actions=None),
            chunk_lat=plan.trained.chunk_lat,
            num_chunks=plan.num_chunks if live is None else 1,
            ratio=plan.trained.ratio,
            num_frames_px=plan.num_frames_px,
            own_starts=plan.trained.own_starts,
        )
        if live is not None:
            conditions = live_conditions(conditions, live, plan, len(key), self.device)
        more = {} if negative is None else {"negative": negative}
        chunks = self.rollout(self.network, clip.latents, conditions, plan, self.solver, key, **more)
        made = False
        try:
            sound = finite(chunks, lambda chunk: chunk.latents)
            for chunk in self.in_precision(decoded(sound, self.video_encoder, plan)):
                made = True
                yield chunk
        except VideoEnded:
            if not made:
                raise DataError("the video ended before its first chunk, so there is nothing to show.") from None

    def encode(self, frames: np.ndarray) -> Tensor:
        """Returns the latents [b v t c h w] of frames, uint8 [b v t h w c]; t = 0 for none."""
        video = to_unit_range(frames, self.device)
        if video.shape[2]:
            return self.video_encoder.encode_blocks(video, self._trained.block_lat)
        geometry = self.video_encoder.geometry
        return video.new_zeros(*video.shape[:2], 0, geometry.channels, *geometry.grid(*self.size))

    def generate_views(
        self,
        inputs: WindowInputs,
        given_px: tuple[int, ...],
        *,
        num_frames: int,
        seed: int,
        num_samples: int,
        name: str,
    ) -> Generation:
        """Returns videos of several views by sliding windows, as an iterator of chunks.

        Args:
            inputs: what is given and told.
            given_px: how many frames of the start each view is given.
            num_frames: length of the video, the given frames included.
            seed: of all noise.
            num_samples: videos of the same wish, each with noise of its own.
            name: tells the noise of several wishes with one seed apart.

        Raises:
            ConfigError: something that cannot be done, or that the weights were not trained for.
        """
        check_rollout("sliding_window", self.spec.trained_for)
        plan = plan_of(
            self.rollout,
            num_frames_px=num_frames,
            context_px=given_px,
            trained=self.spec.trained_for,
            context_key="num_conditional_frames",
        )
        names = tuple(f"{name}#{sample}" for sample in range(num_samples))
        start = inputs.start[:, : min(given_px)]  # what all views show as it was given
        request = Request(plan, start, inputs.actions, None, None, names, seed, tuple(plan.notices()))
        for notice in request.notices:
            logger.info(notice)
        return Generation(request, self._windows(inputs, plan, NoiseKey(seed, names)))

    def _windows(self, inputs: WindowInputs, plan: AnyPlan, key: NoiseKey) -> Iterator[VideoChunk]:
        assert isinstance(plan, SlidingPlan), f"windows follow a sliding plan, got {plan}"
        return window_stream(self, inputs, plan, key)

    def _stream(self, request: Request) -> Iterator[VideoChunk]:
        count = len(request.names)
        for notice in request.notices:
            logger.info(notice)
        if self.rollout.kind == "sliding_window":
            inputs = default_inputs(request.start, request.prompt, request.negative_prompt, request.actions)
            yield from self._windows(inputs, request.plan, NoiseKey(request.seed, request.names))
            return
        assert isinstance(request.plan, RolloutPlan)
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
            fields: dict[str, Any] = self.text_fields([request.negative_prompt] * count)
            negative = Conditions(**fields)
        key = NoiseKey(request.seed, request.names)
        for chunk in self.roll_out(clip, request.plan, key, negative=negative, live=request.live):
            yield with_given(chunk, request.start)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def in_precision(self, chunks: Iterator[T]) -> Iterator[T]:
        """Computes each chunk in the model's precision, and leaves that of the caller alone between chunks."""
        while True:
            with self._precision():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk
