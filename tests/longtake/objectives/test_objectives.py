"""Objectives: keyed draws, the right loss, and a training pass that is the rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.layout import Grid
from longtake.objectives.bidirectional import Bidirectional
from longtake.objectives.diffusion_forcing import DiffusionForcing
from longtake.objectives.flow_matching import NoiseLevels
from longtake.objectives.slot_objective import SlotObjective
from longtake.objectives.teacher_forcing import TeacherForcing
from longtake.rollout.chunks import MemoryRollout
from longtake.rollout.conditions import clip_conditions, of_chunks
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import plan_rollout
from longtake.types import Clip, Conditions
from tests.longtake.stand_in import Forced, StandIn

KEY = NoiseKey(3, (10, 11, 12))
ALWAYS_NOTHING = {"none": 1.0}
MIXED = {"none": 0.4, "image": 0.3, "clip": 0.3}


def clean(num_lat: int = 12) -> Tensor:
    return torch.randn(3, 1, 12, 4, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[
        :, :, :num_lat
    ]


def conditions(num_chunks: int = 4, chunk_lat: int = 3) -> Conditions:
    actions = torch.randn(3, 45, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clip = Clip(actions=actions, text_ids=torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]]]), key=["a", "b", "c"])
    return clip_conditions(clip, chunk_lat=chunk_lat, num_chunks=num_chunks, ratio=4)


def teacher_forcing(**settings: Any) -> TeacherForcing:
    settings = {"chunk_lat": 3, "noise_levels": NoiseLevels(), "first_chunk_clean": ALWAYS_NOTHING} | settings
    return TeacherForcing(**settings)


def diffusion_forcing(**settings: Any) -> DiffusionForcing:
    settings = {"chunk_lat": 3, "noise_levels": NoiseLevels(), "first_chunk_clean": ALWAYS_NOTHING} | settings
    return DiffusionForcing(**settings)


def bidirectional(**settings: Any) -> Bidirectional:
    return Bidirectional(**({"noise_levels": NoiseLevels(), "first_chunk_clean": ALWAYS_NOTHING} | settings))


def every_objective() -> Iterator[SlotObjective]:
    yield teacher_forcing(
        noise_repeats=2, first_chunk_clean=MIXED, context_noise=0.2, text_dropout=0.3, action_dropout=0.3
    )
    yield diffusion_forcing(first_chunk_clean=MIXED, levels_per="frame", joint_dropout=0.5)


@pytest.mark.parametrize("objective", list(every_objective()), ids=lambda objective: type(objective).__name__)
def test_draws_depend_on_the_sample_alone(objective: SlotObjective) -> None:
    whole = objective.prepare(StandIn(), clean(), KEY)
    for row in range(3):
        alone = objective.prepare(StandIn(), clean()[row : row + 1], NoiseKey(3, KEY.samples[row : row + 1]))
        for name in ("x", "sigma", "velocity", "weight", "predicted"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row]), name
    again = objective.prepare(StandIn(), clean(), NoiseKey(4, KEY.samples))
    assert not torch.equal(again.sigma, whole.sigma)


@pytest.mark.parametrize("objective", list(every_objective()), ids=lambda objective: type(objective).__name__)
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(objective: SlotObjective) -> None:
    whole = objective(StandIn(), clean(), conditions(), KEY)
    losses, per_chunk = [], []
    for row in range(3):
        own = conditions().map(lambda tensor, row=row: tensor[row : row + 1])
        out = objective(StandIn(), clean()[row : row + 1], own, NoiseKey(3, KEY.samples[row : row + 1]))
        losses.append(out.loss)
        per_chunk.append(out.per_chunk)
    assert whole.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    assert torch.allclose(whole.per_chunk, torch.stack(per_chunk).mean(0), rtol=1e-12)


def test_fewer_chunks_leave_the_earlier_draws_as_they_are() -> None:
    whole = teacher_forcing(noise_repeats=2).prepare(StandIn(), clean(), KEY)
    short = teacher_forcing(noise_repeats=1, num_chunks=2).prepare(StandIn(), clean(), KEY)
    same = [0, 2, 3]  # target_0 and context_0, target_1, both of the first repeat
    assert torch.equal(short.x, whole.x[:, same])
    assert torch.equal(short.sigma, whole.sigma[:, same])


def test_targets_are_on_the_path_and_contexts_are_clean() -> None:
    training_pass = teacher_forcing(noise_repeats=2).prepare(StandIn(), clean(), KEY)
    layout = training_pass.layout
    chunks = clean().unflatten(2, (4, 3)).movedim(2, 1)
    for place, index in enumerate(layout.targets):
        sigma = training_pass.sigma[:, index, ..., None, None, None]
        x0 = training_pass.x[:, index] - sigma * training_pass.velocity[:, place]
        assert torch.allclose(x0, chunks[:, layout.slots[index].chunk], atol=1e-12)
    for index in layout.contexts:
        assert torch.equal(training_pass.x[:, index], chunks[:, layout.slots[index].chunk])
        assert training_pass.sigma[:, index].eq(0).all()
    levels = training_pass.sigma[:, list(layout.targets), 0, 0].flatten()
    assert len(levels.unique()) == len(levels)  # every sample, repeat and chunk has its own
    noises = training_pass.velocity + chunks[:, [layout.slots[index].chunk for index in layout.targets]]
    assert torch.corrcoef(noises.flatten(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.3


def test_the_loss_is_the_weighted_velocity_error() -> None:
    objective, network = teacher_forcing(), StandIn()
    out = objective(network, clean(), conditions(), KEY)
    training_pass = objective.prepare(StandIn(), clean(), KEY)
    slots = list(training_pass.layout.targets)
    again = StandIn()
    told = of_chunks(conditions(), [slot.chunk for slot in training_pass.layout.slots])
    prediction, _ = again(training_pass.x, training_pass.sigma, told, training_pass.layout)
    error = (prediction[:, slots] - training_pass.velocity).square().mean(dim=(2, 3, 4, 5, 6))
    assert out.loss.item() == pytest.approx((error * training_pass.weight[:, :, 0, 0]).mean().item(), rel=1e-12)
    assert out.logs["mse"].item() == pytest.approx(error.mean().item(), rel=1e-12)
    assert torch.allclose(out.per_chunk, (error * training_pass.weight[:, :, 0, 0]).mean(0))


def test_given_latents_are_clean_told_so_and_out_of_the_loss() -> None:
    key = NoiseKey(0, tuple(range(400)))
    objective = teacher_forcing(first_chunk_clean=MIXED, num_chunks=2)
    latents = clean(6)[:1].expand(400, -1, -1, -1, -1, -1)
    training_pass = objective.prepare(StandIn(), latents, key)
    given = training_pass.sigma[:, 0, 0].eq(0)
    counts = given.sum(1)
    for n, share in ((0, 0.4), (1, 0.3), (2, 0.3)):
        assert counts.eq(n).double().mean().item() == pytest.approx(share, abs=0.09)
    assert torch.equal(given, torch.arange(3) < counts[:, None])  # always the leading ones
    assert torch.equal(training_pass.predicted[:, 0, 0], ~given)
    assert training_pass.predicted[:, 1].all()  # only the first chunk
    assert torch.equal(training_pass.x[:, 0, 0][given], latents[:, 0, :3][given])

    class Wrong(StandIn):
        """Errs only at latents that were given."""

        def __call__(self, x: Tensor, sigma: Tensor, *rest: Any) -> tuple[Tensor, None]:
            right = torch.zeros_like(x)
            right[:, list(training_pass.layout.targets)] = training_pass.velocity
            return right + sigma.eq(0)[..., None, None, None] * 9.0, None

    assert objective(Wrong(), latents, _nothing(400), key).loss.item() == 0


class ReleasedSize(StandIn):
    """Says that a chunk has 4,680 tokens, as in the released configuration, whatever the latents are."""

    def grid(self, shape: tuple[int, ...]) -> Grid:
        return Grid(1, 3, 30, 52)


def test_the_weight_is_that_of_the_unshifted_level() -> None:
    """The shift goes by the tokens of a chunk: 2.11347 for the released one, by which the bins of u come out right."""
    training_pass = teacher_forcing(noise_repeats=3).prepare(ReleasedSize(), clean(), KEY)
    sigma = training_pass.sigma[:, list(training_pass.layout.targets)]
    u = sigma / (2.1134715 - 1.1134715 * sigma)
    assert torch.equal(training_pass.weight, NoiseLevels().weight(u))


def test_the_loss_of_a_chunk_is_that_of_its_repeats() -> None:
    objective = teacher_forcing(noise_repeats=2)
    training_pass = objective.prepare(StandIn(), clean(), KEY)
    right = torch.zeros_like(training_pass.x)
    right[:, list(training_pass.layout.targets)] = training_pass.velocity

    class WrongAtChunk2(StandIn):
        def __call__(self, x: Tensor, sigma: Tensor, conditions: Conditions, layout: Any, memory: Any = None) -> Any:
            is_there = torch.tensor([slot.chunk == 2 for slot in layout.slots])
            return right + 3.0 * is_there[:, None, None, None, None, None], None

    out = objective(WrongAtChunk2(), clean(), conditions(), KEY)
    weights = training_pass.weight[:, 4:6].mean()  # the two repeats of chunk 2
    assert out.per_chunk.tolist() == pytest.approx([0, 0, 9 * weights.item(), 0])
    assert out.loss.item() == pytest.approx(9 * weights.item() / 4)


def test_masked_latents_and_samples_do_not_count() -> None:
    mask = torch.ones(3, 1, 12, dtype=torch.bool)
    mask[1] = False
    objective = teacher_forcing(noise_repeats=2)
    masked = objective(StandIn(), clean(), conditions(), KEY, mask=mask)
    two = conditions().map(lambda tensor: tensor[[0, 2]])
    plain = objective(StandIn(), clean()[[0, 2]], two, NoiseKey(3, (10, 12)))
    assert masked.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    mask[0, :, 6:] = False
    assert objective(StandIn(), clean(), conditions(), KEY, mask=mask).loss.item() != pytest.approx(plain.loss.item())


def test_dropout_keeps_its_shares_and_excludes() -> None:
    objective = teacher_forcing(text_dropout=0.2, action_dropout=0.3, joint_dropout=0.1)
    whole = conditions().map(lambda tensor: tensor[:1].expand(1000, *tensor.shape[1:]))
    out = objective._dropped(whole, NoiseKey(0, tuple(range(1000))))
    assert out.text_mask is not None
    assert out.actions_mask is not None
    text, actions = ~out.text_mask.flatten(1).any(1), ~out.actions_mask.flatten(1).any(1)
    assert torch.equal(actions, ~out.actions_mask.flatten(1).all(1))  # all of a sample or none
    for got, share in ((text & actions, 0.1), (text & ~actions, 0.2), (actions & ~text, 0.3)):
        assert got.double().mean().item() == pytest.approx(share, abs=0.05)
    assert teacher_forcing()._dropped(whole, KEY) is whole


def test_context_noise_is_drawn_told_and_off_by_default() -> None:
    training_pass = teacher_forcing(context_noise=0.2).prepare(StandIn(), clean(), KEY)
    contexts = list(training_pass.layout.contexts)
    levels = training_pass.sigma[:, contexts, 0, 0]
    assert levels.gt(0).all()
    assert levels.lt(0.2).all()
    assert len(levels.unique()) == levels.numel()
    plain = teacher_forcing().prepare(StandIn(), clean(), KEY)
    moved = (training_pass.x - plain.x)[:, contexts].square().mean(dim=(2, 3, 4, 5, 6)).sqrt()
    assert torch.allclose(moved, levels * 1.4, rtol=0.25)  # noise and latents have variance 1
    targets = list(plain.layout.targets)
    assert torch.equal(training_pass.x[:, targets], plain.x[:, targets])


def test_diffusion_forcing_may_have_a_level_a_frame() -> None:
    by_slot, by_frame = (
        diffusion_forcing(levels_per=unit).prepare(StandIn(), clean(), KEY) for unit in ("slot", "frame")
    )
    assert by_slot.sigma.shape == (3, 4, 1, 1)
    assert by_frame.sigma.shape == (3, 4, 1, 3)
    assert len(by_frame.sigma.unique()) == 36
    assert all(slot.seen and slot.role == "target" for slot in by_frame.layout.slots)


def test_bidirectional_is_one_target_slot() -> None:
    network = StandIn()
    out = bidirectional()(network, clean(), conditions(1, 12), KEY)
    assert network.calls == [(1, 3)]
    assert out.per_chunk.shape == (1,)
    assert bidirectional().trained_for(num_frames_px=45, ratio=4).rollouts == ("one_shot",)


def test_evaluation_is_at_one_level_without_weights() -> None:
    objective = teacher_forcing(first_chunk_clean=MIXED, context_noise=0.2, text_dropout=0.9, noise_repeats=2)
    network = StandIn()
    out = objective.evaluate(network, clean(), conditions(), KEY, 0.35)
    targets = list(network.layouts[0].targets)
    assert network.sigmas[0][:, targets].eq(0.35).all()
    assert network.sigmas[0][:, list(network.layouts[0].contexts)].eq(0).all()
    assert out.loss.item() == pytest.approx(out.logs["mse"].item())
    assert out.per_chunk.shape == (4,)


class Recorder(StandIn):
    """Keeps the velocities of the last slot."""

    def __init__(self) -> None:
        super().__init__()
        self.velocities: list[Tensor] = []

    def __call__(self, *args: Any) -> tuple[Tensor, Any]:
        velocity, memory = super().__call__(*args)
        self.velocities.append(velocity)
        return velocity, memory


@pytest.mark.parametrize("context_sees", ["self", "past"])
def test_the_training_pass_is_the_rollout(context_sees: str) -> None:
    """Both branches of guidance, 4 chunks, at the first evaluation of a chunk (it commits) and at a later one."""
    objective = teacher_forcing(noise_repeats=2, context_sees=context_sees)
    sigma, trained = 0.4, objective.trained_for(num_frames_px=45, ratio=4)
    passes = {level: objective.prepare(StandIn(), clean(), KEY, sigma=level) for level in (1.0, sigma)}
    layout = passes[1.0].layout
    slots = [index for index in layout.targets if layout.slots[index].repeat == 0]
    noises = [passes[1.0].x[:, index] for index in slots]

    network = Recorder()
    plan = plan_rollout("memory", num_frames_px=45, context_px=0, trained=trained)
    rolled = list(
        MemoryRollout(num_steps=None, guidance=2.0)(
            network, clean(0), conditions(), plan, Forced(clean(), noises, sigma), KEY
        )
    )
    assert torch.equal(torch.cat([chunk.latents for chunk in rolled], dim=2), clean())

    for branch, rows in (("conditional", slice(0, 3)), ("unconditional", slice(3, 6))):
        told = conditions() if branch == "conditional" else _without_text(conditions())
        for step, level in enumerate((1.0, sigma)):
            parallel = Recorder()
            objective.evaluate(parallel, clean(), told, KEY, level)
            for chunk, index in enumerate(slots):
                streamed = network.velocities[2 * chunk + step][rows, -1]
                assert torch.allclose(streamed, parallel.velocities[0][:, index], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: teacher_forcing(noise_repeats=0), "objective.noise_repeats"),
        (lambda: teacher_forcing(context_noise=1.0), "objective.context_noise"),
        (lambda: teacher_forcing(context_sees="all"), "objective.context_sees"),
        (lambda: teacher_forcing(num_chunks=0), "objective.num_chunks"),
        (lambda: teacher_forcing(chunk_lat=0), "video.chunk_lat"),
        (lambda: teacher_forcing(text_dropout=0.6, action_dropout=0.6), "objective.text_dropout"),
        (lambda: diffusion_forcing(levels_per="token"), "objective.levels_per"),
        (lambda: teacher_forcing(num_chunks=5).chunks_used(12), "objective.num_chunks"),
        (lambda: teacher_forcing().chunks_used(13), "video.num_frames"),
        (lambda: teacher_forcing().trained_for(num_frames_px=46, ratio=4), "video.num_frames"),
    ],
)
def test_settings_that_cannot_work_name_their_key(make: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        make()


def test_what_weights_are_trained_for() -> None:
    trained = teacher_forcing(first_chunk_clean={"none": 0.5, "image": 0.5}).trained_for(num_frames_px=45, ratio=4)
    assert (trained.rollouts, trained.chunk_lat, trained.starts_lat) == (("memory",), 3, (0, 1))
    trained = diffusion_forcing().trained_for(num_frames_px=45, ratio=4)
    assert (trained.commit_role, trained.context_sees) == ("target", "past")


def _without_text(whole: Conditions) -> Conditions:
    assert whole.text_ids is not None
    return dataclasses.replace(whole, text_mask=torch.zeros(whole.text_ids.shape, dtype=torch.bool))


def _nothing(b: int) -> Conditions:
    return Conditions(fps=torch.full((b,), 10.0))
