"""Windows of a fixed length over a video of any length, each beginning with the last frames of the one before.

    chunk of 29 px, overlap 5 px, stride 24; 101 frames are 4 chunks

    chunk 0   0 ......... 28
    chunk 1            24 ......... 52         24..28 are handed over, 29..52 are new
    chunk 2                      48 ......... 76
    chunk 3                                72 ......... 100

Every chunk is computed at its full length; what reaches past the wanted end is cut off, so no frame is ever missing and
a longer rollout repeats the chunks of a shorter one. All counts are pixel frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longtake.errors import ConfigError
from longtake.geometry import latent_frames, pixel_frames
from longtake.rollout.plan import RolloutPlan, TrainedFor, check_rollout, plan_rollout


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of a sliding rollout.

    Attributes:
        chunk_px: frames of a window.
        overlap_px: frames that a window shares with the one before.
        num_frames_px: frames of the result, 1 or more.
    """

    chunk_px: int
    overlap_px: int
    num_frames_px: int

    def __post_init__(self) -> None:
        assert 0 <= self.overlap_px < self.chunk_px, f"overlap {self.overlap_px} in chunks of {self.chunk_px} frames"
        assert self.num_frames_px >= 1, f"{self.num_frames_px} frames"

    @property
    def stride_px(self) -> int:
        """Frames from the beginning of one window to that of the next."""
        return self.chunk_px - self.overlap_px

    @property
    def num_chunks(self) -> int:
        """How many windows it takes: max(1, ceil((F - o) / s))."""
        return max(1, -((self.overlap_px - self.num_frames_px) // self.stride_px))

    @property
    def made_px(self) -> int:
        """Frames that these windows make, before the end is cut off."""
        return whole_length(self.num_chunks, self.chunk_px, self.overlap_px)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is cut off."""
        return self.made_px == self.num_frames_px

    def window_of(self, chunk: int) -> tuple[int, int]:
        """Returns the frames [start, stop) that a window covers; `stop` may lie past the end of the result."""
        start = chunk * self.stride_px
        return start, start + self.chunk_px

    def covered_by(self, chunk: int) -> tuple[int, int]:
        """Returns the frames [start, stop) of the result that a window covers."""
        start, stop = self.window_of(chunk)
        return start, min(stop, self.num_frames_px)

    def frames_of(self, chunk: int) -> tuple[int, int]:
        """Returns the frames [start, stop) of the result that come from a window: all but those handed over to it."""
        start, stop = self.covered_by(chunk)
        return start + (self.overlap_px if chunk else 0), stop


def whole_length(num_chunks: int, chunk_px: int, overlap_px: int) -> int:
    """Returns the frames of a number of whole windows: C + (n - 1) s."""
    return chunk_px + (num_chunks - 1) * (chunk_px - overlap_px)


def most_chunks(available_px: int, chunk_px: int, overlap_px: int) -> int:
    """Returns how many whole windows fit into `available_px` frames, at least 1: max(1, 1 + (A - C) // s)."""
    return max(1, 1 + (available_px - chunk_px) // (chunk_px - overlap_px))


def check_overlap(overlap_px: int, chunk_px: int, ratio: int, key: str = "rollout.chunk_overlap") -> int:
    """Returns the latent frames of an overlap.

    Args:
        overlap_px: 0, or 1 + k * ratio, below the chunk.
        chunk_px: frames of a window.
        ratio: pixel frames a latent frame.
        key: configuration key that holds it, for the message.

    Raises:
        ConfigError: any other value; with the two nearest legal ones.
    """
    legal = [0, *range(1, chunk_px, ratio)]
    if overlap_px in legal:
        return 0 if overlap_px == 0 else latent_frames(overlap_px, ratio, key)
    nearest = sorted(sorted(legal, key=lambda value: (abs(value - overlap_px), value))[:2])
    raise ConfigError(
        f"{key} is {overlap_px}; expected 0 or 1 + k*{ratio} frames below the chunk of {chunk_px}, for example "
        f"{' or '.join(map(str, nearest))}. Change `{key}`."
    )


@dataclass(frozen=True, kw_only=True)
class SlidingPlan:
    """A sliding rollout from its start to its last chunk. Made by `plan_sliding`.

    Attributes:
        windows: of the rollout.
        given_px: leading frames of each view that are given, 0 or 1 + k * ratio; one number for all views, or one each.
        skipped_px: frames at the front of the given clip that are left out.
        trained: what the weights were trained for.
    """

    windows: Windows
    given_px: tuple[int, ...]
    skipped_px: int
    trained: TrainedFor

    @property
    def num_frames_px(self) -> int:
        """Frames of the result, those given included."""
        return self.windows.num_frames_px

    @property
    def num_chunks(self) -> int:
        """Windows from the first frame on."""
        return self.windows.num_chunks

    @property
    def start_px(self) -> int:
        """Leading frames that are given in every view; figures leave them out."""
        return min(self.given_px)

    @property
    def start_needed_px(self) -> int:
        """Frames of the start that are used in some view."""
        return max(self.given_px)

    def frames_of(self, chunk: int) -> tuple[int, int]:
        """Returns the frames [start, stop) of the result that a chunk adds."""
        return self.windows.frames_of(chunk)

    def given_lat(self, chunk: int, views: int) -> tuple[int, ...]:
        """Returns how many leading latents of a window are given, for each view."""
        if chunk:
            counts = (self.windows.overlap_px,) * views
        else:
            counts = self.given_px if len(self.given_px) == views else self.given_px * views
        assert len(counts) == views, f"{len(counts)} counts of given frames for {views} views"
        return tuple(0 if px == 0 else 1 + (px - 1) // self.trained.ratio for px in counts)

    def notices(self) -> list[str]:
        """Returns what the user should know about the frames of this rollout, a sentence each."""
        lines = []
        if self.skipped_px:
            lines.append(
                f"the start has {self.start_needed_px + self.skipped_px} frames; the last {self.start_needed_px} are "
                f"used, the first {self.skipped_px} are left out."
            )
        if not self.windows.is_exact:
            lines.append(
                f"num_frames={self.num_frames_px} is rounded up to {self.windows.made_px}, in whole chunks of "
                f"{self.windows.chunk_px} frames with {self.windows.overlap_px} of overlap, and trimmed again."
            )
        return lines


AnyPlan = RolloutPlan | SlidingPlan


def plan_of(
    rollout: Any, *, num_frames_px: int, context_px: int | tuple[int, ...], trained: TrainedFor, context_key: str = ""
) -> AnyPlan:
    """Returns the plan of any kind of rollout.

    Args:
        rollout: what will follow the plan.
        num_frames_px: frames of the result, those given included.
        context_px: frames that are given at the start; of each view only where windows slide.
        trained: what the weights were trained for.
        context_key: the key that holds `context_px`, for messages.

    Raises:
        ConfigError: a length that cannot be, or something that the weights were not trained for.
    """
    if rollout.kind != "sliding_window":
        assert isinstance(context_px, int), "only sliding windows start each view by itself"
        return plan_rollout(rollout.kind, num_frames_px=num_frames_px, context_px=context_px, trained=trained)
    return plan_sliding(
        num_frames_px=num_frames_px,
        context_px=context_px,
        overlap_px=rollout.chunk_overlap,
        trained=trained,
        allow_untrained_overlap=rollout.allow_untrained_overlap,
        context_key=context_key or "num_context_frames",
    )


def plan_sliding(
    *,
    num_frames_px: int,
    context_px: int | tuple[int, ...],
    overlap_px: int,
    trained: TrainedFor,
    allow_untrained_overlap: bool = False,
    context_key: str = "num_context_frames",
) -> SlidingPlan:
    """Returns the plan of a sliding rollout.

    Args:
        num_frames_px: frames of the result, those given included.
        context_px: frames that are given at the start, of every view or of each: 0, or on the lattice. Of more than the
            weights were trained to start from, the most that they were trained with are used.
        overlap_px: frames handed from chunk to chunk.
        trained: what the weights were trained for; their chunk is the window.
        allow_untrained_overlap: whether an overlap may be one that the weights never had as a start.
        context_key: the key that holds `context_px`, for messages.

    Raises:
        ConfigError: a length that cannot be, or something that the weights were not trained for.
    """
    chunk_px = pixel_frames(trained.chunk_lat, trained.ratio)
    check_sliding(overlap_px, trained, allow_untrained_overlap=allow_untrained_overlap)
    if num_frames_px < 1:
        raise ConfigError(f"num_frames is {num_frames_px}; expected 1 frame or more. Change `num_frames`.")
    asked = (context_px,) if isinstance(context_px, int) else context_px
    legal = _starts_px(trained)
    skipped = max(0, max(asked) - max(legal)) if isinstance(context_px, int) else 0
    given = (asked[0] - skipped,) if isinstance(context_px, int) else asked
    for count in given:
        if count not in legal:
            raise ConfigError(
                f"{context_key} is {count}; these weights were trained to start from {_listed(legal)} frames "
                f"(0 = from nothing, 1 = an image). Change `{context_key}`, or take other weights."
            )
    if num_frames_px <= min(given):
        raise ConfigError(
            f"num_frames is {num_frames_px}, and {min(given)} frames are given at the start, so nothing is left to "
            f"predict; expected more than {min(given)}. Change `num_frames` or `{context_key}`."
        )
    windows = Windows(chunk_px=chunk_px, overlap_px=overlap_px, num_frames_px=num_frames_px)
    return SlidingPlan(windows=windows, given_px=given, skipped_px=skipped, trained=trained)


def check_sliding(overlap_px: int, trained: TrainedFor, *, allow_untrained_overlap: bool) -> None:
    """Checks that weights can be rolled out with an overlap.

    Raises:
        ConfigError: the overlap cannot be, or the weights were not trained for it.
    """
    check_rollout("sliding_window", trained)
    overlap_lat = check_overlap(overlap_px, pixel_frames(trained.chunk_lat, trained.ratio), trained.ratio)
    if overlap_lat not in trained.starts_lat and not allow_untrained_overlap:
        raise ConfigError(
            f"rollout.chunk_overlap is {overlap_px}, but these weights were trained to begin a chunk with "
            f"{_listed(_starts_px(trained))} clean frames. Change `rollout.chunk_overlap`, or set "
            "rollout.allow_untrained_overlap=true."
        )


def _starts_px(trained: TrainedFor) -> list[int]:
    return [pixel_frames(lat, trained.ratio) for lat in sorted(trained.starts_lat)]


def _listed(values: list[int]) -> str:
    return " or ".join(map(str, values))
