"""From pixel frames and a start to chunks."""

from __future__ import annotations

import pytest

from longtake.errors import ConfigError
from longtake.rollout.plan import RolloutPlan, TrainedFor, plan_rollout

MEMORY = TrainedFor(rollouts=("memory",), chunk_lat=3, starts_lat=(0, 1, 2))
CLIP = TrainedFor(rollouts=("one_shot",), chunk_lat=21, starts_lat=(0, 1))


def plan(num_frames: int, context: int = 0, trained: TrainedFor = MEMORY) -> RolloutPlan:
    return plan_rollout("memory", num_frames_px=num_frames, context_px=context, trained=trained)


@pytest.mark.parametrize(
    ("num_frames", "context", "chunks", "given_chunks", "lead", "skipped"),
    [
        (81, 0, 7, 0, 0, 0),  # from nothing
        (81, 1, 7, 0, 1, 0),  # from an image
        (81, 5, 7, 0, 2, 0),  # a clip inside the first chunk
        (81, 9, 7, 1, 0, 0),  # exactly one chunk
        (81, 13, 7, 1, 0, 4),  # the last whole chunk of a longer one
        (81, 37, 7, 3, 0, 4),
        (80, 9, 7, 1, 0, 0),  # off the lattice: the next length up
        (82, 9, 8, 1, 0, 0),
        (10, 9, 2, 1, 0, 0),
        (1, 0, 1, 0, 0, 0),
    ],
)
def test_chunks(num_frames: int, context: int, chunks: int, given_chunks: int, lead: int, skipped: int) -> None:
    made = plan(num_frames, context)
    assert (made.num_chunks, made.given_chunks, made.lead_lat) == (chunks, given_chunks, lead)
    assert made.skipped_px == skipped
    assert made.start_px == context - skipped


@pytest.mark.parametrize("num_frames", [1, 2, 9, 10, 57, 80, 81, 82, 405])
def test_frames_of_the_chunks_are_the_result(num_frames: int) -> None:
    made = plan(num_frames)
    frames = [frame for chunk in range(made.num_chunks) for frame in range(*made.frames_of(chunk))]
    assert frames == list(range(num_frames))
    assert len(range(*made.frames_of(made.num_chunks - 1))) > 0  # no chunk is computed for nothing


def test_rounding_and_left_out_frames_are_said() -> None:
    assert plan(81, 9).notices() == []
    (rounded,) = plan(80, 9).notices()
    assert "num_frames=80 is rounded up to 81" in rounded
    (skipped,) = plan(81, 13).notices()
    assert "has 13 frames; the last 9 are used" in skipped
    assert "the first 4 are left out" in skipped


def test_one_shot_is_one_chunk_of_the_trained_length() -> None:
    made = plan_rollout("one_shot", num_frames_px=60, context_px=1, trained=CLIP)
    assert (made.num_chunks, made.lead_lat, made.frames_of(0)) == (1, 1, (0, 60))
    with pytest.raises(ConfigError, match="one clip of 81 frames"):
        plan_rollout("one_shot", num_frames_px=82, context_px=1, trained=CLIP)


@pytest.mark.parametrize(
    ("num_frames", "context", "message"),
    [
        (-5, 0, "num_frames is -5.*`num_frames`"),
        (0, 0, "num_frames is 0"),
        (81, -1, "num_context_frames is -1"),
        (81, 8, "num_context_frames is 8; .*5 or 9.*`num_context_frames`"),
        (9, 9, "nothing is left to predict; expected more than 9"),
    ],
)
def test_lengths_that_cannot_be(num_frames: int, context: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(num_frames, context)


def test_what_the_weights_were_not_trained_for_is_refused_naming_both() -> None:
    with pytest.raises(ConfigError, match="rollout=one_shot was chosen.*trained for rollout=memory.*`rollout`"):
        plan_rollout("one_shot", num_frames_px=81, context_px=0, trained=MEMORY)
    with pytest.raises(ConfigError, match="rollout=memory was chosen.*trained for rollout=one_shot"):
        plan(81, 0, CLIP)
    from_images = TrainedFor(rollouts=("memory",), chunk_lat=3, starts_lat=(1,))
    with pytest.raises(ConfigError, match=r"a start of 0 frames was chosen.*start from 1 or 9 frames"):
        plan(81, 0, from_images)
    with pytest.raises(ConfigError, match=r"a start of 5 frames was chosen.*0 or 1 frames"):
        plan_rollout("one_shot", num_frames_px=81, context_px=5, trained=CLIP)


def test_a_start_of_tokens_says_what_to_train() -> None:
    trained = TrainedFor(rollouts=("tokens",), chunk_lat=1, starts_lat=(2,), ratio=8)
    for context, how in ((1, r"objective\.context_lat=1\)"), (0, r"context_lat=0 and network\.bov=true")):
        with pytest.raises(ConfigError, match=rf"to start from 9 frames .*{how}"):
            plan_rollout("tokens", num_frames_px=17, context_px=context, trained=trained)


def test_what_weights_were_trained_for_survives_a_header() -> None:
    import json

    assert TrainedFor.from_dict(json.loads(json.dumps(MEMORY.to_dict()))) == MEMORY
