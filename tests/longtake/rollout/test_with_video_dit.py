"""Objective and rollout with a tiny VideoDiT: the training pass is the rollout, and a rollout can be interrupted."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.networks.conditioning import ActionEmbedding
from longtake.networks.video_dit import VideoDiT
from longtake.objectives.diffusion_forcing import DiffusionForcing
from longtake.objectives.flow_matching import NoiseLevels
from longtake.objectives.slot_objective import SlotObjective
from longtake.objectives.teacher_forcing import TeacherForcing
from longtake.rollout.chunks import Chunk, ChunkStream, MemoryRollout, RolloutState
from longtake.rollout.conditions import clip_conditions, dropped
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import plan_rollout
from longtake.rollout.solvers import UniPC
from longtake.types import Clip, Conditions
from tests.longtake.networks.tiny import CAUSAL_MIXERS, difference, tiny_network
from tests.longtake.stand_in import Forced

KEY = NoiseKey(1, ("first", "second"))
STARTS = {"none": 0.5, "image": 0.25, "clip": 0.25}
CHUNKS = 5


def network(mixer: str, dtype: torch.dtype = torch.float64) -> VideoDiT:
    actions = partial(ActionEmbedding, action_dim=8)
    return tiny_network(CAUSAL_MIXERS[mixer], dtype=dtype, actions=actions).eval()


def clip(num_chunks: int = CHUNKS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Conditions]:
    draw = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 1, 3 * CHUNKS, 4, 4, 4, generator=draw, dtype=torch.float64).to(dtype)
    text = torch.randn(2, 1, 6, 12, generator=draw, dtype=torch.float64).to(dtype)
    actions = torch.randn(2, 1 + 4 * (3 * 80 - 1), 2, generator=draw, dtype=torch.float64).to(dtype)
    told = Clip(text_emb=text, actions=actions, fps=torch.tensor([12.0, 16.0], dtype=dtype), key=["a", "b"])
    return latents, clip_conditions(told, chunk_lat=3, num_chunks=num_chunks, ratio=4)


def restored(state: RolloutState) -> RolloutState:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return RolloutState.from_state_dict(torch.load(file, weights_only=True))


class Recorded:
    """A network whose last slot's velocities are kept."""

    def __init__(self, inner: VideoDiT) -> None:
        self.inner, self.velocities = inner, []
        self.streams, self.grid, self.empty_memory = inner.streams, inner.grid, inner.empty_memory

    def __call__(self, *inputs: object) -> tuple[Tensor, object]:
        velocity, memory = self.inner(*inputs)
        self.velocities.append(velocity[:, -1])
        return velocity, memory


def objective(kind: str) -> SlotObjective:
    if kind == "teacher_forcing":
        return TeacherForcing(chunk_lat=3, noise_levels=NoiseLevels(), first_chunk_clean=STARTS, noise_repeats=2)
    return DiffusionForcing(chunk_lat=3, noise_levels=NoiseLevels(), first_chunk_clean=STARTS)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mixer", ["block_causal", "window2_sink1", "lact", "lact_no_time"])
@torch.no_grad()
def test_the_training_pass_is_the_rollout(mixer: str, dtype: torch.dtype, within: float) -> None:
    """Both branches of guidance, five chunks, the state saved and restored in the middle; at the first evaluation of
    a chunk, which commits the chunk before it, and at a later one, which only reads."""
    net, trainer, sigma = network(mixer, dtype), objective("teacher_forcing"), 0.4
    latents, conditions = clip(dtype=dtype)
    pure = trainer.prepare(net, latents, KEY, sigma=1.0)
    slots = [index for index in pure.layout.targets if pure.layout.slots[index].repeat == 0]
    solver = Forced(latents, [pure.x[:, index] for index in slots], sigma)
    plan = plan_rollout(
        "memory", num_frames_px=57, context_px=0, trained=trainer.trained_for(num_frames_px=57, ratio=4)
    )
    recorded, rollout = Recorded(net), MemoryRollout(num_steps=None, guidance=2.0)
    first = rollout(recorded, latents[:, :, :0], conditions, plan, solver, KEY)  # type: ignore[arg-type]
    for _ in range(2):
        next(first)
    list(rollout(recorded, latents[:, :, :0], conditions, plan, solver, KEY, state=restored(first.state)))  # type: ignore[arg-type]

    everybody = torch.ones(2, dtype=torch.bool)
    for rows, told in ((slice(0, 2), conditions), (slice(2, 4), dropped(conditions, text=everybody))):
        for step, level in enumerate((1.0, sigma)):
            parallel = _velocities(trainer, net, latents, told, level)
            for chunk, index in enumerate(slots):
                streamed = recorded.velocities[2 * chunk + step][rows]
                assert difference(streamed, parallel[:, index]) < within


