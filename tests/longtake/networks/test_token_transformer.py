"""Decoding equals the training pass, nothing sees the future, and the plain network is Llama."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError, DataError
from longtake.networks.action_motion import latent_motion
from longtake.networks.token_transformer import TokenTransformer
from longtake.types import Conditions
from tests.longtake.networks.tiny_tokens import GRID, PLAIN, RATIO, VARIANTS, VOCAB, conditions, layout, make, video

PER_LAT = GRID[1] * GRID[2]


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def whole(network: TokenTransformer, x: Tensor, told: Conditions) -> Tensor:
    """Hidden states of the training pass [b n d], the first one that predicts a token included."""
    with torch.no_grad():
        hidden, _ = network(x, told, layout(x.shape[1], x.shape[2]))
    return hidden.flatten(1, 2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_single_steps_equal_one_pass(name: str, packed: bool) -> None:
    network, x, told = make(name), video(2), conditions(name, 2)
    expected = whole(network, x, told)
    ids, start = x.flatten(1), 2 * PER_LAT - 3
    window = network.decoder(told, batch=2, packed=network.pack() if packed else None)
    hidden = [window.prefill(ids[:, :start])]
    hidden += [window.step(ids[:, i : i + 1])[:, 0] for i in range(start, ids.shape[1] - 1)]
    decoded = torch.stack(hidden, dim=1)
    assert gap(decoded, expected[:, start:]) < 1e-5
    with torch.no_grad():
        assert gap(window.logits(decoded), network.head.logits(expected[:, start:])) < 1e-5


@pytest.mark.parametrize("name", ["base", "bov", "video2world_wide", "adaln", "action_keys"])
def test_unequal_starts_equal_one_by_one(name: str) -> None:
    network, x, told = make(name), video(4), conditions(name, 4)
    ids, starts, steps = x.flatten(1), [PER_LAT, 2 * PER_LAT, 7, 2 * PER_LAT - 1], 9
    window = network.decoder(told, batch=4, packed=network.pack())
    together = [window.prefill(ids[:, : max(starts)], starts)]
    for i in range(steps):
        column = torch.stack([ids[row, start + i] for row, start in enumerate(starts)])
        together.append(window.step(column[:, None])[:, 0])
    for row, start in enumerate(starts):
        alone = network.decoder(told.map(lambda t, row=row: t[row : row + 1]), batch=1)
        hidden = [alone.prefill(ids[row : row + 1, :start])]
        hidden += [alone.step(ids[row : row + 1, start + i : start + i + 1])[:, 0] for i in range(steps)]
        assert gap(torch.stack(together, 1)[row], torch.stack(hidden, 1)[0]) < 1e-5


@pytest.mark.parametrize("name", ["bov", "action_keys", "adaln"])
def test_rejected_tokens_leave_no_trace(name: str) -> None:
    network, x, told = make(name), video(3), conditions(name, 3)
    ids, start = x.flatten(1), PER_LAT + 5
    expected = whole(network, x, told)
    window = network.decoder(told, batch=3)
    window.prefill(ids[:, :start])
    drafts = ids[:, start : start + 6].clone()
    drafts[0, 2:] += 1
    drafts[1, 4:] += 7
    hidden = window.step(drafts % VOCAB)
    kept = [2, 4, 6]
    for row, count in enumerate(kept):
        assert gap(hidden[row, :count], expected[row, start + 1 : start + 1 + count]) < 1e-5
    window.truncate([length - 6 + count for length, count in zip(window.cache.lengths, kept, strict=True)])
    for i in range(3):
        column = torch.stack([ids[row, start + count + i] for row, count in enumerate(kept)])
        after = window.step(column[:, None])[:, 0]
        for row, count in enumerate(kept):
            assert gap(after[row], expected[row, start + count + i + 1]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_streaming_by_latent_equals_one_pass(name: str) -> None:
    network, x, told = make(name), video(2), conditions(name, 2)
    expected = whole(network, x, told)
    memory = network.decoder(told, batch=2)
    parts = []
    for k in range(3):
        slot = layout(3).slots[k]
        one = type(layout(3))((slot,), layout(3).grid, "past", "causal")
        with torch.no_grad():
            hidden, memory = network(x[:, k : k + 1], told, one, memory)
        parts.append(hidden[:, 0])
    assert gap(torch.cat(parts, dim=1), expected) < 1e-5


def test_views_follow_each_other_in_a_latent() -> None:
    network, x = make("bov"), video(1, views=2)
    expected = whole(network, x, Conditions())
    window = network.decoder(Conditions(), batch=1, views=2)
    ids = x.flatten(1)
    decoded = torch.cat((window.prefill(ids[:, :5])[:, None], window.step(ids[:, 5:-1])), dim=1)
    assert gap(decoded, expected[:, 5:]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_no_future_leakage(name: str) -> None:
    """Changing token i and the actions of later latents changes nothing that predicts tokens up to i."""
    network, x, told = make(name), video(1), conditions(name, 1)
    before = whole(network, x, told)
    for place in (PER_LAT - 1, PER_LAT, PER_LAT + 6):
        changed = x.clone().flatten(1)
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = whole(network, changed.view(x.shape), told)
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        if place + 1 < 3 * PER_LAT:
            assert not torch.equal(after[:, place + 1], before[:, place + 1])
    if told.actions is not None:
        later = told.actions.clone()
        later[:, 2] += 1
        motion = latent_motion(later, RATIO)
        changed = Conditions(actions=later, motion=motion, text_emb=told.text_emb, text_mask=told.text_mask)
        after = whole(network, x, changed)
        assert gap(after[:, : 2 * PER_LAT], before[:, : 2 * PER_LAT]) < 1e-6
        changes = (after - before)[:, 2 * PER_LAT :].abs().amax(dim=-1)
        assert bool((changes > 1e-4).all())  # its first token knows the actions too


def test_without_bov_nothing_predicts_the_first_token() -> None:
    network = make("base")
    assert not network.bov
    assert bool((whole(network, video(2), Conditions())[:, 0] == 0).all())
    with_bov = make("bov")
    assert with_bov.embedding.table.num_embeddings == 704
    assert bool((whole(with_bov, video(2), Conditions())[:, 0] != 0).any())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_plain_network_is_llama(kv_heads: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=96,
            num_hidden_layers=3,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=24,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
    ).eval()
    network = make("one_axis", num_kv_heads=kv_heads)
    theirs = peer.state_dict()
    ours = {"embedding.table.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    ours["head.output.weight"] = theirs["lm_head.weight"]
    for i in range(3):
        layer, names = f"model.layers.{i}.", f"layers.{i}."
        attention = [theirs[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
        ours[f"{names}qkv.weight"] = torch.cat(attention)
        ours[f"{names}out.weight"] = theirs[f"{layer}self_attn.o_proj.weight"]
        mlp = [theirs[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours[f"{names}gate_up.weight"] = torch.cat(mlp)
        ours[f"{names}down.weight"] = theirs[f"{layer}mlp.down_proj.weight"]
        ours[f"{names}attn_norm.weight"] = theirs[f"{layer}input_layernorm.weight"]
        ours[f"{names}ffn_norm.weight"] = theirs[f"{layer}post_attention_layernorm.weight"]
    network.load_state_dict(ours)
    x = video(2)
    with torch.no_grad():
        expected = peer(x.flatten(1)).logits
        logits = network.head.logits(whole(network, x, Conditions()))
    assert gap(logits[:, 1:], expected[:, :-1]) < 1e-5


def test_gradients_reach_every_parameter_that_counts() -> None:
    for name in VARIANTS:
        network, x, told = make(name).train(), video(3), conditions(name, 3)
        hidden, _ = network(x, told, layout())
        scores = network.head.score(hidden[:, 1:], x.flatten(2)[:, 1:])
        (scores.log_probs.mean() + 1e-4 * scores.z.mean()).backward()
        without = [n for n, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
        assert [n for n in without if not n.startswith("actions.")] == [], name


def test_bad_input_is_named() -> None:
    network = make("base")
    with pytest.raises(DataError, match="from 0 to 640"):
        network(torch.tensor([0, 640]).repeat(24).view(1, 3, 1, 1, 4, 4), Conditions(), layout())
    with pytest.raises(ConfigError, match="4 x 5"):
        network(torch.zeros(1, 1, 1, 1, 4, 5, dtype=torch.int64), Conditions(), layout(1))
    with pytest.raises(ConfigError, match="network.cross_attn_every"):
        make("video2world").decoder(Conditions(), batch=1)
    with pytest.raises(ConfigError, match="2 latent frames"):
        make("additive").decoder(conditions("additive", 1, num_lat=2), batch=1)
    for change, words in [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"rope": "2d"}, "network.rope"),
        ({"rope": "1d", "yarn": {"scale": 2.0, "original": (1, 2, 3)}}, "network.yarn"),
        ({"embedding_factors": (10, 10)}, "embedding_factors"),
        ({"grid_lat": (3, 0, 4)}, "grid_lat"),
        ({"actions": VARIANTS["action_keys"]["actions"]}, "cross_attn_every"),
    ]:
        with pytest.raises(ConfigError, match=words):
            TokenTransformer(**{**PLAIN, **change})


def test_a_full_cache_is_refused() -> None:
    window = make("base").decoder(Conditions(), batch=1)
    window.prefill(video(1).flatten(1))
    with pytest.raises(ValueError, match="do not fit a cache of 48"):
        window.step(torch.zeros(1, 1, dtype=torch.int64))
