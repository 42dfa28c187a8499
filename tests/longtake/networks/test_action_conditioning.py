"""Actions in a token network: alignment with latents, no future, an effect in every way, and what is refused."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from longtake.encoders.actions import FastActionsEncoder
from longtake.errors import ConfigError
from longtake.geometry import group_by_latent
from longtake.networks.action_conditioning import (
    ActionConditioning,
    ActionSignal,
    CrossAttentionActions,
    FastActions,
    PerLatentActions,
)
from longtake.networks.action_motion import Pan, latent_motion
from longtake.types import Conditions
from tests.longtake.networks.tiny_tokens import ACTIONS, RATIO, layout, make, video

CONF = Path(__file__).resolve().parents[3] / "conf"
DIM, LATENTS, FAST_VOCAB = 24, 3, 200
WAYS: dict[str, Any] = {
    "additive": PerLatentActions,
    "adaln": partial(PerLatentActions, into="modulation"),
    "cross": CrossAttentionActions,
    "cross_fast": partial(FastActions, vocab_size=FAST_VOCAB, num_heads=4),
    "cross_totals": partial(CrossAttentionActions, totals=True),
    "cross_fast_pan": partial(FastActions, vocab_size=FAST_VOCAB, num_heads=4, totals=True, pan=True),
    "additive_pan": partial(PerLatentActions, pan=True),
}
NETWORKS = {way: "action_keys" if way.startswith("cross") else way.removesuffix("_pan") for way in WAYS}


def frames(b: int = 2, seed: int = 0) -> Tensor:
    """Returns actions of pixel frames [b 17 a]."""
    return torch.randn(b, 1 + RATIO * (LATENTS - 1), ACTIONS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fast() -> FastActionsEncoder:
    return FastActionsEncoder(vocab_size=FAST_VOCAB).fitted(frames(60, seed=9).numpy())


def grouped(way: str, actions: Tensor, encoder: FastActionsEncoder, width: int | None = None) -> Conditions:
    """Returns conditions of one latent frame a slot, as a network with this way reads them."""
    numbers = group_by_latent(actions, RATIO).unsqueeze(2)
    motion = latent_motion(numbers, RATIO)
    if way.startswith("cross_fast"):
        tokens = encoder(actions)
        padding = tokens.new_full((*tokens.shape[:2], (width or tokens.shape[2]) - tokens.shape[2]), -1)
        return Conditions(actions=torch.cat((tokens, padding), dim=-1).unsqueeze(2), motion=motion)
    return Conditions(actions=numbers, motion=motion)


def build(way: str, **changes: Any) -> ActionConditioning:
    torch.manual_seed(1)
    module = WAYS[way](DIM, action_dim=ACTIONS, ratio_time=RATIO, **changes)
    return module.eval()


def of_latent(signal: ActionSignal, latent: int) -> Tensor:
    """Returns everything that tokens of a latent are told, for sample 0."""
    parts = [field[0, latent].flatten() for field in (signal.additive, signal.modulation) if field is not None]
    if signal.context is not None:
        seen = signal.visible(torch.tensor([latent]))[0, 0, 0]
        parts.append(signal.context[0][seen].flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("prior_only", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_latent_is_told(way, prior_only, fast):
    """Frame 0 is latent 0, frames 1 to 8 latent 1, 9 to 16 latent 2; with prior_only one latent later."""
    module = build(way, prior_only=prior_only)
    actions = frames(1)
    before = module(grouped(way, actions, fast, width=80))
    keeps_past = way.startswith("cross")
    for frame, first in ((0, 0), (1, 1), (8, 1), (9, 2), (16, 2)):
        changed = actions.clone()
        changed[0, frame] += 1
        after = module(grouped(way, changed, fast, width=80))
        first += prior_only
        for latent in range(LATENTS):
            told, was = of_latent(after, latent), of_latent(before, latent)
            differs = told.shape != was.shape or not torch.equal(told, was)
            assert differs == (latent >= first if keeps_past else latent == first), (frame, latent)


def test_keys_of_frames_by_hand():
    """One key for frame 0, eight for each later latent, one that stands for no action."""
    signal = build("cross")(grouped("cross", frames(), None))  # type: ignore[arg-type]
    assert signal.context_mask is not None
    assert signal.visible(torch.tensor([0, 1, 2])).sum(-1).tolist() == [[[2, 10, 18]]] * 2
    assert signal.visible(torch.tensor([[0], [2]])).sum(-1).tolist() == [[[2]], [[18]]]
    later = build("cross", prior_only=True)(grouped("cross", frames(), None))  # type: ignore[arg-type]
    assert later.visible(torch.tensor([0, 1, 2])).sum(-1).tolist() == [[[1, 2, 10]]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_dropped_and_absent_actions(way, fast):
    """Where actions are dropped nothing depends on them, and something else is told than where they are zero."""
    module = build(way)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = torch.tensor([[[True], [False], [True]]])
    told = []
    for seed in (0, 1):
        actions = frames(1)
        actions[:, 1:9] = frames(1, seed=seed)[:, 1:9]
        conditions = dataclasses.replace(grouped(way, actions, fast, width=80), actions_mask=mask)
        told.append(module(conditions))
    for latent in range(LATENTS):
        assert torch.equal(of_latent(told[0], latent), of_latent(told[1], latent))
    zeros = module(grouped(way, frames(1) * 0, fast))
    nothing = module(Conditions())
    assert not torch.equal(of_latent(zeros, 0), of_latent(nothing, 0))
    if not way.startswith("cross"):
        field = "modulation" if way == "adaln" else "additive"
        assert torch.equal(getattr(told[0], field)[0, 1], getattr(nothing, field)[0, 0])
    else:
        assert nothing.context is not None
        assert nothing.context.shape == (1, 1, DIM)
        dropped = module(dataclasses.replace(grouped(way, frames(1), fast), actions_mask=mask & False))
        assert dropped.visible(torch.arange(3)).sum(-1).tolist() == [[[1, 1, 1]]]
        assert dropped.context is not None
        assert torch.equal(dropped.context[:, :1], nothing.context)


@pytest.mark.parametrize("prior_only", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_actions_change_the_network_and_never_its_past(way, prior_only, fast):
    """Through the whole transformer: other actions of latent k move what predicts latents >= k and nothing before."""
    actions = partial(WAYS[way], action_dim=ACTIONS, ratio_time=RATIO, prior_only=prior_only)
    network = make(NETWORKS[way], actions=actions, bov=True)
    x, original = video(1), frames(1)
    before, _ = network(x, grouped(way, original, fast, width=80), layout())
    for latent in range(LATENTS):
        changed = original.clone()
        span = slice(0, 1) if latent == 0 else slice(RATIO * (latent - 1) + 1, RATIO * latent + 1)
        changed[:, span] = frames(1, seed=3)[:, span]
        after, _ = network(x, grouped(way, changed, fast, width=80), layout())
        first = latent + prior_only
        moved = (before - after).abs().amax(dim=(0, 2, 3))
        assert (moved[:first] == 0).all(), (latent, moved)
        assert (moved[first:] > 1e-4).all(), (latent, moved)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_every_parameter(way, fast):
    module = build(way)
    for parameter in module.parameters():  # what begins without effect
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    mask = torch.tensor([[[True], [False], [True]]]).expand(2, -1, -1)
    signal = module(dataclasses.replace(grouped(way, frames(), fast), actions_mask=mask))
    fields = [signal.additive, signal.modulation, signal.context, signal.shift]
    sum((field * torch.randn_like(field)).sum() for field in fields if field is not None).backward()  # type: ignore[union-attr]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("way", ["additive", "adaln"])
def test_zero_init_has_no_effect(way, fast):
    signal = build(way, zero_init=True)(grouped(way, frames(), fast))
    assert not of_latent(signal, 1).any()


def test_motion_by_hand():
    """Sums of a latent's frames, and where its frames are on average; zeros stand before frame 0."""
    actions = torch.zeros(1, 9, 2)
    actions[0, :, 0], actions[0, 4, 1] = 1.0, -3.0
    motion = latent_motion(group_by_latent(actions, RATIO).unsqueeze(2), RATIO)
    assert motion[0, 0, 0].tolist() == [1, 0, 1 / 8, 0]
    assert motion[0, 1, 0].tolist() == [8, -3, 4.5, -3 * 5 / 8]
    pan = Pan(2)
    with torch.no_grad():
        pan.weight.copy_(torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
    assert pan(motion.flatten(1, 2))[0].tolist() == [[0, 0.5 / 8], [-3 * 5 / 8, 0.5 * 5.5]]


def test_dropped_actions_do_not_move_positions(fast):
    module = build("additive_pan")
    assert module.pan is not None
    torch.nn.init.ones_(module.pan.weight)
    mask = torch.tensor([[[True], [False], [True]]])
    shift = module(dataclasses.replace(grouped("additive_pan", frames(1), fast), actions_mask=mask)).shift
    assert shift is not None
    motion = latent_motion(group_by_latent(frames(1), RATIO), RATIO)[0]
    start = motion[0, :ACTIONS].sum()
    assert torch.allclose(shift[0, :, 0], torch.stack((motion[0, ACTIONS:].sum(), start, start + motion[2, 5:].sum())))
    assert module(Conditions()).shift is None


def test_padding_of_fast_tokens_does_not_matter(fast):
    module = build("cross_fast")
    conditions = grouped("cross_fast", frames(), fast)
    wider = grouped("cross_fast", frames(), fast, width=100)
    short, long = module(conditions), module(wider)
    for latent in range(LATENTS):
        assert torch.allclose(of_latent(short, latent), of_latent(long, latent), atol=1e-5)


def test_order_of_fast_tokens_matters(fast):
    """Frequencies come in order, so the same tokens in another order are other actions."""
    module = build("cross_fast")
    conditions = grouped("cross_fast", frames(), fast)
    assert conditions.actions is not None
    swapped = dataclasses.replace(
        conditions, actions=conditions.actions[..., [1, 0, *range(2, conditions.actions.shape[-1])]]
    )
    assert not torch.allclose(of_latent(module(conditions), 2), of_latent(module(swapped), 2), atol=1e-4)


def test_bfloat16_autocast_keeps_times_apart(fast):
    """Times are embedded in float32 whatever the network computes in."""
    module = build("cross")
    plain = module(grouped("cross", frames(), fast))
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(grouped("cross", frames(), fast))
    assert plain.context is not None
    assert cast.context is not None
    assert torch.allclose(plain.context, cast.context.float(), atol=1e-6)


def test_every_yaml_builds():
    root = OmegaConf.create({"data": {"action_dim": ACTIONS}, "encoder": {"actions": {"vocab_size": FAST_VOCAB}}})
    signals = {}
    for name in ("additive", "adaln", "cross", "cross_fast"):
        node = OmegaConf.load(CONF / "network" / "actions" / f"{name}.yaml")
        cfg = OmegaConf.merge(root, {"network": {"actions": node}})
        module = instantiate(cfg.network.actions)(DIM)
        assert isinstance(module, ActionConditioning)
        signals[name] = module.signal
    assert signals == {"additive": "additive", "adaln": "modulation", "cross": "context", "cross_fast": "context"}
    encoder = instantiate(OmegaConf.load(CONF / "encoder" / "actions" / "fast.yaml"))
    assert isinstance(encoder, FastActionsEncoder)


def test_refused(fast):
    floats = grouped("cross", frames(), fast)
    for way in ("additive", "cross"):
        wrong = Conditions(actions=torch.zeros(1, 3, 1, 7))
        with pytest.raises(ConfigError, match="brings 7 action numbers"):
            build(way)(wrong)
        with pytest.raises(ConfigError, match="of torch.int64"):
            build(way)(Conditions(actions=torch.zeros(1, 3, 1, ACTIONS * RATIO, dtype=torch.int64)))
        with pytest.raises(ConfigError, match="no action columns"):
            WAYS[way](DIM, action_dim=None, ratio_time=RATIO)
    with pytest.raises(ConfigError, match="`network.actions.into`"):
        PerLatentActions(DIM, action_dim=1, ratio_time=8, into="cross")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Change `encoder/actions` to fast"):
        build("cross_fast")(floats)
    with pytest.raises(ConfigError, match="FAST tokens go up to 200"):
        build("cross_fast")(Conditions(actions=torch.full((1, 1, 1, 3), FAST_VOCAB)))
    with pytest.raises(ConfigError, match="Raise `network.actions.max_tokens`"):
        build("cross_fast", max_tokens=5)(Conditions(actions=torch.zeros(1, 1, 1, 6, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="`network.actions.num_heads`"):
        FastActions(DIM, action_dim=1, ratio_time=8, vocab_size=9, num_heads=5)
    with pytest.raises(ConfigError, match="`network.actions.totals`"):
        build("cross_totals")(dataclasses.replace(floats, motion=None))
    with pytest.raises(ConfigError, match="`network.rope`"):
        make("one_axis", actions=partial(PerLatentActions, action_dim=ACTIONS, ratio_time=RATIO, pan=True))
