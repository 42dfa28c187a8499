"""The memory rollout and the one-shot rollout, on a network of a few lines."""

from __future__ import annotations

import dataclasses
import gc
import io
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.rollout.chunks import Chunk, ChunkStream, MemoryRollout, RolloutState
from longtake.rollout.conditions import clip_conditions, of_chunks
from longtake.rollout.noise import Draws, NoiseKey, normal
from longtake.rollout.one_shot import OneShotRollout
from longtake.rollout.plan import RolloutPlan, TrainedFor, plan_rollout
from longtake.rollout.solvers import Euler, UniPC
from longtake.types import Clip, Conditions
from tests.longtake.stand_in import Forced, StandIn

TRAINED = TrainedFor(rollouts=("memory",), chunk_lat=3, starts_lat=(0, 1, 2))
KEY = NoiseKey(5, ("a", "b"))


def plan(num_chunks: int, context_px: int = 0) -> RolloutPlan:
    frames = 1 + 4 * (3 * num_chunks - 1)
    return plan_rollout("memory", num_frames_px=frames, context_px=context_px, trained=TRAINED)


def start(num_lat: int, b: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 12, 4, 4, 6, generator=generator, dtype=torch.float64)[:b, :, :num_lat]


def conditions(num_chunks: int) -> Conditions:
    generator = torch.Generator().manual_seed(2)
    actions = torch.randn(2, 1 + 4 * 59, 3, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[[1, 2, 3]], [[4, 5, 6]]])
    clip = Clip(actions=actions, text_ids=ids, key=["a", "b"])
    return clip_conditions(clip, chunk_lat=3, num_chunks=num_chunks, ratio=4)


def stream(
    network: StandIn,
    num_chunks: int,
    context_px: int = 0,
    rollout: MemoryRollout | None = None,
    state: RolloutState | None = None,
    key: NoiseKey = KEY,
) -> ChunkStream:
    made = plan(num_chunks, context_px)
    rollout = rollout or MemoryRollout(num_steps=4, guidance=3.0)
    return rollout(network, start(made.start_lat), conditions(num_chunks), made, UniPC(), key, state=state)  # type: ignore[arg-type]


def latents(chunks: Sequence[Chunk] | ChunkStream) -> Tensor:
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def test_a_chunk_costs_one_wide_evaluation_and_then_narrow_ones() -> None:
    network = StandIn()
    list(stream(network, 4))
    assert [slots for slots, _ in network.calls] == [1, 1, 1, 1] + [2, 1, 1, 1] * 3
    assert {batch for _, batch in network.calls} == {4}  # both branches of guidance in one batch
    roles = [[(slot.role, slot.chunk, slot.seen) for slot in layout.slots] for layout in network.layouts]
    assert roles[4] == [("context", 0, True), ("target", 1, False)]
    assert roles[5] == [("target", 1, False)]
    assert [layout.slots[-1].start_lat for layout in network.layouts[::4]] == [0, 3, 6, 9]


def test_without_guidance_there_is_one_branch() -> None:
    network = StandIn()
    list(stream(network, 2, rollout=MemoryRollout(num_steps=2, guidance=1.0)))
    assert {batch for _, batch in network.calls} == {2}


def test_guidance_is_u_plus_g_times_c_minus_u() -> None:
    def first_velocity(guidance: float) -> Tensor:
        run = stream(StandIn(), 1, rollout=MemoryRollout(num_steps=1, guidance=guidance))
        return next(run).latents

    one, two, four = (first_velocity(g) for g in (1.0, 2.0, 4.0))
    # one solver step is linear in the velocity, so the results lie on a line: c at 1, u at 0
    assert torch.allclose(four - one, 3 * (two - one), atol=1e-12)
    assert (two - one).abs().max() > 1e-3


def test_outside_of_its_interval_guidance_costs_nothing() -> None:
    """The evaluation that commits a chunk needs all branches all the same: memory has to know of both."""
    network = StandIn()
    rollout = MemoryRollout(num_steps=4, guidance=3.0, guidance_interval=[0.5, 0.9])
    list(stream(network, 2, rollout=rollout))
    acts = [0.5 <= told <= 0.9 for told in UniPC().begin(4).schedule.told]
    assert 0 < sum(acts) < 3
    assert not acts[0]
    later = [4 if act else 2 for act in acts[1:]]
    assert [batch for _, batch in network.calls] == [2, *later, 4, *later]


@pytest.mark.parametrize("interval", [[0.5], [0.9, 0.5], [-0.1, 0.5], [0.5, 1.1]])
def test_an_interval_that_is_none_is_refused(interval: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"guidance_interval is \[.*two rising noise levels"):
        MemoryRollout(guidance_interval=interval)


