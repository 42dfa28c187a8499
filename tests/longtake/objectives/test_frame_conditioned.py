"""Frame conditioning: given frames go in clean, are out of the loss, and are drawn as told; views come and go."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.objectives.flow_matching import NoiseLevels
from longtake.objectives.frame_conditioned import FrameConditioned
from longtake.rollout.noise import NoiseKey
from longtake.types import Conditions
from tests.longtake.networks.several_views import CONTROL, network_of
from tests.longtake.stand_in import StandIn

VIEWS, FRAMES = 4, 6
MANY = NoiseKey(1, tuple(range(2000)))


def frame_conditioned(**settings: Any) -> FrameConditioned:
    levels = NoiseLevels(shift=5.0, shift_by_tokens=False)
    return FrameConditioned(**({"noise_levels": levels, "control_dropout": 0.0} | settings))


def clips(count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, VIEWS, FRAMES, 4, 4, 4, generator=draw, dtype=torch.float64)


def key_of(count: int = 3) -> NoiseKey:
    return NoiseKey(5, tuple(range(count)))


def told(count: int = 3, **more: Any) -> Conditions:
    return Conditions(view_ids=torch.arange(VIEWS).expand(count, -1), **more)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_the_formulas_of_the_reference(given: int) -> None:
    """x_in = g m + x (1 - m), t' = 5 u / (1 + 4 u), v = noise - g, and no loss where m is 1."""
    objective = frame_conditioned(clean_latents=[float(n == given) for n in range(3)])
    g = clips()
    made = objective.prepare(StandIn(), g, key_of())
    mask = torch.zeros(3, 1, VIEWS, FRAMES, 1, 1, 1, dtype=torch.float64)
    mask[:, :, :, :given] = 1
    noise = made.velocity + g[:, None]  # v = noise - g, also of what is given
    t = made.sigma[:, :, :, -1:, None, None, None]
    noisy = (1 - t) * g[:, None] + t * noise
    wanted = g[:, None] * mask + noisy * (1 - mask)
    assert torch.allclose(made.x, wanted, rtol=0, atol=1e-12)
    assert torch.equal(made.x[:, :, :, :given], g[:, None, :, :given])  # bit for bit
    assert (made.sigma[:, :, :, :given] == 0).all()
    assert (made.sigma[:, :, :, given:] > 0).all()
    assert torch.equal(
        ~made.predicted.expand(3, 1, VIEWS, FRAMES), mask.bool().expand(3, 1, VIEWS, FRAMES, 1, 1, 1)[..., 0, 0, 0]
    )
    plain = frame_conditioned(clean_latents=[1.0]).prepare(StandIn(), g, key_of())
    assert torch.equal(made.sigma[..., -1], plain.sigma[..., -1])  # the level does not depend on what is given


def test_noise_levels_follow_the_reference() -> None:
    """Shift 5 of a logit-normal u: the weighted mean of t' over many samples is that of the reference's draws."""
    made = frame_conditioned(clean_latents=[1.0]).prepare(
        StandIn(), torch.zeros(2000, 1, 1, 1, 2, 2, dtype=torch.float64), MANY
    )
    ours = (made.sigma.flatten() * made.weight.flatten()).mean()
    u = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sigmoid()
    assert ours.item() == pytest.approx((5 * u / (1 + 4 * u)).mean().item(), abs=0.02)


def test_given_latents_are_out_of_the_loss_and_of_the_gradient() -> None:
    objective = frame_conditioned(clean_latents=[0.0, 0.0, 1.0])
    offset = torch.zeros(1, 1, 1, FRAMES, 1, 1, 1, dtype=torch.float64, requires_grad=True)

    class Offset(StandIn):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out, memory = super().__call__(*args, **kwargs)
            return out + offset, memory

    objective(Offset(), clips(), told(), key_of()).loss.backward()
    assert offset.grad is not None
    per_frame = offset.grad.flatten()
    assert (per_frame[:2] == 0).all()
    assert (per_frame[2:] != 0).all()


def test_draws_have_the_given_shares() -> None:
    made = frame_conditioned(clean_latents=[0.5, 0.25, 0.25]).prepare(
        StandIn(), torch.zeros(2000, 1, FRAMES, 1, 2, 2), MANY
    )
    counts = (~made.predicted[:, 0, 0]).sum(dim=1)
    shares = torch.bincount(counts, minlength=4)[:4] / 2000
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.25, 0.0]), atol=0.04)


