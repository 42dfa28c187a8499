"""Windows of a token rollout: which actions they are told, what they start from, and which frames come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan, TrainedFor, plan_rollout
from longtake.rollout.tokens import LatentFrame
from longtake.streaming import VideoChunk
from longtake.token_stream import token_chunks, token_conditions
from longtake.types import Clip, Conditions
from tests.block_tokens import BlockTokens

RATIO, NUM_LAT = 8, 3


def plan(num_frames: int, context_px: int = 9) -> RolloutPlan:
    trained = TrainedFor(rollouts=("tokens",), chunk_lat=1, starts_lat=(1, 2), ratio=RATIO)
    return plan_rollout("tokens", num_frames_px=num_frames, context_px=context_px, trained=trained)


def clip(num_frames: int) -> Clip:
    """Returns a clip whose action of frame t is (t, -t)."""
    rows = torch.arange(num_frames, dtype=torch.float32)
    return Clip(actions=torch.stack([rows, -rows], 1)[None], key=["a"])


def told(conditions: Conditions) -> list[list[float]]:
    """Returns the first action column of each latent."""
    assert conditions.actions is not None
    return [row.view(RATIO, 2)[:, 0].tolist() for row in conditions.actions[0, :, 0]]


def test_a_window_is_told_the_actions_of_its_pixel_frames() -> None:
    first = told(token_conditions(clip(41), num_lat=3, ratio=RATIO))
    assert first == [[0] * 8, list(range(1, 9)), list(range(9, 17))]
    second = told(token_conditions(clip(41), num_lat=3, ratio=RATIO, first_px=8))
    assert second == [[0] * 8, list(range(9, 17)), list(range(17, 25))]  # what led to its first frame is not told


def test_actions_after_the_end_repeat_the_last_one_and_missing_ones_are_refused() -> None:
    rows = told(token_conditions(clip(20), num_lat=3, ratio=RATIO, first_px=8, num_frames_px=20))
    assert rows[2] == [17, 18, 19, 19, 19, 19, 19, 19]
    with pytest.raises(ConfigError, match="actions are given for 20 frames, but 21 frames are wanted"):
        token_conditions(clip(20), num_lat=3, ratio=RATIO, first_px=8, num_frames_px=21)


def test_no_actions_are_no_conditions_and_an_encoder_reads_whole_windows() -> None:
    assert token_conditions(Clip(key=["a"]), num_lat=3, ratio=RATIO).actions is None
    seen = []

    def encoder(table: Tensor) -> Tensor:
        seen.append(table)
        return torch.zeros(1, 3, 5, dtype=torch.int64)

    found = token_conditions(clip(41), num_lat=3, ratio=RATIO, actions=encoder, first_px=8)
    assert found.actions is not None
    assert found.actions.shape == (1, 3, 1, 5)
    assert seen[0][0, :, 0].tolist() == [0, *range(9, 25)]


class Network:
    grid_lat = (NUM_LAT, 2, 2)


class CopyLast:
    """Every new latent is the one before it plus one; a new window starts from what `restart` returns."""

    def __init__(self) -> None:
        self.windows: list[Conditions] = []
        self.starts: list[Tensor] = []

    def __call__(self, network: Any, context: Tensor, conditions: Any, num_lat: int, key: NoiseKey, **more: Any) -> Any:
        for index in range(context.shape[2]):
            yield LatentFrame(index, 0, context[:, :, index], given=True)
        index, number, start = context.shape[2], 0, None
        while index < num_lat:
            self.windows.append(conditions(number))
            for _ in range(context.shape[2], NUM_LAT):
                if index < num_lat:
                    tokens = (context[:, :, -1] + 1) % 64
                    context = torch.cat([context, tokens[:, :, None]], dim=2)
                    yield LatentFrame(index, number, tokens, False, start)
                    index, start = index + 1, None
            context = start = more["restart"](context)
            self.starts.append(context)
            number += 1


def run(num_frames: int, context_lat: int = 2) -> tuple[CopyLast, list[VideoChunk]]:
    rollout, codec = CopyLast(), BlockTokens()
    context = torch.full((1, 1, context_lat, 2, 2), 5)
    made = token_chunks(
        rollout,  # type: ignore[arg-type]
        Network(),  # type: ignore[arg-type]
        codec,
        context,
        lambda *, num_lat, first_px: token_conditions(
            clip(num_frames), num_lat=num_lat, ratio=RATIO, first_px=first_px, num_frames_px=num_frames
        ),
        plan(num_frames, 1 + (context_lat - 1) * RATIO),
        NoiseKey(0, ("a",)),
        restart_lat=2,
    )
    return rollout, list(made)


@pytest.mark.parametrize("num_frames", [17, 18, 25, 40, 81])
def test_windows_follow_each_other_without_a_gap(num_frames: int) -> None:
    rollout, chunks = run(num_frames)
    assert [chunk.start for chunk in chunks] == [0, *range(1, num_frames, 8)]
    assert sum(chunk.frames.shape[2] for chunk in chunks) == num_frames
    assert [chunk.num_given for chunk in chunks[:3]] == [1, 8, 0]
    for number, conditions in enumerate(rollout.windows):
        rows = told(conditions)
        first = 8 * number
        assert rows[1][0] == min(first + 1, num_frames - 1)
    colours = [int(chunk.frames[0, 0, -1, 0, 0, 0]) for chunk in chunks]
    expected = BlockTokens().decode(torch.arange(5, 5 + len(chunks)).clamp(max=63).view(1, 1, -1, 1, 1))
    red = ((expected[0, 0, ::8, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert colours[1:] == red[: len(colours) - 1]


def test_a_window_starts_from_the_last_decoded_frames() -> None:
    rollout, _ = run(33)
    assert all(start.shape == (1, 1, 2, 2, 2) for start in rollout.starts)
    assert rollout.starts[0].flatten().tolist() == [5] * 4 + [6] * 4  # frame 8, frames 9 to 16


def test_the_first_window_may_start_from_less() -> None:
    _, chunks = run(25, context_lat=1)
    assert [chunk.num_given for chunk in chunks] == [1, 0, 0, 0]
    assert np.concatenate([chunk.frames for chunk in chunks], axis=2).shape[2] == 25