def test_a_negative_text_replaces_the_missing_one() -> None:
    made = plan(1)
    rollout = MemoryRollout(num_steps=2, guidance=3.0)

    def result(negative: Conditions | None) -> Tensor:
        return latents(rollout(StandIn(), start(0), conditions(1), made, UniPC(), KEY, negative=negative))

    same_text = result(Conditions(text_ids=conditions(1).text_ids))
    plain = latents(stream(StandIn(), 1, rollout=MemoryRollout(num_steps=2, guidance=1.0)))
    assert torch.allclose(same_text, plain, atol=1e-12)  # u equals c, so the scale is without effect
    assert not torch.allclose(result(None), plain)


def test_guidance_without_anything_to_leave_out_is_refused() -> None:
    bare = dataclasses.replace(conditions(1), text_ids=None)
    with pytest.raises(ConfigError, match=r"rollout.guidance is 3.0.*no text.*`rollout.unconditional`"):
        next(MemoryRollout(guidance=3.0)(StandIn(), start(0), bare, plan(1), UniPC(), KEY))
    both = MemoryRollout(num_steps=2, guidance=3.0, unconditional=["text", "actions"])
    next(both(StandIn(), start(0), bare, plan(1), UniPC(), KEY))
    with pytest.raises(ConfigError, match="unknown condition 'txt'"):
        MemoryRollout(unconditional=["txt"])


@pytest.mark.parametrize("context_px", [0, 1, 5, 9, 21, 33])
def test_the_start_comes_back_unchanged_and_the_rest_is_new(context_px: int) -> None:
    made = plan(5, context_px)
    chunks = list(stream(StandIn(), 5, context_px))
    assert [chunk.index for chunk in chunks] == list(range(5))
    assert sum(chunk.given_lat for chunk in chunks) == made.start_lat
    assert torch.equal(latents(chunks)[:, :, : made.start_lat], start(made.start_lat))


def test_given_latents_of_the_first_chunk_are_clean_for_the_network() -> None:
    network = StandIn()
    next(stream(network, 2, 5))
    for x, sigma in zip(network.xs, network.sigmas, strict=True):
        assert sigma.shape == (4, 1, 1, 3)
        assert sigma[:, 0, 0, :2].eq(0).all()
        assert sigma[:, 0, 0, 2].gt(0).all()
        assert torch.equal(x[:2, 0, :, :2], start(2))


def test_a_long_start_is_committed_chunk_by_chunk() -> None:
    network = StandIn()
    run = stream(network, 5, 33)  # 9 latents, three chunks
    assert next(run).given_lat == 3
    assert network.calls == []
    next(run), next(run)
    assert [[slot.chunk for slot in layout.slots] for layout in network.layouts] == [[0], [1]]
    next(run)
    assert [slot.chunk for slot in network.layouts[2].slots] == [2, 3]


def test_committing_a_start_by_itself_is_committing_it_on_the_way() -> None:
    truth = start(9)
    rollout = MemoryRollout(num_steps=4, guidance=3.0)
    forced = Forced(truth, [torch.zeros(())] * 3, 0.5)
    on_the_way = rollout(StandIn(), truth[:, :, :0], conditions(3), plan(3), forced, KEY)
    list(on_the_way)
    fused = rollout(StandIn(), start(0), conditions(4), plan(4), UniPC(), KEY, state=on_the_way.state)
    last = rollout(StandIn(), truth, conditions(4), plan(4, 33), UniPC(), KEY)
    assert torch.allclose(next(fused).latents, list(last)[-1].latents, rtol=0, atol=1e-12)


def test_what_came_before_matters_and_what_comes_after_does_not() -> None:
    short, long = latents(stream(StandIn(), 3)), latents(stream(StandIn(), 6))
    assert torch.equal(short, long[:, :, :9])
    context = start(3)
    context[:, :, 0] += 1.0
    rollout = MemoryRollout(num_steps=4, guidance=3.0)
    changed = latents(rollout(StandIn(), context, conditions(3), plan(3, 9), UniPC(), KEY))
    assert (changed - latents(stream(StandIn(), 3, 9)))[:, :, 3:].abs().max() > 1e-4


def test_a_batch_equals_its_samples_one_by_one() -> None:
    batch = latents(stream(StandIn(), 3, 5))
    whole = conditions(3)
    for index, name in enumerate(("a", "b")):
        own = whole.map(lambda tensor, i=index: tensor[i : i + 1])
        rollout = MemoryRollout(num_steps=4, guidance=3.0)
        alone = latents(rollout(StandIn(), start(2)[index : index + 1], own, plan(3, 5), UniPC(), NoiseKey(5, (name,))))
        assert torch.allclose(alone[0], batch[index], rtol=0, atol=1e-12)


def test_noise_is_that_of_the_key() -> None:
    network = StandIn()
    list(stream(network, 2, rollout=MemoryRollout(num_steps=2, guidance=1.0)))
    noise = normal(KEY, "noise", Draws([0, 1], [0, 0], 1, 3), (4, 4, 6)).double()
    assert torch.equal(network.xs[0][:, 0], noise[:, 0])
    assert torch.equal(network.xs[2][:, 1], noise[:, 1])