@torch.no_grad()
def test_a_diffusion_forcing_pass_with_clean_chunks_is_the_rollout() -> None:
    """At noise level 0 on all chunks but the last, the training pass and the rollout are in the same situation."""
    net, trainer = network("window2_sink1"), objective("diffusion_forcing")
    latents, conditions = clip()
    pure = trainer.prepare(net, latents, KEY, sigma=1.0)
    plan = plan_rollout(
        "memory", num_frames_px=57, context_px=0, trained=trainer.trained_for(num_frames_px=57, ratio=4)
    )
    recorded = Recorded(net)
    solver = Forced(latents, [pure.x[:, index] for index in range(CHUNKS)], 0.4)
    rollout = MemoryRollout(num_steps=None, guidance=1.0)
    list(rollout(recorded, latents[:, :, :0], conditions, plan, solver, KEY))  # type: ignore[arg-type]
    x = latents.unflatten(2, (CHUNKS, 3)).movedim(2, 1).clone()
    x[:, -1] = pure.x[:, -1]
    sigma = torch.zeros(2, CHUNKS, 1, 1, dtype=x.dtype)
    sigma[:, -1] = 1.0
    velocity, _ = net(x, sigma, conditions, pure.layout)
    assert difference(recorded.velocities[-2], velocity[:, -1]) < 1e-9


@torch.no_grad()
def test_where_guidance_does_not_act_the_first_branch_alone_is_the_same() -> None:
    """Beginning with two given chunks, so that chunks are also committed by a pass of their own."""
    net = network("lact_sink")
    latents, conditions = clip()
    plain = _latents(_rollout(net, latents, conditions, 5, 21, guidance=1.0))
    never = _latents(_rollout(net, latents, conditions, 5, 21, guidance_interval=[0.0, 1e-6]))
    assert difference(never, plain) < 1e-12
    always = _latents(_rollout(net, latents, conditions, 5, 21))
    early = _latents(_rollout(net, latents, conditions, 5, 21, guidance_interval=[0.7, 1.0]))
    assert min(difference(early, always), difference(early, plain)) > 1e-4


@pytest.mark.parametrize("context_px", [0, 5, 9])
def test_interrupted_longer_or_in_another_batch_it_is_the_same(context_px: int) -> None:
    net = network("lact_sink")
    latents, conditions = clip()
    whole = _latents(_rollout(net, latents, conditions, CHUNKS, context_px))
    stream = _rollout(net, latents, conditions, CHUNKS, context_px)
    first = [next(stream) for _ in range(3)]
    rest = _rollout(net, latents, conditions, CHUNKS, context_px, restored(stream.state))
    assert torch.equal(_latents([*first, *rest]), whole)
    assert torch.equal(_latents(_rollout(net, latents, conditions, 3, context_px)), whole[:, :, :9])
    second = conditions.map(lambda tensor: tensor[1:])
    alone = _latents(_rollout(net, latents[1:], second, CHUNKS, context_px, key=NoiseKey(1, ("second",))))
    assert difference(alone[0], whole[1]) < 1e-9


def test_what_comes_later_does_not_change_what_came() -> None:
    net, trainer = network("lact"), objective("teacher_forcing")
    latents, conditions = clip()
    before = trainer(net, latents, conditions, KEY).per_chunk
    changed = latents.clone()
    changed[:, :, 9:] += 1.0
    after = trainer(net, changed, conditions, KEY).per_chunk
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).all()


@pytest.mark.parametrize("mixer", ["window2_sink1", "lact_no_time"])
def test_a_long_rollout_keeps_its_size_and_stays_finite(mixer: str) -> None:
    net = network(mixer, torch.float32)
    latents, conditions = clip(80, torch.float32)
    stream, sizes = _rollout(net, latents, conditions, 80, 9, num_steps=1), []
    for chunk in stream:
        assert chunk.latents.isfinite().all()
        sizes.append(stream.state.memory.num_bytes)
    assert len(sizes) == 80
    assert set(sizes[5:]) == {sizes[5]}


def test_gradients_reach_every_part() -> None:
    net = network("lact")
    latents, conditions = clip()
    objective("teacher_forcing")(net, latents, conditions, KEY).loss.backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert [name for name in missing if "null" not in name] == []  # nothing was dropped in this batch


def _velocities(trainer: SlotObjective, net: VideoDiT, latents: Tensor, conditions: Conditions, level: float) -> Tensor:
    """Returns the velocities [b s ...] of a training pass with every target at one noise level."""
    kept = []

    class Keeping(Recorded):
        def __call__(self, *inputs: object) -> tuple[Tensor, object]:
            velocity, memory = self.inner(*inputs)
            kept.append(velocity)
            return velocity, memory

    trainer.evaluate(Keeping(net), latents, conditions, KEY, level)  # type: ignore[arg-type]
    return kept[0]


def _rollout(
    net: VideoDiT,
    latents: Tensor,
    conditions: Conditions,
    num_chunks: int,
    context_px: int,
    state: RolloutState | None = None,
    key: NoiseKey = KEY,
    num_steps: int = 3,
    guidance: float = 3.0,
    **settings: Any,
) -> ChunkStream:
    trained = objective("teacher_forcing").trained_for(num_frames_px=57, ratio=4)
    frames = 1 + 4 * (3 * num_chunks - 1)
    plan = plan_rollout("memory", num_frames_px=frames, context_px=context_px, trained=trained)
    rollout = MemoryRollout(num_steps=num_steps, guidance=guidance, **settings)
    return rollout(net, latents[:, :, : plan.start_lat], conditions, plan, UniPC(), key, state=state)


def _latents(chunks: list[Chunk] | ChunkStream) -> Tensor:
    return torch.cat([chunk.latents for chunk in chunks], dim=2)
