"""Rollout by windows: each chunk is generated as a clip of its own that begins with the last frames of the one before.

    chunk i    encode(last frames of i-1) -> clean leading latents | noise -> denoise -> decode -> new and last frames

There is no memory but these few frames, so any diffusion weights that were trained to start from clean frames can do
it, bidirectional or causal. The frames are handed over as pixels and encoded again as a causal start: the last latent
of a chunk codes several frames and the first of the next one codes one, so latents cannot be handed over as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.layout import ChunkLayout
from longtake.rollout.conditions import ConditionSource, of_chunks
from longtake.rollout.cosmos_noise import cosmos_noise
from longtake.rollout.denoise import Guidance, Network, checked_context_noise, evaluate, noise_of_chunk
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutKind
from longtake.rollout.sliding_plan import SlidingPlan
from longtake.rollout.solvers import Solver
from longtake.types import Conditions

HandOff = Literal["float", "uint8"]
_HAND_OFFS = ("float", "uint8")
_NOISES = ("keyed", "cosmos")


class Codec(Protocol):
    """What a sliding window needs of a video encoder."""

    geometry: Any

    def encode(self, video: Tensor) -> Tensor:
        """Returns latents [b v f c h w] of frames [b v t c h w] in [-1, 1] from a causal start."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the frames of latents from a causal start."""
        ...


@dataclass(frozen=True)
class WindowChunk:
    """What one window adds to the video.

    Attributes:
        index: of the window.
        start: number of its first new frame.
        frames: the new frames, float in [-1, 1], [b v t c h w]; the last window ends where the video ends.
        num_given: how many of them were given in every view.
        latents: of the whole window, normalised, [b v f c h w].
    """

    index: int
    start: int
    frames: Tensor
    num_given: int
    latents: Tensor


