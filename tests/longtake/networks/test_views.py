"""Several views: order does not matter, absent ones are not seen, and neighbours are those of the rig."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from longtake.errors import ConfigError
from longtake.networks.attention import BlockCausalAttention, FullAttention
from longtake.networks.conditioning import TextEmbedding
from longtake.networks.lact import LaCT
from longtake.networks.layout import ChunkLayout
from longtake.networks.video_dit import VideoDiT
from longtake.networks.views import CrossViews, neighbour_table
from longtake.types import Conditions
from tests.longtake.networks.several_views import DESIGNS, RIG, RING, drawn, latents_of, network_of, predicted
from tests.longtake.networks.tiny import difference, tiny_network

BOTH = pytest.mark.parametrize("design", list(DESIGNS))


@BOTH
def test_permuting_views_with_their_ids_permutes_outputs(design: str) -> None:
    network = network_of(design, text=partial(TextEmbedding, text_dim=12))
    order = torch.tensor([2, 0, 3, 1])
    ids = torch.arange(4)[None]
    text, index = drawn(1, 4, 5, 12), torch.arange(4)[None, None]  # every view has a caption of its own
    x = latents_of([[0, 1, 2, 3]])
    straight = predicted(network, x, view_ids=ids, text_emb=text, text_index=index)
    permuted = predicted(network, x[:, :, order], view_ids=ids[:, order], text_emb=text, text_index=index[..., order])
    assert difference(permuted, straight[:, :, order]) < 1e-12
    without_ids = predicted(network, x[:, :, order], view_ids=ids, text_emb=text, text_index=index[..., order])
    assert difference(without_ids, straight[:, :, order]) > 1e-3  # it does matter which view is which


@BOTH
def test_a_caption_reaches_its_own_view_first(design: str) -> None:
    network = network_of(design, text=partial(TextEmbedding, text_dim=12), num_layers=1)
    x, ids, index = latents_of([[0, 1, 2, 3]]), torch.arange(4)[None], torch.arange(4)[None, None]
    text = drawn(1, 4, 5, 12)
    other = text.clone()
    other[:, 2] += 1
    told = {"view_ids": ids, "text_index": index}
    change = predicted(network, x, text_emb=other, **told) - predicted(network, x, text_emb=text, **told)
    assert change[:, :, 2].abs().max() > 1e-3
    assert change[:, :, [0, 1, 3]].abs().max() == 0  # after the only block's self-attention there is no way to others


@BOTH
@pytest.mark.parametrize("mixer", [FullAttention, LaCT], ids=["full", "lact"])
def test_absent_views_are_not_seen(design: str, mixer: type) -> None:
    network = network_of(design, mixer=mixer)
    x = latents_of([[0, 1, 2, 3], [0, 1, 2, 3]])
    told = {"view_ids": torch.arange(4).expand(2, 4)}
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])
    before = predicted(network, x, view_mask=mask, **told)
    changed = torch.where(mask[:, None, :, None, None, None, None], x, 3 * x + 1)
    after = predicted(network, changed, view_mask=mask, **told)
    assert torch.equal(after[0][:, mask[0]], before[0][:, mask[0]])
    assert torch.equal(after[1][:, mask[1]], before[1][:, mask[1]])
    everybody = predicted(network, changed, **told)
    assert difference(everybody[0][:, mask[0]], before[0][:, mask[0]]) > 1e-3


@BOTH
def test_absent_is_the_same_as_never_there(design: str) -> None:
    network = network_of(design)
    mask = torch.tensor([[True, False, True, True]])
    masked = predicted(network, latents_of([[0, 1, 2, 3]]), view_ids=torch.arange(4)[None], view_mask=mask)
    fewer = predicted(network, latents_of([[0, 2, 3]]), view_ids=torch.tensor([[0, 2, 3]]))
    assert difference(masked[:, :, [0, 2, 3]], fewer) < 1e-12


@BOTH
def test_a_sample_without_views_stays_finite(design: str) -> None:
    x, mask = latents_of([[0, 1], [0, 1]]), torch.tensor([[True, True], [False, False]])
    out = predicted(network_of(design), x, view_ids=torch.arange(2).expand(2, 2), view_mask=mask)
    assert torch.isfinite(out).all()


@BOTH
def test_one_model_serves_one_to_all_views(design: str) -> None:
    network = network_of(design)
    for count in (1, 2, 4):
        x = latents_of([list(range(count))])
        assert predicted(network, x, view_ids=torch.arange(count)[None]).shape == x.shape


def test_fast_weights_do_not_learn_from_absent_views() -> None:
    """Over three chunks, so that what was written is read, and momentum, which begins with the second, counts too."""
    network = network_of("channels", mixer=partial(LaCT, momentum=True))
    x = latents_of([[0, 1, 2]], slots=5)
    layout = ChunkLayout.teacher_forcing(3, 1, network.grid(x.shape))
    sigma = torch.tensor([0.5, 0.0, 0.7, 0.0, 0.6], dtype=x.dtype).view(1, 5, 1, 1)
    told = Conditions(view_ids=torch.arange(3)[None], view_mask=torch.tensor([[True, True, False]]))
    other = x.clone()
    other[:, layout.contexts, 2] += drawn(*x[:, layout.contexts, 2].shape, seed=1)  # the absent view of the contexts
    with torch.no_grad():
        one, two = (network(part, sigma, told, layout)[0] for part in (x, other))
        seen, also = (network(part, sigma, Conditions(view_ids=told.view_ids), layout)[0] for part in (x, other))
    assert torch.equal(one[:, :, :2], two[:, :, :2])
    assert difference(seen[:, 2, :2], also[:, 2, :2]) > 1e-4


@pytest.mark.parametrize("mixer", [BlockCausalAttention, LaCT], ids=["block_causal", "lact"])
@BOTH
def test_a_rollout_of_several_views_is_the_training_pass(design: str, mixer: type) -> None:
    network = network_of(design, mixer=mixer)
    x = latents_of([[0, 1, 3], [2, 1, 0]], slots=3)
    ids, mask = torch.tensor([[0, 1, 3], [2, 1, 0]]), torch.tensor([[True, True, False], [True, True, True]])
    told = Conditions(view_ids=ids, view_mask=mask)
    sigma = torch.tensor([0.5, 0.0, 0.7], dtype=x.dtype).view(1, 3, 1, 1).expand(2, -1, -1, -1)
    grid = network.grid(x.shape)
    with torch.no_grad():
        whole, _ = network(x, sigma, told, ChunkLayout.teacher_forcing(2, 1, grid))
        memory = network.empty_memory()
        first, memory = network(x[:, :1], sigma[:, :1], told, ChunkLayout.stream(0, grid, False), memory)
        both, memory = network(x[:, 1:], sigma[:, 1:], told, ChunkLayout.stream(1, grid, True), memory)
        again, _ = network(x[:, 2:], sigma[:, 2:], told, ChunkLayout.stream(1, grid, False), memory)
    for found, wanted in ((first, whole[:, :1]), (both[:, 1:], whole[:, 2:]), (again, whole[:, 2:])):
        assert difference(found[mask[:, None].expand(-1, 1, -1)], wanted[mask[:, None].expand(-1, 1, -1)]) < 1e-9


def test_cross_view_attention_sees_neighbours_at_the_same_frame_only() -> None:
    network = network_of("cross", num_layers=1)
    x, ids = latents_of([[0, 1, 2, 3]]), torch.arange(4)[None]
    before = predicted(network, x, view_ids=ids)
    other = x.clone()
    other[:, :, 2, 1] += 1  # the rear view, its second latent frame
    change = (predicted(network, other, view_ids=ids) - before).abs().amax(dim=(0, 1, 4, 5, 6))  # [v f]
    assert (change[2] > 1e-6).all()  # itself, through its own attention
    for view, name in enumerate(RIG["views"]):
        if view != 2:
            assert (change[view, 1] > 1e-6) == ("rear" in RING[name]), name


def test_the_untrained_cross_network_is_a_network_of_single_views() -> None:
    torch.manual_seed(0)
    settings = {"dim": 80, "ffn_dim": 96, "num_heads": 4, "num_layers": 2, "in_channels": 4, "freq_dim": 32}
    network = VideoDiT(mixer=FullAttention, views=DESIGNS["cross"], **settings).double()
    torch.nn.init.normal_(network.head.head.weight)
    ids, x = torch.arange(3)[None], latents_of([[0, 1, 2]])
    together = predicted(network, x, view_ids=ids)
    for view in range(3):
        alone = predicted(network, x[:, :, view : view + 1], view_ids=ids[:, view : view + 1])
        assert difference(together[:, :, view : view + 1], alone) < 1e-12
    block = network.blocks[0]
    assert torch.equal(block.cross_view.qkv.weight, block.self_attn.qkv.weight)  # type: ignore[union-attr]


def test_without_views_nothing_changes() -> None:
    """The same draws, the same names, the same bits: a network for one view is what it was."""
    plain = tiny_network(FullAttention, text=None, actions=None, frame_rate=None)
    x = latents_of([[0]])
    told = {"view_ids": torch.zeros(1, 1, dtype=torch.int64)}
    assert torch.equal(predicted(plain, x, **told), predicted(plain, x))
    assert not any("view" in name or "control" in name for name in plain.state_dict())
    assert plain.patch_embedding.in_channels == 4


def test_the_given_channel_says_which_latents_are_clean() -> None:
    network = network_of("channels", given_channel=True)
    assert network.patch_embedding.in_channels == 4 + 1 + 7
    x = latents_of([[0, 1]])
    extra = network._extra_channels(
        x, torch.tensor([[[[0.0, 0.5]]]], dtype=x.dtype), Conditions(view_ids=torch.tensor([[0, 1]]))
    )
    assert extra is not None
    assert (extra[:, :, :, 0, 0] == 1).all()
    assert (extra[:, :, :, 1, 0] == 0).all()


@pytest.mark.parametrize(
    ("neighbours", "words"),
    [
        ({**RING, "rear": ["top"]}, "unknown view"),
        ({**RING, "rear": ["rear"]}, "rear has itself"),
        ({"front": ["rear"]}, "right has no list"),
    ],
)
def test_bad_neighbours_are_named(neighbours: dict[str, list[str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CrossViews(16, rig=RIG, neighbours=neighbours)


def test_more_views_than_the_rig_has_are_refused() -> None:
    x = torch.zeros(1, 1, 5, 1, 4, 4, 4, dtype=torch.float64)
    with pytest.raises(ConfigError, match="5 views"):
        predicted(network_of("channels"), x, view_ids=torch.arange(5)[None])
    with pytest.raises(ConfigError, match="ids of none"):
        predicted(network_of("channels"), latents_of([[0]]))


def test_the_rig_of_the_game_has_the_neighbours_of_the_reference() -> None:
    """`conf/network/views/cross.yaml` over `conf/rig/doom7.yaml`: symmetric, and a ring with the telephoto camera."""
    conf = Path(__file__).resolve().parents[3] / "conf"
    names = tuple(yaml.safe_load((conf / "rig" / "doom7.yaml").read_text())["views"])
    table = neighbour_table(
        names, yaml.safe_load((conf / "network" / "views" / "cross.yaml").read_text())["neighbours"]
    )
    assert torch.equal(table, table.T)
    assert names == ("front_wide", "cross_right", "rear_right", "rear", "rear_left", "cross_left", "front_tele")
    assert table.sum(dim=1).tolist() == [3, 2, 2, 2, 2, 2, 1]
