"""Noise level, frame rate, actions and text."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.conditioning import ActionEmbedding, FrameRateEmbedding, TextEmbedding, sinusoid
from longtake.networks.lact import LaCT
from longtake.networks.layout import ChunkLayout
from longtake.networks.video_dit import VideoDiT
from longtake.types import Conditions
from tests.longtake.networks.tiny import difference, tiny_grid, tiny_network, tiny_sequence


def test_sinusoid_is_cosine_first_and_takes_any_number() -> None:
    out = sinusoid(torch.tensor([0.0, 937.5], dtype=torch.float64), 8, torch.float64)
    assert out[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    for i in range(4):
        angle = 937.5 * 10000 ** (-i / 4)
        assert out[1, i].item() == pytest.approx(math.cos(angle), abs=1e-12)
        assert out[1, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-12)


def network_and_inputs(**changes: object) -> tuple[VideoDiT, Tensor, Tensor, Conditions, ChunkLayout]:
    network, sequence = tiny_network(LaCT, **changes), tiny_sequence(chunks=2)
    layout = ChunkLayout.teacher_forcing(2, 1, tiny_grid(sequence))
    return network, *sequence.slots(layout), layout


def moved(network: VideoDiT, x: Tensor, sigma: Tensor, a: Conditions, b: Conditions, layout: ChunkLayout) -> float:
    with torch.no_grad():
        return difference(network(x, sigma, a, layout)[0], network(x, sigma, b, layout)[0])


@pytest.mark.parametrize("into", ["modulation", "tokens"])
def test_actions_reach_their_latent_frame(into: str) -> None:
    network, x, sigma, given, layout = network_and_inputs(actions=partial(ActionEmbedding, action_dim=3, into=into))
    assert given.actions is not None
    actions = given.actions.clone()
    actions[:, 0, 1] += 1
    changed = Conditions(**{**vars(given), "actions": actions})
    with torch.no_grad():
        before, after = (network(x, sigma, c, layout)[0] for c in (given, changed))
    change = (after - before).abs().amax(dim=(0, 2, 4, 5, 6))  # [s f]
    assert change[0].argmax() == 1  # its own latent frame most, the others through attention
    assert change[0].min() > 0
    assert change[1:].max() == 0  # slot 0 is a target, which nobody sees


@pytest.mark.parametrize("into", ["modulation", "tokens"])
def test_dropped_actions_are_as_if_there_were_none(into: str) -> None:
    network, x, sigma, given, layout = network_and_inputs(actions=partial(ActionEmbedding, action_dim=3, into=into))
    assert given.actions is not None
    none = Conditions(**{**vars(given), "actions": None})
    dropped = torch.zeros(given.actions.shape[:3], dtype=torch.bool)
    masked = Conditions(**{**vars(given), "actions_mask": dropped})
    assert moved(network, x, sigma, masked, none, layout) < 1e-12
    assert moved(network, x, sigma, given, none, layout) > 1e-3
    zeros = Conditions(**{**vars(given), "actions": torch.zeros_like(given.actions)})
    assert moved(network, x, sigma, zeros, none, layout) > 1e-3  # standing still is not the same as not knowing
    dropped[0] = True
    half = Conditions(**{**vars(given), "actions_mask": dropped})
    with torch.no_grad():
        outs = [network(x, sigma, c, layout)[0] for c in (half, given, none)]
    assert torch.equal(outs[0][0], outs[1][0])
    assert difference(outs[0][1], outs[2][1]) < 1e-12


def test_totals_are_the_sums_since_the_first_frame_of_the_slot() -> None:
    torch.manual_seed(0)
    plug = ActionEmbedding(8, action_dim=2, ratio_time=4, totals=True)
    actions = torch.randn(1, 2, 3, 8)
    per_frame = actions.unflatten(-1, (4, 2))
    wanted = torch.stack([per_frame[:, :, : f + 1].sum(dim=(2, 3)) / 12 for f in range(3)], dim=2)
    told = torch.cat([actions, wanted], dim=-1)
    torch.testing.assert_close(plug(Conditions(actions=actions)).squeeze(2), plug.mlp(told))
    without = ActionEmbedding(8, action_dim=2, ratio_time=4)
    assert without.mlp[0].in_features == 8  # type: ignore[union-attr]
    assert plug.mlp[0].in_features == 10  # type: ignore[union-attr]


def test_zero_init_has_no_effect_at_first() -> None:
    torch.manual_seed(0)
    plug = ActionEmbedding(8, action_dim=2, ratio_time=4, zero_init=True)
    out = plug(Conditions(actions=torch.randn(1, 2, 3, 8)))
    assert out.shape == (1, 2, 1, 3, 8)
    assert out.abs().max() == 0
    assert FrameRateEmbedding(8)(Conditions(fps=torch.tensor([12.0]))).abs().max() == 0


def test_frame_rate() -> None:
    network, x, sigma, given, layout = network_and_inputs()
    faster = Conditions(**{**vars(given), "fps": 2 * given.fps})  # type: ignore[operator]
    absent = Conditions(**{**vars(given), "fps": None})
    dropped = Conditions(**{**vars(given), "fps": 0 * given.fps})  # type: ignore[operator]
    assert moved(network, x, sigma, faster, given, layout) > 1e-4
    assert moved(network, x, sigma, dropped, absent, layout) < 1e-12


def test_padding_of_a_text_does_not_count() -> None:
    network, x, sigma, given, layout = network_and_inputs()
    assert given.text_emb is not None
    assert given.text_mask is not None
    noise = given.text_emb + torch.randn_like(given.text_emb) * ~given.text_mask.unsqueeze(-1)
    assert moved(network, x, sigma, Conditions(**{**vars(given), "text_emb": noise}), given, layout) == 0


def test_dropped_text_is_as_if_there_were_none() -> None:
    network, x, sigma, given, layout = network_and_inputs()
    none = Conditions(actions=given.actions, fps=given.fps)
    masked = Conditions(**{**vars(given), "text_mask": torch.zeros_like(given.text_mask)})  # type: ignore[arg-type]
    assert moved(network, x, sigma, masked, none, layout) < 1e-12
    assert moved(network, x, sigma, given, none, layout) > 1e-3


def test_each_slot_and_view_is_told_its_own_text() -> None:
    network, sequence = tiny_network(LaCT), tiny_sequence(chunks=2, views=2)
    layout = ChunkLayout.teacher_forcing(2, 1, tiny_grid(sequence))
    x, sigma, given = sequence.slots(layout)
    every = [Conditions(**{**vars(given), "text_index": torch.full_like(given.text_index, n)}) for n in (0, 1)]  # type: ignore[arg-type]
    text0 = Conditions(**{**vars(given), "text_index": None})
    with torch.no_grad():
        out0, out1, implied, own = (network(x, sigma, c, layout)[0] for c in (*every, text0, given))
    assert difference(implied, out0) < 1e-12
    assert difference(out1, out0) > 1e-3
    alone = [i for i, slot in enumerate(layout.slots) if slot.chunk == 0 and slot.role == "target"]
    assert given.text_index is not None
    for b in range(2):
        for s in alone:
            views = given.text_index[b, s].tolist()
            if len(set(views)) == 1:
                assert difference(own[b, s], (out0, out1)[views[0]][b, s]) < 1e-12


def test_word_ids_have_a_table_in_the_network() -> None:
    network, x, sigma, _, layout = network_and_inputs(text=partial(TextEmbedding, text_dim=12, vocab_size=9))
    ids = torch.tensor([[[1, 2, 3, 0]], [[4, 5, 0, 0]]])
    told = Conditions(text_ids=ids, text_mask=ids > 0)
    other = Conditions(text_ids=ids.clone().index_fill_(2, torch.tensor([1]), 7), text_mask=ids > 0)
    padded = Conditions(
        text_ids=torch.nn.functional.pad(ids, (0, 3), value=8), text_mask=torch.nn.functional.pad(ids > 0, (0, 3))
    )
    assert moved(network, x, sigma, other, told, layout) > 1e-4
    assert moved(network, x, sigma, padded, told, layout) < 1e-12
    out, _ = network(x, sigma, told, layout)
    out.square().sum().backward()
    assert network.text is not None
    assert network.text.words is not None
    touched = network.text.words.weight.grad.abs().amax(dim=1) > 0  # type: ignore[union-attr]
    assert touched.tolist() == [False, True, True, True, True, True, False, False, False]


def test_a_network_without_text() -> None:
    network, x, sigma, given, layout = network_and_inputs(text=None)
    assert all("cross_attn" not in name and "norm3" not in name for name in network.state_dict())
    assert moved(network, x, sigma, Conditions(actions=given.actions, fps=given.fps), given, layout) == 0


@pytest.mark.parametrize(
    ("changes", "conditions", "key"),
    [
        (
            {"text": partial(TextEmbedding, text_dim=12, vocab_size=9)},
            {"text_emb": torch.zeros(2, 1, 3, 12)},
            "encoder/text",
        ),
        ({}, {"text_ids": torch.zeros(2, 1, 3, dtype=torch.int64)}, "encoder/text"),
        ({"text": partial(TextEmbedding, text_dim=12, attends_padding=True)}, {}, "encoder/text"),
        ({}, {"actions": torch.zeros(2, 3, 3, 5)}, r"network\.actions\.action_dim"),
    ],
    ids=["ids wanted", "embeddings wanted", "a text wanted", "other actions"],
)
def test_conditions_that_do_not_fit(changes: dict, conditions: dict, key: str) -> None:
    network, x, sigma, _, layout = network_and_inputs(**changes)
    with pytest.raises(ConfigError, match=key):
        network(x, sigma, Conditions(**conditions), layout)


@pytest.mark.parametrize("action_dim", [None, 0])
def test_a_network_with_actions_needs_data_with_actions(action_dim: int | None) -> None:
    with pytest.raises(ConfigError, match="network.actions=null"):
        ActionEmbedding(8, action_dim=action_dim)
    with pytest.raises(ConfigError, match=r"network\.actions\.into"):
        ActionEmbedding(8, action_dim=2, into="values")  # type: ignore[arg-type]


def test_branches_of_guidance_are_stacked() -> None:
    given = Conditions(text_emb=torch.randn(2, 1, 3, 4), actions=torch.randn(2, 1, 3, 5))
    mask = torch.zeros(2, 1, 3, dtype=torch.bool)
    both = Conditions.stack([given, Conditions(**{**vars(given), "text_mask": mask})])
    assert both.text_mask is not None
    assert both.text_mask[:2].all()
    assert not both.text_mask[2:].any()
    assert both.actions_mask is not None
    assert both.actions is not None
    assert both.actions.shape[0] == 4
    assert Conditions.stack([given, given]).text_mask is None
    with pytest.raises(AssertionError, match="actions"):
        Conditions.stack([given, Conditions(text_emb=given.text_emb)])


def test_texts_are_padded_to_their_length_and_never_cut() -> None:
    text = TextEmbedding(8, text_dim=4, text_len=3, attends_padding=True)
    assert text(Conditions(text_emb=torch.randn(1, 1, 2, 4)), 1)[0].shape == (1, 1, 3, 8)
    with pytest.raises(ConfigError, match=r"4 embeddings, the network takes 3.*`encoder\.text\.max_length`"):
        text(Conditions(text_emb=torch.randn(1, 1, 4, 4)), 1)
