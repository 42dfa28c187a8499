"""Rollouts block after block: each a causal start of its own that sees the one before it, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.rollout.chunks import Chunk, ChunkStream, MemoryRollout, RolloutState
from longtake.rollout.conditions import clip_conditions
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan, TrainedFor, plan_rollout
from longtake.rollout.solvers import Euler
from longtake.streaming import decoded
from longtake.types import Clip
from tests.block_code import BlockCode
from tests.longtake.stand_in import StandIn

BLOCKS = TrainedFor(rollouts=("memory",), chunk_lat=3, starts_lat=(1,), own_starts=True, one_context=True)
KEY = NoiseKey(5, ("a", "b"))


def plan(num_frames: int, context: int) -> RolloutPlan:
    return plan_rollout("memory", num_frames_px=num_frames, context_px=context, trained=BLOCKS)


def stream(network: StandIn, made: RolloutPlan, start: Tensor, state: RolloutState | None = None) -> ChunkStream:
    actions = torch.randn(2, 9 * made.num_chunks, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    told = clip_conditions(Clip(actions=actions), chunk_lat=3, num_chunks=made.num_chunks, ratio=4, own_starts=True)
    return MemoryRollout(num_steps=2, guidance=1.0)(network, start, told, made, Euler(), KEY, state=state)


def start(num_lat: int, seed: int = 1) -> Tensor:
    return torch.randn(2, 1, num_lat, 4, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("num_frames", "context", "generations", "used"),
    [(81, 1, 9, 1), (81, 9, 8, 9), (243, 1, 27, 1), (243, 9, 26, 9), (82, 9, 9, 9), (40, 19, 3, 18), (10, 9, 1, 9)],
)
def test_generations(num_frames: int, context: int, generations: int, used: int) -> None:
    made = plan(num_frames, context)
    assert made.num_chunks - made.given_chunks == generations
    assert (made.start_px, made.skipped_px) == (used, context - used)
    frames = [frame for chunk in range(made.num_chunks) for frame in range(*made.frames_of(chunk))]
    assert frames == list(range(num_frames))
    assert made.frames_of(1) == (9, min(18, num_frames))


def test_what_they_are_trained_for_travels_with_the_weights() -> None:
    assert TrainedFor.from_dict(BLOCKS.to_dict()) == BLOCKS
    old = {key: value for key, value in BLOCKS.to_dict().items() if key not in ("own_starts", "one_context")}
    assert TrainedFor.from_dict(old).block_lat is None  # files from before there were blocks


def test_every_block_sees_one_context_and_memory_does_not_grow() -> None:
    network = StandIn()
    run = stream(network, plan(81, 9), start(3))
    sizes = [run.state.memory.committed for _ in run]
    assert sizes == [0, *[1] * 8]
    assert {tuple((slot.role, slot.chunk) for slot in layout.slots) for layout in network.layouts} == {
        (("context", 0), ("target", 1)),
        (("target", 1),),
    }
    assert [slots for slots, _ in network.calls] == [2, 1] * 8


def test_only_the_last_given_block_matters() -> None:
    made = plan(45, 27)
    ours, other = start(9), start(9, seed=7)
    other[:, :, 6:] = ours[:, :, 6:]
    first, second = (list(stream(StandIn(), made, given)) for given in (ours, other))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first[3:], second[3:], strict=True))


def test_a_saved_rollout_goes_on_as_if_nothing_had_been() -> None:
    made = plan(81, 1)
    whole = list(stream(StandIn(), made, start(1)))
    run = stream(StandIn(), made, start(1))
    for _ in range(4):
        next(run)
    state = RolloutState.from_state_dict(run.state.state_dict())
    rest = list(stream(StandIn(), made, start(1), state))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(whole[4:], rest, strict=True))


def test_blocks_are_decoded_by_themselves() -> None:
    codec, made = BlockCode(), plan(27, 9)
    latents = torch.rand(1, 1, 9, 4, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    chunks = iter(Chunk(index, latents[:, :, 3 * index : 3 * index + 3], 0) for index in range(3))
    parts = [chunk.frames for chunk in decoded(chunks, codec, made)]
    assert [part.shape[2] for part in parts] == [9, 9, 9]
    video = ((codec.decode(latents[:, :, 3:6]) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(torch.from_numpy(parts[1]), video.permute(0, 1, 2, 4, 5, 3))
