"""From a wished number of pixel frames and a start to chunks: what is given, what is predicted, what is trimmed.

    num_frames 30 px, 3 latents a chunk, ratio 4, start = 5 px (2 latents)

    latent frame   0   1   2 | 3   4   5 | 6   7   8      the first two are given: clean leading latents of chunk 0
    pixel frames   0  -4  -8 |-12 -16 -20|-24 -28 -32     frames 30..32 are predicted and cut off

A start of exactly one chunk is committed to memory as chunk 0. Of a longer one the last whole chunks are kept, encoded
as a causal start of their own, because an encoder codes the first frame of whatever it is given by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from longtake.errors import ConfigError
from longtake.geometry import covering_latent_frames, latent_frames, pixel_frames, pixel_range

RolloutKind = Literal["memory", "one_shot", "sliding_window", "tokens"]
SLIDES = ("sliding_window", "one_shot", "memory")
"""Trained for one of these, weights can also slide: a window is a first chunk with clean leading latents."""


@dataclass(frozen=True, kw_only=True)
class TrainedFor:
    """What weights were trained for; a rollout does nothing else with them. It travels with the weights.

    Attributes:
        rollouts: the kinds of rollout ("memory", "one_shot", "sliding_window", "tokens").
        chunk_lat: latent frames of a chunk (one_shot: of the whole clip; tokens: 1).
        starts_lat: how many latents of the first chunk may be given, 0 = none, 1 = an image (tokens: of a window).
        context_sees: whether a context slot sees itself only or earlier slots too.
        commit_role: the role in which clean chunks went into memory ("context"; diffusion forcing: "target").
        ratio: pixel frames a latent frame.
        own_starts: whether every chunk is encoded as a causal start of its own (chunks of 3 are 9 px, 1 + 4 + 4).
        one_context: whether a chunk is told of nothing but the one before it: memory is emptied before each chunk.
    """

    rollouts: tuple[str, ...]
    chunk_lat: int
    starts_lat: tuple[int, ...]
    context_sees: Literal["self", "past"] = "self"
    commit_role: Literal["context", "target"] = "context"
    ratio: int = 4
    own_starts: bool = False
    one_context: bool = False

    @property
    def block_lat(self) -> int | None:
        """Latent frames after which the encoder starts again, as `longtake.geometry` takes it; None: it never does."""
        return self.chunk_lat if self.own_starts else None

    def pixels(self, num_lat: int) -> int:
        """Returns the pixel frames of `num_lat` latent frames from the beginning of a video."""
        return pixel_frames(num_lat, self.ratio, self.block_lat)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain containers for a header."""
        return {**self.__dict__, "rollouts": list(self.rollouts), "starts_lat": list(self.starts_lat)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> TrainedFor:
        """Returns what `to_dict` described."""
        return cls(**{**state, "rollouts": tuple(state["rollouts"]), "starts_lat": tuple(state["starts_lat"])})


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """A rollout from its start to its last chunk. Made by `plan_rollout`.

    Attributes:
        num_frames_px: pixel frames of the result, those given at the start included.
        num_chunks: chunks from the first given frame on; the last one may reach past `num_frames_px`.
        start_lat: latent frames that are given, encoded as a causal start.
        skipped_px: pixel frames at the front of the given clip that are left out.
        trained: what the weights were trained for.
    """

    num_frames_px: int
    num_chunks: int
    start_lat: int
    skipped_px: int
    trained: TrainedFor

    @property
    def given_chunks(self) -> int:
        """Chunks that are given whole."""
        return self.start_lat // self.trained.chunk_lat

    @property
    def lead_lat(self) -> int:
        """Given latents of chunk 0 where it is not given whole."""
        return self.start_lat % self.trained.chunk_lat

    @property
    def start_px(self) -> int:
        """Pixel frames of the start that are used: the last ones of the given clip."""
        return self.trained.pixels(self.start_lat)

    def frames_of(self, chunk: int) -> tuple[int, int]:
        """Returns the pixel frames [start, stop) of the result that a chunk decodes to, the end trimmed."""
        first = chunk * self.trained.chunk_lat
        trained = self.trained
        start, stop = pixel_range(first, first + trained.chunk_lat, trained.ratio, trained.block_lat)
        return min(start, self.num_frames_px), min(stop, self.num_frames_px)

    def notices(self) -> list[str]:
        """Returns what the user should know about the frames of this rollout, a sentence each."""
        lines = []
        size = self.trained.chunk_lat
        if self.skipped_px:
            lines.append(
                f"the start has {self.start_px + self.skipped_px} frames; the last {self.start_px} are used"
                f"{f' (whole chunks of {size} latent frames)' if size > 1 else ''}, the first {self.skipped_px} are "
                "left out."
            )
        made = self.trained.pixels(self.num_chunks * size)
        if made > self.num_frames_px:
            lines.append(
                f"num_frames={self.num_frames_px} is rounded up to {made}, in whole "
                f"{'chunks' if size > 1 else 'latent frames'}, and trimmed again."
            )
        return lines


def plan_rollout(kind: RolloutKind, *, num_frames_px: int, context_px: int, trained: TrainedFor) -> RolloutPlan:
    """Returns the plan of a rollout.

    Args:
        kind: "memory" (chunk by chunk), "one_shot" (the whole clip as one slot) or "tokens" (latent by latent).
        num_frames_px: pixel frames of the result, those given included.
        context_px: pixel frames that are given: 0, or on the lattice 1 + k * ratio.
        trained: what the weights were trained for.

    Raises:
        ConfigError: a length that cannot be, or something that the weights were not trained for.
    """
    check_rollout(kind, trained)
    if num_frames_px < 1:
        raise ConfigError(f"num_frames is {num_frames_px}; expected 1 frame or more. Change `num_frames`.")
    if context_px < 0:
        raise ConfigError(f"num_context_frames is {context_px}; expected 0 or more. Change `num_context_frames`.")
    given = 0
    if context_px > 0:
        given = latent_frames(context_px, trained.ratio, "num_context_frames", trained.block_lat)
    start_lat = given if given < trained.chunk_lat else given // trained.chunk_lat * trained.chunk_lat
    if kind == "tokens":
        start_lat = min(given, max(trained.starts_lat))  # the last latents of a window are predicted
    start_px = trained.pixels(start_lat)
    _check_start(kind, start_lat, trained)
    if num_frames_px <= start_px:
        raise ConfigError(
            f"num_frames is {num_frames_px}, and {start_px} frames are given at the start, so nothing is left to "
            f"predict; expected more than {start_px}. Change `num_frames` or `num_context_frames`."
        )
    num_chunks = -(-covering_latent_frames(num_frames_px, trained.ratio, trained.block_lat) // trained.chunk_lat)
    if kind == "one_shot" and num_chunks > 1:
        longest = pixel_frames(trained.chunk_lat, trained.ratio)
        raise ConfigError(
            f"num_frames is {num_frames_px}; rollout=one_shot makes one clip of {longest} frames, the length that the "
            f"weights were trained at. Change `num_frames`."
        )
    return RolloutPlan(
        num_frames_px=num_frames_px,
        num_chunks=num_chunks,
        start_lat=start_lat,
        skipped_px=context_px - start_px,
        trained=trained,
    )


def check_rollout(kind: str, trained: TrainedFor) -> None:
    """Checks that the weights were trained for a kind of rollout.

    Raises:
        ConfigError: they were not; both are named.
    """
    fitting = SLIDES if kind == "sliding_window" else (kind,)
    if not set(fitting) & set(trained.rollouts):
        raise ConfigError(
            f"rollout={kind} was chosen, but these weights were trained for rollout={' or '.join(trained.rollouts)}. "
            "Change `rollout`, or take other weights."
        )


def _check_start(kind: str, start_lat: int, trained: TrainedFor) -> None:
    if start_lat >= trained.chunk_lat and kind == "memory":
        return  # whole chunks in memory are what every later chunk was trained on
    if start_lat in trained.starts_lat:
        return
    legal = {0 if lat == 0 else pixel_frames(lat, trained.ratio) for lat in trained.starts_lat}
    if kind == "memory":
        legal.add(pixel_frames(trained.chunk_lat, trained.ratio))
    given = pixel_frames(start_lat, trained.ratio)
    raise ConfigError(
        f"a start of {given} frames was chosen, but these weights were trained to start from "
        f"{' or '.join(str(count) for count in sorted(legal))} frames (0 = from nothing, 1 = an image). "
        f"Change `num_context_frames`, or take other weights{_how_trained(start_lat, trained)}."
    )


def _how_trained(start_lat: int, trained: TrainedFor) -> str:
    if "tokens" not in trained.rollouts or start_lat >= min(trained.starts_lat):
        return ""
    bov = "" if start_lat else " and network.bov=true"
    return f" (token models start from this much when trained with objective.context_lat={start_lat}{bov})"
