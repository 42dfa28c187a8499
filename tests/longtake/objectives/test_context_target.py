"""Context -> target: what is drawn, what the context becomes, and a training pass that is the rollout."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.attention import WindowAttention
from longtake.networks.conditioning import ActionEmbedding
from longtake.networks.video_dit import VideoDiT
from longtake.objectives.context_target import MODES, ContextTarget
from longtake.objectives.flow_matching import NoiseLevels, noised
from longtake.rollout.chunks import MemoryRollout
from longtake.rollout.conditions import clip_conditions, of_chunks
from longtake.rollout.noise import Draws, NoiseKey, normal
from longtake.rollout.plan import plan_rollout
from longtake.rollout.solvers import Euler
from longtake.types import Clip, Conditions
from tests.longtake.networks.tiny import tiny_network
from tests.longtake.stand_in import Forced, StandIn

BLOCKS = 5
MANY = NoiseKey(3, tuple(range(400)))
IMAGE = len(MODES)


def objective(**settings: Any) -> ContextTarget:
    defaults: dict[str, Any] = {"chunk_lat": 3, "block_px": 9, "num_frames_px": 9 * BLOCKS}
    defaults |= {"noise_levels": NoiseLevels(), "own_solver": Euler(), "image_start": 0.2}
    return ContextTarget(**{**defaults, **settings})


def clean(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 3 * BLOCKS, 4, 4, 6, generator=generator, dtype=torch.float64)


def conditions(count: int = 3) -> Conditions:
    actions = torch.randn(count, 9 * BLOCKS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clip = Clip(actions=actions, text_ids=torch.arange(count * 2).view(count, 1, 2), key=["a"] * count)
    return clip_conditions(clip, chunk_lat=3, num_chunks=BLOCKS, ratio=4, own_starts=True)


def key(count: int = 3, first: int = 0) -> NoiseKey:
    return NoiseKey(3, tuple(range(first, first + count)))


def network_of_one_block(dtype: torch.dtype = torch.float64) -> VideoDiT:
    actions = partial(ActionEmbedding, action_dim=3, ratio_time=4)
    return tiny_network(partial(WindowAttention, window=1), dtype=dtype, text=None, frame_rate=None, actions=actions)


def without_text(count: int = 3) -> Conditions:
    return dataclasses.replace(conditions(count), text_ids=None)


def only(mode: str, **settings: Any) -> ContextTarget:
    return objective(**{"context": {mode: 1.0}, "image_start": 0.0, **settings})


def test_shares_of_the_contexts_are_as_asked_for_and_blocks_lie_in_the_clip() -> None:
    weights = {"clean": 2.0, "noised": 1.0, "recoded": 1.0, "own": 4.0}
    pairs = objective(context=weights, own_depth=3).pairs(MANY, BLOCKS)
    shares = torch.bincount(pairs.mode, minlength=IMAGE + 1) / len(MANY)
    assert shares.tolist() == pytest.approx([0.2, 0.1, 0.1, 0.4, 0.2], abs=0.06)
    own = pairs.mode == MODES.index("own")
    assert set(pairs.depth[own].tolist()) == {1, 2, 3}
    assert set(pairs.depth[~own].tolist()) == {0}
    targets = pairs.first + pairs.depth + 1
    assert (pairs.first.min(), targets.max()) == (0, BLOCKS - 1)
    assert set(pairs.first[(pairs.mode == 0)].tolist()) == {0, 1, 2, 3}


def test_draws_depend_on_the_sample_alone() -> None:
    settings = objective(context={"clean": 1, "noised": 1, "own": 1}, own_depth=2, joint_dropout=0.3)
    whole = settings.pairs(MANY, BLOCKS)
    alone = settings.pairs(NoiseKey(3, MANY.samples[7:8]), BLOCKS)
    assert (alone.mode[0], alone.first[0], alone.depth[0]) == (whole.mode[7], whole.first[7], whole.depth[7])
    count = 12
    batch = settings(StandIn(), clean(count), conditions(count), key(count))
    losses = []
    for row in range(count):
        own = conditions(count).map(lambda tensor, row=row: tensor[row : row + 1])
        losses.append(settings(StandIn(), clean(count)[row : row + 1], own, key(1, row)).loss)
    assert torch.allclose(batch.loss, torch.stack(losses).mean(), atol=1e-12)
    assert len(set(whole.mode[:count].tolist())) > 2


def test_the_network_sees_one_clean_context_and_the_target_after_it() -> None:
    network, settings = StandIn(), only("clean")
    settings(network, clean(), conditions(), key())
    (x,), (sigma,), (layout,) = network.xs, network.sigmas, network.layouts
    assert [(slot.role, slot.chunk, slot.seen) for slot in layout.slots] == [("context", 0, True), ("target", 1, False)]
    first = settings.pairs(key(), BLOCKS).first
    blocks = clean().unflatten(2, (BLOCKS, 3)).transpose(1, 2)
    assert torch.equal(x[:, 0], blocks[torch.arange(3), first])
    noise = normal(key(), "noise", Draws([1], [0], 1, 3), (4, 4, 6)).to(x)
    level = sigma[:, 1:, :, :, None, None, None]
    assert torch.allclose(x[:, 1:], noised(blocks[torch.arange(3), first + 1][:, None], noise, level))
    assert sigma[:, 0].abs().max() == 0


def test_an_image_start_is_one_target_whose_first_latent_is_clean_and_out_of_the_loss() -> None:
    network, settings = StandIn(), objective(image_start=0.999)
    settings(network, clean(), conditions(), key())
    (x,), (sigma,), (layout,) = network.xs, network.sigmas, network.layouts
    assert [slot.role for slot in layout.slots] == ["target"]
    assert torch.equal(x[:, 0, :, 0], clean()[:, :, 0])
    assert (sigma[:, 0, :, 0].max(), sigma[:, 0, :, 1:].min() > 0) == (0, True)
    inside = settings.prepare(network, clean()[:, :, :3], key())
    assert inside.predicted[:, 0, 0].tolist() == [[False, True, True]] * 3


def test_a_noised_context_has_a_level_of_its_own_that_the_network_is_told() -> None:
    network = StandIn()
    mixed = objective(context={"clean": 1, "noised": 1}, image_start=0.0, context_noise=0.3)
    mixed(network, clean(40), conditions(40), key(40))
    mode, levels = mixed.modes(key(40)), network.sigmas[0][:, 0, 0, 0]
    assert levels[mode == 0].max() == 0
    assert levels[mode == 1].min() > 0
    assert 0.2 < levels.max() < 0.3


def test_a_recoded_context_is_what_the_transform_makes_of_it() -> None:
    network, mixed = StandIn(), objective(context={"clean": 1, "recoded": 1}, image_start=0.0)
    seen = []

    def transform(blocks: Tensor) -> Tensor:
        seen.append(blocks)
        return blocks + 100

    mixed(network, clean(20), conditions(20), key(20), context_transform=transform)
    shift = network.xs[0][:, 0].mean(dim=(1, 2, 3, 4, 5))
    assert ((shift > 50) == (mixed.modes(key(20)) == MODES.index("recoded"))).all()
    assert seen[0].shape[1:] == (1, 3, 4, 4, 6)


@pytest.mark.parametrize("depth", [1, 3])
def test_an_own_context_is_a_rollout_of_that_depth(depth: int) -> None:
    """The context that training makes is what the rollout makes, chunk by chunk, from the same true block."""
    network, latents, told = network_of_one_block(), clean(6), without_text(6)
    settings = only("own", own_depth=depth, own_steps=3)
    pairs = settings.pairs(key(6), BLOCKS)
    contexts: list[Tensor] = []
    part = settings._part
    settings._part = lambda network, slots, *rest: contexts.append(slots) or part(network, slots, *rest)  # type: ignore
    settings(network, latents, told, key(6))
    trained = settings.trained_for(num_frames_px=45, ratio=4)
    for row in range(6):
        first, deep = int(pairs.first[row]), int(pairs.depth[row])
        plan = plan_rollout("memory", num_frames_px=9 * (deep + 1), context_px=9, trained=trained)
        own = of_chunks(told.map(lambda tensor, row=row: tensor[row : row + 1]), range(first, first + deep + 1))
        start = latents[row : row + 1, :, 3 * first : 3 * first + 3]
        named = NoiseKey(3, (f"own {row}",))
        *_, last = MemoryRollout(num_steps=3, guidance=1.0)(network, start, own, plan, Euler(), named)
        assert torch.allclose(contexts[0][row, 0], last.latents[0], atol=1e-10)
        assert not torch.allclose(contexts[0][row, 0], latents[row, :, 3 * (first + deep) : 3 * (first + deep) + 3])


def test_own_rollouts_leave_no_gradient_and_do_not_take_that_of_the_training_pass() -> None:
    network = network_of_one_block(torch.float32)
    told = without_text().map(lambda tensor: tensor.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = only("own", own_depth=2, own_steps=2)(network, clean().float(), told, key()).loss
    loss.backward()
    weights = {name: p for name, p in network.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weights.values())


def test_the_training_pass_is_the_rollout() -> None:
    """Forced through the true noisy target, the rollout sees the velocity that training computes on it."""
    network, latents, told, sigma = network_of_one_block(), clean(), without_text(), 0.6
    settings = only("clean", image_start=0.1)
    trained = settings.trained_for(num_frames_px=45, ratio=4)
    plan = plan_rollout("memory", num_frames_px=45, context_px=9, trained=trained)
    noises = [normal(key(), "noise", Draws([c], [0], 1, 3), (4, 4, 6))[:, 0].double() for c in range(1, BLOCKS)]
    seen: list[Tensor] = []

    class Watched(Forced):
        def step(self, x: Tensor, velocity: Tensor) -> Tensor:
            if self.index == 1:
                seen.append(velocity)
            return super().step(x, velocity)

    solver = Watched(latents[:, :, 3:], noises, sigma)
    rollout = MemoryRollout(num_steps=None, guidance=1.0)
    list(rollout(network, latents[:, :, :3], told, plan, solver, key()))  # type: ignore[arg-type]
    assert len(seen) == BLOCKS - 1
    for target, velocity in enumerate(seen, start=1):
        noisy = noised(
            latents[:, :, 3 * target : 3 * target + 3], noises[target - 1], torch.tensor(sigma, dtype=torch.float64)
        )
        x = torch.stack([latents[:, :, 3 * target - 3 : 3 * target], noisy], dim=1)
        levels = torch.tensor([0.0, sigma], dtype=torch.float64).view(1, 2, 1, 1).expand(3, -1, -1, -1)
        layout = settings.layout(2, network.grid((1, 3, 4, 4, 6)))
        wanted, _ = network(x, levels, of_chunks(told, [target - 1, target]), layout)
        assert torch.allclose(velocity, wanted[:, 1], atol=1e-10)


def test_validation_has_every_block_as_the_target_and_an_image_for_the_first() -> None:
    network, settings = StandIn(), objective()
    out = settings.evaluate(network, clean(), conditions(), key(), 0.5)
    assert out.per_chunk.shape == (BLOCKS,)
    assert torch.allclose(out.loss, out.per_chunk[1:].mean())
    assert network.sigmas[0][:, 0, 0].tolist() == [[0, 0.5, 0.5]] * 3
    assert all(sigma[:, :, 0, 0].tolist() == [[0, 0.5]] * 3 for sigma in network.sigmas[1:])
    worse = objective(context={"own": 1.0}).evaluate(StandIn(), clean(), conditions(), key(), 0.5)
    assert torch.equal(out.per_chunk, worse.per_chunk)  # whatever training does to contexts


def test_frames_that_are_not_real_are_out_of_the_loss() -> None:
    mask = torch.ones(3, 1, 15, dtype=torch.bool)
    mask[:, :, 14] = False  # the last latent
    changed = clean()
    changed[:, :, 14] = 50
    settings = only("clean")
    last = settings.evaluate(StandIn(), clean(), conditions(), key(), 0.5, mask=mask).per_chunk
    other = settings.evaluate(StandIn(), clean(), conditions(), key(), 0.5).per_chunk
    assert torch.equal(last[:-1], other[:-1])
    assert last[-1] != other[-1]
    samples = NoiseKey(3, tuple(range(40)))
    rows = [row for row in range(40) if settings.pairs(samples, BLOCKS).first[row] == 3][:1]
    own = NoiseKey(3, (rows[0],))
    told = conditions(1)
    with_mask = [settings(StandIn(), video[:1], told, own, mask=mask[:1]).loss for video in (clean(), changed)]
    assert not torch.equal(*(settings(StandIn(), video[:1], told, own).loss for video in (clean(), changed)))
    assert with_mask[0].isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames_px": 33}, r"video\.num_frames is 33; expected 2 or more blocks of 9 frames.*18 and 9 more"),
        ({"num_frames_px": 9}, r"video\.num_frames is 9"),
        ({"num_frames_px": 27, "own_depth": 2}, r"own rollouts of 2 blocks.*clips of 36 frames.*num_frames is 27"),
        ({"num_frames_px": 18, "context": {"own": 1}}, r"own rollouts of 1 blocks.*need clips of 27"),
        ({"context": {"clear": 1}}, r"'clear'.*clean.*objective\.context"),
        ({"context": {"clean": 0}}, r"objective\.context is \{'clean': 0\.0\}; expected weights"),
        ({"image_start": 1.0}, r"objective\.image_start is 1\.0"),
        ({"context_noise": 1.0}, r"objective\.context_noise is 1\.0"),
        ({"own_steps": 0}, r"objective\.own_steps is 0"),
        ({"chunk_lat": 1}, r"video\.chunk_lat is 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(**settings)


def test_blocks_of_another_encoder_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"video\.block_frames is 9, but blocks of video\.chunk_lat=3.*hold 17"):
        objective().trained_for(num_frames_px=45, ratio=8)
    with pytest.raises(ConfigError, match="16 latent frames, which are not whole blocks of 3"):
        objective().chunks_used(16)


def test_weights_trained_without_image_starts_do_not_start_from_images() -> None:
    trained = objective(image_start=0.0).trained_for(num_frames_px=45, ratio=4)
    plan_rollout("memory", num_frames_px=81, context_px=9, trained=trained)
    with pytest.raises(ConfigError, match="a start of 1 frames.*trained to start from 9 frames"):
        plan_rollout("memory", num_frames_px=81, context_px=1, trained=trained)
