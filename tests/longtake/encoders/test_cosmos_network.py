"""The Cosmos DV network: published sizes, its layers against plain 3-D operations, causality, and pieces of a clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.encoders.cosmos_layers import Attention, Convolution, Downsample, Past, Upsample
from longtake.encoders.cosmos_network import CosmosNetwork
from longtake.errors import ConfigError
from tests.first_stage import random_blocks, random_tokens_network

VARIANTS: list[dict[str, Any]] = [
    {"channels_mult": [1, 1, 2], "legacy": False},
    {"channels_mult": [1, 1, 2], "legacy": True},
    {"channels_mult": [1, 1, 2], "legacy": False, "ratio_space": 16},
    {"channels_mult": [1, 1, 2], "legacy": True, "ratio_space": 16},
    {"channels_mult": [1, 1, 2], "legacy": False, "ratio_time": 4, "patch_size": 2},
    {"legacy": True, "temporal_attention": False},
]


@pytest.mark.parametrize(
    ("settings", "total", "of_encoder"),
    [({"ratio_space": 16}, 110_898_294, 45_537_158), ({"ratio_space": 8}, 105_653_366, 42_914_694)],
)
def test_published_sizes(settings: dict[str, Any], total: int, of_encoder: int) -> None:
    with torch.device("meta"):
        network = CosmosNetwork(**settings)
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    parts = (network.encoder, network.quant_conv)
    assert sum(parameter.numel() for part in parts for parameter in part.parameters()) == of_encoder


@pytest.mark.parametrize(
    ("legacy", "ratio_space", "expected"),
    [
        (False, 16, {2: "space", 1: "both"}),
        (False, 8, {2: "nothing", 1: "both"}),
        (True, 16, {2: "both", 1: "space"}),
        (True, 8, {2: "both", 1: "nothing"}),
    ],
)
def test_where_the_decoder_upsamples(legacy: bool, ratio_space: int, expected: dict[int, str]) -> None:
    with torch.device("meta"):
        names = CosmosNetwork(legacy=legacy, ratio_space=ratio_space).state_dict()
    found = {}
    for level in (2, 1):
        time, space, last = (f"decoder.up.{level}.upsample.conv{i}.conv3d.weight" in names for i in (1, 2, 3))
        assert last == (time or space)
        found[level] = {(True, True): "both", (False, True): "space", (False, False): "nothing"}[time, space]
    assert found == expected
    assert ("encoder.down.1.downsample.conv1.conv3d.weight" in names) == (ratio_space == 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_depends_on_what_follows(variant: dict[str, Any]) -> None:
    network, video = random_tokens_network(**variant), random_blocks(17, b=2, height=32, width=48)[:, 0]
    ratio, space = network.ratio_time, network.ratio_space
    tokens, _ = network.encode(video)
    assert tokens.shape == (2, 1 + 16 // ratio, 32 // space, 48 // space)
    assert len(tokens.unique()) > 5  # else nothing below says anything
    features, (frames, _) = network.features(video, Past()), network.decode(tokens)
    assert frames.shape == video.shape
    for num_lat in (1, 2):
        num_px = 1 + (num_lat - 1) * ratio
        prefix = network.features(video[:, :num_px], Past())
        torch.testing.assert_close(prefix, features[:, :num_lat], rtol=0, atol=2e-5 * float(features.abs().max()))
        early = network.decode(tokens[:, :num_lat])[0]
        torch.testing.assert_close(early, frames[:, :num_px], rtol=0, atol=2e-5 * float(frames.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_latents_change_later_frames_only(variant: dict[str, Any]) -> None:
    network = random_tokens_network(**variant)
    space, ratio = network.ratio_space, network.ratio_time
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64000, (1, 3, 32 // space, 48 // space), generator=generator)
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 777) % 64000
    before, after = network.decode(tokens)[0], network.decode(changed)[0]
    difference = (before - after).abs()
    assert difference[:, :1].max() < 1e-4 * before.abs().max()
    assert difference[:, 1 : 1 + ratio].max() > 1e-3 * before.abs().max()
    assert difference[:, 1 + ratio :].max() > 1e-3 * before.abs().max()  # the decoder looks back


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_a_clip_are_what_the_whole_is(variant: dict[str, Any]) -> None:
    network, video = random_tokens_network(**variant), random_blocks(17, b=2, height=32, width=48)[:, 0]
    ratio, past = network.ratio_time, Past()
    whole = network.features(video, past)
    state, parts = None, []
    for begin, end in ((0, 1), (1, 1 + ratio), (1 + ratio, 17)):
        piece = Past(state)
        parts.append(network.features(video[:, begin:end], piece))
        state = piece.state
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5 * float(whole.abs().max()))
    assert [part.shape for part in state] == [part.shape for part in past.state]


def plain(layer: Convolution, x: Tensor, padding: tuple[int, ...], stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """Returns what the convolution of torch makes of [n t c h w after padding]."""
    padded = F.pad(x.permute(0, 4, 1, 2, 3), padding)
    return F.conv3d(padded, layer.conv3d.weight, layer.conv3d.bias, stride).permute(0, 2, 3, 4, 1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def test_convolutions_are_those_of_torch(x: Tensor) -> None:
    space, time, pixel = (Convolution(8, 12, kernel) for kernel in ((1, 3, 3), (3, 1, 1), (1, 1, 1)))
    torch.testing.assert_close(space(x, Past()), plain(space, x, (1, 1, 1, 1, 0, 0)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pixel(x, Past()), plain(pixel, x, (0,) * 6), rtol=1e-5, atol=1e-5)
    first_thrice = torch.cat([x[:, :1], x[:, :1], x], dim=1)
    torch.testing.assert_close(time(x, Past()), plain(time, first_thrice, (0,) * 6), rtol=1e-5, atol=1e-5)


def test_downsampling_adds_the_mean_to_a_strided_convolution(x: Tensor) -> None:
    layer = Downsample(8, space=True, time=True)
    assert layer.conv1 is not None
    assert layer.conv2 is not None
    assert layer.conv3 is not None
    mean = F.avg_pool3d(x.permute(0, 4, 1, 2, 3), (1, 2, 2)).permute(0, 2, 3, 4, 1)
    halved = plain(layer.conv1, x, (0, 1, 0, 1, 0, 0), (1, 2, 2)) + mean
    once = torch.cat([halved[:, :1], halved], dim=1)
    mean = F.avg_pool3d(once.permute(0, 4, 1, 2, 3), (2, 1, 1)).permute(0, 2, 3, 4, 1)
    expected = plain(layer.conv2, torch.cat([once[:, :1], once], dim=1), (0,) * 6, (2, 1, 1)) + mean
    expected = plain(layer.conv3, expected, (0,) * 6)
    found = layer(x, Past())
    assert found.shape == (2, 3, 2, 3, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_upsampling_copies_all_but_the_first_frame(x: Tensor) -> None:
    layer = Upsample(8, space=True, time=True)
    found = layer(x, Past())
    assert found.shape == (2, 9, 8, 12, 8)
    assert layer.conv1 is not None
    assert layer.conv2 is not None
    assert layer.conv3 is not None
    twice = x.repeat_interleave(2, dim=1)[:, 1:]
    twice = twice + plain(layer.conv1, torch.cat([twice[:, :1], twice[:, :1], twice], dim=1), (0,) * 6)
    big = twice.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = plain(layer.conv3, big + plain(layer.conv2, big, (1, 1, 1, 1, 0, 0)), (0,) * 6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("over", ["space", "time"])
def test_attention_is_softmax_over_its_axis(x: Tensor, over: str) -> None:
    layer = Attention(8, over)
    features = F.group_norm(x.flatten(0, 1).permute(0, 3, 1, 2), 1, eps=1e-6).permute(0, 2, 3, 1).view_as(x)
    q, k, v = (part.over_pixels(features) for part in (layer.q, layer.k, layer.v))
    if over == "space":
        weights = torch.einsum("nthwc,ntyxc->nthwyx", q, k) / 8**0.5
        weights = weights.flatten(4).softmax(-1).view_as(weights)
        seen = torch.einsum("nthwyx,ntyxc->nthwc", weights, v)
    else:
        weights = torch.einsum("nthwc,nshwc->nhwts", q, k) / 8**0.5
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        seen = torch.einsum("nhwts,nshwc->nthwc", weights.masked_fill(~causal, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(layer(x, Past()), x + layer.proj_out.over_pixels(seen), rtol=1e-5, atol=1e-5)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ratio_space is 12 .* `module.network.ratio_space`"):
        CosmosNetwork(ratio_space=12, channels=4)
    with pytest.raises(ConfigError, match="ratio_time is 2 with patches of 4"):
        CosmosNetwork(ratio_time=2, channels=4)
    with pytest.raises(ConfigError, match="2 resolutions leave room for 1 halvings, and 2 are needed"):
        CosmosNetwork(ratio_space=16, channels=4, channels_mult=(1, 1))
    with pytest.raises(ConfigError, match=r"cannot undo 1 halvings of space and 1 of time with legacy=False"):
        CosmosNetwork(channels=4, channels_mult=(1, 1))
