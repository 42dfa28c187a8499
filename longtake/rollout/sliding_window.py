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


@dataclass(frozen=True)
class WindowState:
    """All that a rollout by windows carries from window to window. Its tensors are never changed in place.

    Attributes:
        key: names the noise.
        next_chunk: the window that comes next.
        given: frames that it begins with, float in [-1, 1], [b v t c h w].
    """

    key: NoiseKey
    next_chunk: int
    given: Tensor

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and plain values only, so that it can be saved and read back without running any code."""
        return {
            "seed": self.key.seed,
            "samples": list(self.key.samples),
            "next_chunk": self.next_chunk,
            "given": self.given,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> WindowState:
        """Returns the state that `state_dict` described."""
        return cls(NoiseKey(state["seed"], tuple(state["samples"])), state["next_chunk"], state["given"])

    def to(self, device: torch.device | str) -> WindowState:
        """Returns this state on another device."""
        return dataclasses.replace(self, given=self.given.to(device))


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
        guidance_interval: lowest and highest noise level at which guidance acts; elsewhere it costs nothing.
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
        guidance_interval: Sequence[float] = (0.0, 1.0),
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
        self.guidance = Guidance(guidance, tuple(unconditional), tuple(guidance_interval))
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
        state: WindowState | None = None,
    ) -> WindowStream:
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
            state: continue from here; `start` is then not read, but still says the size and device of the frames.
        """
        needed, there = plan.start_needed_px, start.shape[2]
        assert there == needed, f"the start has {there} frames, the plan says {needed}"
        assert len(key) == len(start), f"{len(key)} noise keys for a batch of {len(start)}"
        solver.begin(self.num_steps)  # a wrong number of steps is found before anything is computed
        return WindowStream(self, network, start, conditions, plan, solver, key, codec, negative, state)

    def window(
        self,
        network: Network,
        given: Tensor,
        conditions: Conditions,
        plan: SlidingPlan,
        solver: Solver,
        key: NoiseKey,
        chunk: int,
        *,
        codec: Codec,
        negative: Conditions | None = None,
    ) -> tuple[WindowChunk, Tensor]:
        """Returns one window, and the frames that the next one begins with.

        Args:
            network: see `__call__`.
            given: frames that the window begins with, float in [-1, 1], [b v t c h w].
            conditions: of this window, one slot.
            plan: see `__call__`.
            solver: see `__call__`.
            key: see `__call__`.
            chunk: number of the window.
            codec: see `__call__`.
            negative: see `__call__`.
        """
        views, windows = given.shape[1], plan.windows
        counts = plan.given_lat(chunk, views)
        told = _first(counts, plan.trained.chunk_lat)[None, None].expand(len(given), -1, -1, -1)
        own = self.guidance.stack(dataclasses.replace(conditions, given=told.to(given.device)), negative)
        clean = self._clean_latents(given, codec, plan.trained.chunk_lat)
        latents = self._denoised(network, clean, counts, own, solver, key, chunk)
        video = codec.decode(latents)
        given_px = [0 if lat == 0 else 1 + (lat - 1) * plan.trained.ratio for lat in counts]
        for view, count in enumerate(given_px):  # what was given is shown, and handed on, as it was given
            video[:, view, :count] = given[:, view, :count]
        first, stop = plan.frames_of(chunk)
        skip = first - windows.window_of(chunk)[0]
        num_given = min(plan.start_px, stop) if chunk == 0 else 0
        made = WindowChunk(chunk, first, video[:, :, skip : skip + stop - first], num_given, latents)
        return made, self._handed_over(video[:, :, windows.stride_px :])

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
            velocity, _ = evaluate(network, [x], [sigma], conditions, layout, None, self.guidance, told)
            x = torch.where(pinned, seen, run.step(x, velocity))
        return torch.where(pinned, clean, x)


class WindowStream(Iterator[WindowChunk]):
    """A rollout under way. `state` may be saved between two windows and given to a new rollout."""

    def __init__(
        self,
        rollout: SlidingWindowRollout,
        network: Network,
        start: Tensor,
        conditions: ConditionSource,
        plan: SlidingPlan,
        solver: Solver,
        key: NoiseKey,
        codec: Codec,
        negative: Conditions | None,
        state: WindowState | None,
    ) -> None:
        self._rollout, self._network, self._conditions, self._plan = rollout, network, conditions, plan
        self._solver, self._codec, self._negative = solver, codec, negative
        self.state = state or WindowState(key, 0, start)
        wanted = plan.windows.overlap_px if self.state.next_chunk else plan.start_needed_px
        shape = (*start.shape[:2], wanted, *start.shape[3:])
        if self.state.given.shape != shape:
            raise ConfigError(
                f"the saved rollout hands over frames {list(self.state.given.shape)}, and {list(shape)} are wanted "
                "[b v t c h w]; expected a state of the same rollout. Change `rollout.chunk_overlap`."
            )

    def __len__(self) -> int:
        """Returns how many windows are still to come."""
        return max(0, self._plan.num_chunks - self.state.next_chunk)

    @torch.no_grad()
    def __next__(self) -> WindowChunk:
        chunk, source = self.state.next_chunk, self._conditions
        if chunk >= self._plan.num_chunks:
            raise StopIteration
        made, given = self._rollout.window(
            self._network,
            self.state.given,
            of_chunks(source, [chunk]) if isinstance(source, Conditions) else source(chunk),
            self._plan,
            self._solver,
            self.state.key,
            chunk,
            codec=self._codec,
            negative=self._negative,
        )
        self.state = WindowState(self.state.key, chunk + 1, given)
        return made


def _first(counts: Sequence[int], frames: int) -> Tensor:
    """Returns which latents of each view are given, its first ones, bool [v f]."""
    return torch.arange(frames) < torch.tensor(counts)[:, None]