class SlidingWindowRollout:
    """Generates window after window.

    Args:
        num_steps: network evaluations a chunk; None: as many as the solver lists.
        guidance: scale of classifier-free guidance; 1 = none, at half the cost.
        unconditional: what the unconditional branch does not get: "text", "actions".
        chunk_overlap: frames handed from chunk to chunk: 0, or 1 + k * ratio below the chunk.
        hand_off: "float" hands frames over as they were decoded, "uint8" rounded to 8 bit as a file would hold them.
        noise: "keyed" (see `rollout.noise`), or "cosmos" for the numbers of NVIDIA's drivers.
        context_noise: noise level of the frames handed over, which the network is told; 0 = clean.
        allow_untrained_overlap: takes an overlap that the weights never had as a start.
    """

    kind: RolloutKind = "sliding_window"

    def __init__(
        self,
        *,
        num_steps: int | None = 35,
        guidance: float = 4.0,
        unconditional: Sequence[str] = ("text",),
        chunk_overlap: int = 1,
        hand_off: HandOff = "float",
        noise: Literal["keyed", "cosmos"] = "keyed",
        context_noise: float = 0.0,
        allow_untrained_overlap: bool = False,
    ) -> None:
        if hand_off not in _HAND_OFFS:
            raise unknown_choice("way to hand frames over", hand_off, _HAND_OFFS, "rollout.hand_off")
        if noise not in _NOISES:
            raise unknown_choice("kind of noise", noise, _NOISES, "rollout.noise")
        if isinstance(chunk_overlap, bool) or chunk_overlap < 0:
            raise ConfigError(
                f"rollout.chunk_overlap is {chunk_overlap}; expected 0 or more frames, for example 0 or 1. Change "
                "`rollout.chunk_overlap`."
            )
        self.num_steps = num_steps
        self.guidance = Guidance(guidance, tuple(unconditional))
        self.chunk_overlap, self.hand_off, self.noise = chunk_overlap, hand_off, noise
        self.context_noise = checked_context_noise(context_noise)
        self.allow_untrained_overlap = allow_untrained_overlap

    def __call__(
        self,
        network: Network,
        start: Tensor,
        conditions: ConditionSource,
        plan: SlidingPlan,
        solver: Solver,
        key: NoiseKey,
        *,
        codec: Codec,
        negative: Conditions | None = None,
    ) -> Iterator[WindowChunk]:
        """Returns the windows from the first one on as an iterator. Only the window at hand is held.

        Args:
            network: predicts velocities; give it in evaluation mode.
            start: the given frames, float in [-1, 1], [b v t c h w] with t = plan.start_needed_px, which may be 0; of
                a view that is given fewer frames the rest is not looked at.
            conditions: with the windows as slot axis, or a function that returns those of one window (one slot), so
                that long controls need not be held. Frames of a window are counted from its own first frame.
            plan: from `plan_sliding`.
            solver: denoises a chunk.
            key: names the noise, one sample an entry of the batch.
            codec: frames <-> latents.
            negative: text of the unconditional branch (text fields only); None: no text.
        """
        needed, there = plan.start_needed_px, start.shape[2]
        assert there == needed, f"the start has {there} frames, the plan says {needed}"
        assert len(key) == len(start), f"{len(key)} noise keys for a batch of {len(start)}"
        solver.begin(self.num_steps)  # a wrong number of steps is found before anything is computed
        return self._windows(network, start, conditions, plan, solver, key, codec, negative)

    def _windows(
        self,
        network: Network,
        start: Tensor,
        conditions: ConditionSource,
        plan: SlidingPlan,
        solver: Solver,
        key: NoiseKey,
        codec: Codec,
        negative: Conditions | None,
    ) -> Iterator[WindowChunk]:
        views, windows = start.shape[1], plan.windows
        given = start
        for chunk in range(plan.num_chunks):
            own = of_chunks(conditions, [chunk]) if isinstance(conditions, Conditions) else conditions(chunk)
            counts = plan.given_lat(chunk, views)
            told = _first(counts, plan.trained.chunk_lat)[None, None].expand(len(start), -1, -1, -1)
            own = self.guidance.stack(dataclasses.replace(own, given=told.to(start.device)), negative)
            with torch.no_grad():
                clean = self._clean_latents(given, codec, plan.trained.chunk_lat)
                latents = self._denoised(network, clean, counts, own, solver, key, chunk)
                video = codec.decode(latents)
            given_px = [0 if lat == 0 else 1 + (lat - 1) * plan.trained.ratio for lat in counts]
            for view, count in enumerate(given_px):  # what was given is shown, and handed on, as it was given
                video[:, view, :count] = given[:, view, :count]
            first, stop = plan.frames_of(chunk)
            skip = first - windows.window_of(chunk)[0]
            given = self._handed_over(video[:, :, windows.stride_px :])
            num_given = min(plan.start_px, stop) if chunk == 0 else 0
            yield WindowChunk(chunk, first, video[:, :, skip : skip + stop - first], num_given, latents)

    def _handed_over(self, frames: Tensor) -> Tensor:
        """Returns the last frames of a window as the next one gets them. A copy: the window itself is let go."""
        if self.hand_off == "float":
            return frames.clone()
        return ((frames.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    @staticmethod
    def _clean_latents(given: Tensor, codec: Codec, chunk_lat: int) -> Tensor:
        """Returns the latents of given frames, zeros after them up to the length of a chunk, [b v f c h w]."""
        b, views, _, _, height, width = given.shape
        clean = given.new_zeros(b, views, chunk_lat, codec.geometry.channels, *codec.geometry.grid(height, width))
        if given.shape[2]:
            encoded = codec.encode(given)
            clean[:, :, : encoded.shape[2]] = encoded.to(clean.dtype)
        return clean

    def _denoised(
        self,
        network: Network,
        clean: Tensor,
        counts: tuple[int, ...],
        conditions: Conditions,
        solver: Solver,
        key: NoiseKey,
        chunk: int,
    ) -> Tensor:
        """Returns the latents of a window whose first `counts` latents of each view are given, [b v f c h w].

        Given latents come back clean: noise on them is for the network only, and would reach new frames when the
        window is decoded.
        """
        views, frames = clean.shape[1:3]
        is_given = _first(counts if len(set(counts)) > 1 else counts[:1], frames)  # one row where all views are equal
        level, seen = self.context_noise if chunk else 0.0, clean
        if level > 0:
            seen = (1 - level) * clean + level * noise_of_chunk(key, "context", chunk, clean)
        pinned = is_given.to(clean.device)[:, :, None, None, None].expand(views, -1, -1, -1, -1)
        noise = (
            cosmos_noise(key, chunk, clean) if self.noise == "cosmos" else noise_of_chunk(key, "noise", chunk, clean)
        )
        x = torch.where(pinned, seen, noise)
        layout = ChunkLayout.one_shot(network.grid(tuple(clean.shape[1:])))
        run = solver.begin(self.num_steps)
        for told in run.schedule.told:
            sigma = torch.where(is_given, level, torch.tensor(told, dtype=torch.float64))
            velocity, _ = evaluate(network, [x], [sigma], conditions, layout, None, self.guidance)
            x = torch.where(pinned, seen, run.step(x, velocity))
        return torch.where(pinned, clean, x)


def _first(counts: Sequence[int], frames: int) -> Tensor:
    """Returns which latents of each view are given, its first ones, bool [v f]."""
    return torch.arange(frames) < torch.tensor(counts)[:, None]
