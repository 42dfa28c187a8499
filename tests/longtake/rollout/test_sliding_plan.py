"""Windows over a video: the table of the released driver, and what else can be asked for."""

from __future__ import annotations

import pytest

from longtake.errors import ConfigError
from longtake.rollout.plan import TrainedFor
from longtake.rollout.sliding_plan import (
    SlidingPlan,
    Windows,
    check_overlap,
    most_chunks,
    plan_sliding,
    whole_length,
)

C29 = TrainedFor(rollouts=("one_shot", "sliding_window"), chunk_lat=8, starts_lat=(0, 1, 2))


def windows(chunk: int, overlap: int, frames: int) -> Windows:
    return Windows(chunk_px=chunk, overlap_px=overlap, num_frames_px=frames)


def plan(num_frames: int, context: int | tuple[int, ...] = 0, overlap: int = 1, **more: bool) -> SlidingPlan:
    return plan_sliding(num_frames_px=num_frames, context_px=context, overlap_px=overlap, trained=C29, **more)


@pytest.mark.parametrize(
    ("chunk", "overlap", "frames", "count", "last"),
    [
        # chunks of 29: the published table
        (29, 1, 57, 2, 29),
        (29, 5, 57, 3, 9),
        (29, 1, 85, 3, 29),
        (29, 5, 85, 4, 13),
        (29, 1, 101, 4, 17),
        (29, 5, 101, 4, 29),
        (29, 1, 557, 20, 25),
        (29, 5, 557, 23, 29),
        (29, 1, 561, 20, 29),
        (29, 5, 561, 24, 9),
        (29, 0, 29, 1, 29),
        (29, 0, 58, 2, 29),
        (29, 0, 59, 3, 1),
        (29, 1, 7, 1, 7),
        (29, 5, 3, 1, 3),
        # chunks of 9
        (9, 0, 81, 9, 9),
        (9, 0, 82, 10, 1),
        (9, 1, 81, 10, 9),
        (9, 1, 18, 3, 2),
        (9, 5, 81, 19, 9),
        (9, 5, 83, 20, 7),
        # chunks of 93
        (93, 0, 561, 7, 3),
        (93, 1, 277, 3, 93),
        (93, 1, 561, 7, 9),
        (93, 5, 181, 2, 93),
        (93, 5, 561, 7, 33),
        (93, 5, 92, 1, 92),
    ],
)
def test_the_table(chunk: int, overlap: int, frames: int, count: int, last: int) -> None:
    made = windows(chunk, overlap, frames)
    assert made.num_chunks == count
    assert [made.window_of(i) for i in range(count)] == [
        (i * (chunk - overlap), i * (chunk - overlap) + chunk) for i in range(count)
    ]
    start, stop = made.covered_by(count - 1)
    assert (stop - start, stop) == (last, frames)
    assert made.is_exact == (last == chunk)


@pytest.mark.parametrize("chunk", [9, 29, 93])
@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_every_length_is_covered_once_and_no_window_is_for_nothing(chunk: int, overlap: int) -> None:
    for frames in range(1, 400):
        made = windows(chunk, overlap, frames)
        count, end = 1, chunk  # by walking: another window for as long as frames are missing
        while end < frames:
            count, end = count + 1, end + chunk - overlap
        assert made.num_chunks == count
        assert made.made_px == whole_length(count, chunk, overlap) == end
        covered = [frame for i in range(count) for frame in range(*made.frames_of(i))]
        assert covered == list(range(frames))
        assert all(made.frames_of(i)[0] < made.frames_of(i)[1] for i in range(count))
        assert made.is_exact == ((frames - chunk) % (chunk - overlap) == 0 and frames >= chunk)


@pytest.mark.parametrize("chunk", [9, 29, 93])
@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_a_longer_video_has_the_windows_of_a_shorter_one(chunk: int, overlap: int) -> None:
    short, long = windows(chunk, overlap, 3 * chunk), windows(chunk, overlap, 7 * chunk)
    for i in range(short.num_chunks - 1):
        assert (short.window_of(i), short.frames_of(i)) == (long.window_of(i), long.frames_of(i))


@pytest.mark.parametrize(
    ("available", "overlap", "count"), [(561, 1, 20), (561, 5, 23), (85, 1, 3), (84, 1, 2), (29, 1, 1), (3, 1, 1)]
)
def test_whole_chunks_that_a_control_video_has_room_for(available: int, overlap: int, count: int) -> None:
    assert most_chunks(available, 29, overlap) == count
    assert whole_length(count, 29, overlap) <= max(29, available) < whole_length(count + 1, 29, overlap)


@pytest.mark.parametrize(("overlap", "latents"), [(0, 0), (1, 1), (5, 2), (9, 3), (25, 7)])
def test_overlaps_in_latents(overlap: int, latents: int) -> None:
    assert check_overlap(overlap, 29, 4) == latents


@pytest.mark.parametrize(
    ("overlap", "chunk", "nearest"),
    [
        (3, 29, "1 or 5"),
        (4, 29, "1 or 5"),
        (2, 29, "0 or 1"),
        (6, 29, "5 or 9"),
        (29, 29, "21 or 25"),
        (100, 29, "21 or 25"),
        (-1, 29, "0 or 1"),
        (9, 9, "1 or 5"),
        (91, 93, "85 or 89"),
    ],
)
def test_other_overlaps_are_refused_with_the_two_nearest(overlap: int, chunk: int, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout.chunk_overlap is {overlap}; .* for example {nearest}\. Change"):
        check_overlap(overlap, chunk, 4)


def test_what_the_weights_never_began_a_chunk_with_is_refused_unless_allowed() -> None:
    with pytest.raises(ConfigError, match=r"rollout.chunk_overlap is 9.*trained.*0 or 1 or 5.*allow_untrained_overlap"):
        plan(100, overlap=9)
    assert plan(100, overlap=9, allow_untrained_overlap=True).windows.stride_px == 20
    tokens = TrainedFor(rollouts=("tokens",), chunk_lat=1, starts_lat=(0, 1))
    with pytest.raises(ConfigError, match="rollout=sliding_window was chosen.*trained for rollout=tokens"):
        plan_sliding(num_frames_px=9, context_px=0, overlap_px=0, trained=tokens)


def test_given_latents_of_each_view() -> None:
    same = plan(57, context=5)
    assert same.given_lat(0, 3) == (2, 2, 2)
    assert same.given_lat(1, 3) == (1, 1, 1)
    each = plan(57, context=(0, 1, 5))
    assert each.given_lat(0, 3) == (0, 1, 2)
    assert (each.start_px, each.start_needed_px) == (0, 5)


def test_a_long_start_gives_its_last_frames() -> None:
    made = plan(57, context=9)
    assert (made.given_px, made.skipped_px) == ((5,), 4)
    (line,) = made.notices()
    assert "has 9 frames; the last 5 are used" in line
    (line,) = plan(56).notices()
    assert "num_frames=56 is rounded up to 57" in line
    assert plan(57).notices() == []


@pytest.mark.parametrize(
    ("frames", "context", "message"),
    [
        (0, 0, "num_frames is 0"),
        (57, 3, "num_context_frames is 3; .*0 or 1 or 5 frames.*`num_context_frames`"),
        (57, (5, 3), "num_context_frames is 3"),
        (57, (5, 9), "num_context_frames is 9"),
        (5, 5, "nothing is left to predict; expected more than 5"),
    ],
)
def test_what_cannot_be(frames: int, context: int | tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(frames, context)