@pytest.mark.parametrize("done", [0, 1, 3, 4])
@pytest.mark.parametrize("context_px", [0, 5, 21])
def test_saved_and_restored_it_continues_bit_by_bit(done: int, context_px: int) -> None:
    whole = latents(stream(StandIn(), 6, context_px))
    run = stream(StandIn(), 6, context_px)
    first = [next(run) for _ in range(done)]
    file = io.BytesIO()
    torch.save(run.state.state_dict(), file)
    file.seek(0)
    state = RolloutState.from_state_dict(torch.load(file, weights_only=True))
    rest = list(stream(StandIn(), 6, context_px, state=state))
    assert torch.equal(latents([*first, *rest]), whole)


def test_a_state_of_another_guidance_is_refused() -> None:
    run = stream(StandIn(), 3)
    next(run)
    with pytest.raises(ConfigError, match="2 branches.*`rollout.guidance`"):
        stream(StandIn(), 3, rollout=MemoryRollout(guidance=1.0), state=run.state)


def test_conditions_may_come_chunk_by_chunk() -> None:
    whole = conditions(4)
    asked = []

    def arriving(chunk: int) -> Conditions:
        asked.append(chunk)
        return of_chunks(whole, [chunk])

    rollout = MemoryRollout(num_steps=4, guidance=3.0)
    live = latents(rollout(StandIn(), start(0), arriving, plan(4), UniPC(), KEY))
    assert torch.equal(live, latents(stream(StandIn(), 4)))
    assert asked == [0, 1, 2, 3]


def test_nothing_of_the_video_is_kept() -> None:
    run = stream(StandIn(), 6, rollout=MemoryRollout(num_steps=1, guidance=1.0))
    run._network.calls = run._network.xs = run._network.sigmas = run._network.layouts = _Forgetful()  # type: ignore[attr-defined]
    alive = [weakref.ref(chunk.latents) for chunk in run]
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6


def test_context_noise_is_what_the_network_is_told() -> None:
    network = StandIn()
    rollout = MemoryRollout(num_steps=2, guidance=1.0, context_noise=0.1)
    chunks = list(stream(network, 2, rollout=rollout))
    noise = normal(KEY, "context", Draws([0], [0], 1, 3), (4, 4, 6))[:, 0].double()
    assert torch.equal(network.xs[2][:, 0], 0.9 * chunks[0].latents + 0.1 * noise)
    assert network.sigmas[2][:, 0].eq(0.1).all()
    with pytest.raises(ConfigError, match="`rollout.context_noise`"):
        MemoryRollout(context_noise=1.0)


def test_diffusion_forcing_commits_in_the_role_of_training() -> None:
    trained = dataclasses.replace(TRAINED, context_sees="past", commit_role="target")
    made = dataclasses.replace(plan(3), trained=trained)
    network = StandIn()
    list(MemoryRollout(num_steps=2)(network, start(0), conditions(3), made, Euler(), KEY))
    assert [(slot.role, slot.seen) for slot in network.layouts[2].slots] == [("target", True), ("target", False)]
    assert network.layouts[2].context_sees == "past"


def test_a_network_that_sees_the_whole_clip_is_refused() -> None:
    network = StandIn()
    network.streams = False
    with pytest.raises(ConfigError, match="rollout=memory needs .* causal mixer.*`rollout`.*`network.mixer`"):
        stream(network, 2)


def test_the_wrong_number_of_steps_is_found_before_anything_is_computed() -> None:
    network = StandIn()
    with pytest.raises(ConfigError, match="`rollout.num_steps`"):
        MemoryRollout(num_steps=0)(network, start(0), conditions(1), plan(1), UniPC(), KEY)
    assert network.calls == []


@pytest.mark.parametrize("context_px", [0, 1])
def test_one_shot_is_one_slot_without_memory(context_px: int) -> None:
    trained = TrainedFor(rollouts=("one_shot",), chunk_lat=6, starts_lat=(0, 1))
    made = plan_rollout("one_shot", num_frames_px=21, context_px=context_px, trained=trained)
    clip = Clip(text_ids=torch.tensor([[[1, 2, 3]], [[4, 5, 6]]]), key=["a", "b"])
    own = clip_conditions(clip, chunk_lat=6, num_chunks=1, ratio=4)
    network = StandIn()
    context = start(made.start_lat)
    (chunk,) = OneShotRollout(num_steps=3, guidance=2.0)(network, context, own, made, UniPC(), KEY)
    assert network.calls == [(1, 4)] * 3
    assert chunk.latents.shape == (2, 1, 6, 4, 4, 6)
    assert torch.equal(chunk.latents[:, :, : made.start_lat], context)
    assert chunk.given_lat == made.start_lat
    for x, sigma, told in zip(network.xs, network.sigmas, UniPC().begin(3).schedule.told, strict=True):
        assert torch.equal(x[:2, 0, :, : made.start_lat], context)  # what is given is clean, and told to be
        levels = sigma[:, 0].expand(4, 1, 6)
        assert (levels[:, :, : made.start_lat] == 0).all()
        assert (levels[:, :, made.start_lat :] == told).all()


class _Forgetful(list):
    def append(self, item: object) -> None:
        """Keeps nothing."""