def test_draws_depend_on_the_sample_alone() -> None:
    objective = frame_conditioned(view_condition_dropout=2, clean_noise=0.2, views=[1, 4])
    whole = objective.prepare(StandIn(), clips(), key_of())
    for row in range(3):
        alone = objective.prepare(StandIn(), clips()[row : row + 1], NoiseKey(5, (row,)))
        for name in ("x", "sigma", "velocity", "weight", "predicted"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row]), name
        assert torch.equal(objective.views_of(NoiseKey(5, (row,)), VIEWS)[0], objective.views_of(key_of(), VIEWS)[row])


def test_views_lose_what_they_are_given_but_for_the_first() -> None:
    objective = frame_conditioned(clean_latents=[0.0, 0.0, 1.0], view_condition_dropout=2)
    made = objective.prepare(StandIn(), torch.zeros(2000, VIEWS, FRAMES, 1, 2, 2), MANY)
    given = ~made.predicted[:, 0]  # [b v f]
    assert made.sigma.shape == (2000, 1, VIEWS, FRAMES)
    lost = (~given[:, :, 0]).sum(dim=1)
    assert given[:, 0, :2].all()
    assert set(lost.tolist()) == {0, 1, 2}
    assert torch.allclose(torch.bincount(lost) / 2000, torch.full((3,), 1 / 3), atol=0.04)
    assert torch.allclose((~given[:, 1:, 0]).float().mean(dim=0), torch.full((3,), 1 / 3), atol=0.04)


def test_views_are_sampled_evenly_and_the_absent_are_out_of_everything() -> None:
    objective = frame_conditioned(views=[1, 4])
    there = objective.views_of(MANY, VIEWS)
    assert torch.allclose(torch.bincount(there.sum(dim=1), minlength=5)[1:] / 2000, torch.full((4,), 0.25), atol=0.04)
    assert torch.allclose(there.float().mean(dim=0), torch.full((4,), 0.625), atol=0.04)
    some = torch.tensor([True, False, True, True]).expand(2000, -1)
    kept = objective.views_of(MANY, VIEWS, some)
    assert not kept[:, 1].any()
    assert kept.any(dim=1).all()
    network, latents = network_of("channels"), clips()
    before = objective(network, latents, told(), key_of()).loss
    mask = objective.views_of(key_of(), VIEWS)
    assert not mask.all()
    changed = torch.where(mask[:, :, None, None, None, None], latents, latents * 2 + 1)
    assert torch.equal(objective(network, changed, told(), key_of()).loss, before)
    objective.views = None
    assert objective(network, latents, told(), key_of()).loss != before


@pytest.mark.parametrize("kind", ["channels", "cross"])
@pytest.mark.parametrize("most", [1, 3])
def test_absent_views_are_not_computed_and_nothing_else_changes(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(kind, control=CONTROL, given_channel=True)
    objective = frame_conditioned(views=[1, most], view_condition_dropout=2, control_dropout=0.3, control_region=0.5)
    draw = torch.Generator().manual_seed(1)
    shape = (3, 1, VIEWS, FRAMES, 4, 4, 4)
    control = {kind: torch.randn(shape, generator=draw, dtype=torch.float64) for kind in ("depth", "labels")}
    weight = {"depth": torch.rand(3, 1, VIEWS, 1, 1, 1, generator=draw, dtype=torch.float64)}
    conditions = told(control=control, control_weight=weight)
    seen: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    fewer = objective(network, clips(), conditions, key_of())
    monkeypatch.setattr("longtake.objectives.frame_conditioned._without_absent", lambda *given: given[:3])
    whole = objective(network, clips(), conditions, key_of())
    hook.remove()
    counts = objective.views_of(key_of(), VIEWS).sum(dim=1)
    assert seen == [max(2, int(counts.max())), VIEWS]
    assert fewer.loss.item() == pytest.approx(whole.loss.item(), rel=1e-9)


def test_control_is_dropped_in_its_share_of_samples() -> None:
    objective = frame_conditioned(control_dropout=0.15)
    control = {"depth": torch.zeros(2000, 1, 1, 1, 1, 2, 2)}
    weights = {"depth": torch.full((2000, 1, 1, 1, 1, 1), 0.5)}
    found = objective._dropped(Conditions(control=control, control_weight=weights), MANY).control_weight
    assert found is not None
    values = found["depth"].flatten()
    assert set(values.tolist()) == {0.0, 0.5}
    assert (values == 0).float().mean().item() == pytest.approx(0.15, abs=0.03)
    alone = objective._dropped(Conditions(control=control), MANY).control_weight
    assert alone is not None
    assert torch.equal(alone["depth"].flatten() == 0, values == 0)


def test_control_counts_inside_of_a_box_in_its_share_of_samples() -> None:
    objective = frame_conditioned(control_region=0.4)
    control = {"depth": torch.zeros(2000, 1, VIEWS, 5, 1, 6, 8)}
    given = {"depth": torch.rand(2000, 1, VIEWS, 1, 1, 1)}
    found = objective._dropped(Conditions(control=control, control_weight=given), MANY).control_weight
    assert found is not None
    weight = found["depth"].expand(2000, 1, VIEWS, 5, 6, 8)
    assert ((weight == 0) | (weight == given["depth"])).all()
    inside = (weight > 0)[:, 0]
    assert (inside == inside[:, :1]).all()  # the same box in all views
    boxed = ~inside[:, 0].flatten(1).all(dim=1)
    assert boxed.float().mean().item() == pytest.approx(0.4, abs=0.04)
    for axes in ((2, 3), (1, 3), (1, 2)):  # a box is the product of what it covers on each axis
        along = inside[:, 0].any(dim=axes[1]).any(dim=axes[0])
        assert ((along[:, 1:] != along[:, :-1]).sum(dim=1) <= 2).all()
        covered = along.float().mean(dim=1)[boxed & along.any(dim=1)]
        assert 0.2 < covered.mean().item() < 0.6
    plain = objective._dropped(Conditions(control=control), MANY).control_weight
    assert plain is not None
    assert torch.equal((plain["depth"] > 0).expand(2000, 1, 1, 5, 6, 8)[:, 0, 0], inside[:, 0])


def test_the_network_is_told_what_is_given_and_how_clean_it_is() -> None:
    objective = frame_conditioned(clean_latents=[0.0, 1.0], clean_noise=0.2)
    seen: list[Conditions] = []

    class Listens(StandIn):
        def __call__(self, x: Tensor, sigma: Tensor, conditions: Conditions, *rest: Any) -> Any:
            seen.append(conditions)
            return super().__call__(x, sigma, conditions, *rest)

    network = Listens()
    objective(network, clips(), told(), key_of())
    assert seen[0].given is not None
    assert seen[0].given.shape == (3, 1, VIEWS, FRAMES)
    assert seen[0].given[..., 0].all()
    assert not seen[0].given[..., 1:].any()
    level = network.sigmas[0][..., 0]
    assert ((level > 0) & (level < 0.2)).all()
    assert not torch.equal(network.xs[0][:, :, :, 0], clips()[:, None, :, 0])


def test_a_real_network_learns_from_all_of_it() -> None:
    network = network_of("cross", control=CONTROL, given_channel=True, dtype=torch.float32)
    objective = frame_conditioned(views=[1, 4], view_condition_dropout=2, control_dropout=0.5, control_region=0.5)
    control = {"depth": torch.randn(3, 1, VIEWS, FRAMES, 4, 4, 4), "labels": torch.randn(3, 1, VIEWS, FRAMES, 4, 4, 4)}
    objective(network, clips().float(), told(control=control), key_of()).loss.backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters() if parameter.grad is not None)


def test_evaluation_gives_and_drops_nothing() -> None:
    objective = frame_conditioned(clean_latents=[0.0, 1.0], views=[1, 1], control_dropout=1.0)
    network = StandIn()
    objective.evaluate(network, clips(), told(), key_of(), 0.5)
    assert (network.sigmas[0] == 0.5).all()


def test_it_says_what_rollouts_it_trains_for() -> None:
    trained = frame_conditioned(clean_latents=[0.5, 0.0, 0.5]).trained_for(num_frames_px=29, ratio=4)
    assert trained.rollouts == ("sliding_window", "one_shot")
    assert (trained.chunk_lat, trained.starts_lat, trained.ratio) == (8, (0, 2), 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clean_latents": [0.5, 0.2]}, "sum to 1"),
        ({"clean_latents": []}, "sum to 1"),
        ({"clean_noise": 1.0}, "0 to 0.999"),
        ({"views": [0, 3]}, "fewest and the most"),
        ({"views": [3]}, "fewest and the most"),
        ({"control_dropout": 1.5}, "0 to 1"),
        ({"control_region": -0.5}, "0 to 1"),
        ({"view_condition_dropout": -1}, "0 or more"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        frame_conditioned(**changes)


def test_a_clip_must_be_longer_than_what_is_given() -> None:
    with pytest.raises(ConfigError, match="nothing is left to predict"):
        frame_conditioned(clean_latents=[0.0, 0.5, 0.5]).trained_for(num_frames_px=5, ratio=4)


def test_conditions_of_both_branches_keep_their_control() -> None:
    control = {"depth": torch.randn(2, 1, 1, 1, 1, 2, 2)}
    one = Conditions(control=control, control_weight={"depth": torch.ones(2, 1, 1, 1, 1, 1)}, fps=torch.ones(2))
    stacked = Conditions.stack([one, dataclasses.replace(one, fps=torch.zeros(2))])
    assert stacked.control is not None
    assert torch.equal(stacked.control["depth"], torch.cat([control["depth"]] * 2))
