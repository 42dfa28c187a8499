"""Control branches: nothing at first and at weight 0, weights by place, several types at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.attention import BlockCausalAttention, FullAttention
from longtake.networks.control import Control, capped, token_weights
from longtake.networks.lact import LaCT
from longtake.networks.layout import ChunkLayout
from longtake.networks.video_dit import VideoDiT
from longtake.types import Conditions
from tests.longtake.networks.several_views import CONTROL, drawn, latents_of, network_of, predicted
from tests.longtake.networks.tiny import difference, tiny_network

IDS = torch.arange(3)[None]
SHAPE = (1, 1, 3, 2, 4, 4, 4)


def controlled(**changes: Any) -> VideoDiT:
    return network_of("channels", control=CONTROL, **changes)


def weight(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1, 1, 1), value)


def depth_and_labels() -> dict[str, Tensor]:
    return {"depth": drawn(*SHAPE, seed=1), "labels": drawn(*SHAPE, seed=2)}


def test_weight_0_is_no_control() -> None:
    network, x = controlled(), latents_of([[0, 1, 2]])
    without = predicted(network, x, view_ids=IDS)
    control = depth_and_labels()
    zeros = {kind: weight(0.0) for kind in control}
    assert torch.equal(predicted(network, x, view_ids=IDS, control=control, control_weight=zeros), without)
    for value in (0.5, 1.0):
        some = {kind: weight(value) for kind in control}
        assert difference(predicted(network, x, view_ids=IDS, control=control, control_weight=some), without) > 1e-2


def test_an_untrained_branch_is_the_base_network() -> None:
    """Same weights, whatever the control; and the branch learns: after a step there is an effect."""
    settings: dict[str, Any] = {"dim": 80, "ffn_dim": 96, "num_heads": 4, "num_layers": 2, "in_channels": 4}
    torch.manual_seed(0)
    base = VideoDiT(mixer=FullAttention, freq_dim=32, **settings).double()
    torch.nn.init.normal_(base.head.head.weight)
    network = VideoDiT(mixer=FullAttention, freq_dim=32, control=CONTROL, **settings).double()
    missing, unexpected = network.load_state_dict(base.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("control.") for name in missing)
    x, control = latents_of([[0, 1, 2]]), depth_and_labels()
    assert torch.equal(predicted(network, x, control=control), predicted(base, x))
    layout = ChunkLayout.one_shot(network.grid(x.shape))
    sigma = torch.full((1, 1, 1, 1), 0.5, dtype=x.dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):  # the first step opens what comes after the blocks, the second what comes before
        optimizer.zero_grad()
        network(x, sigma, Conditions(control=control), layout)[0].square().mean().backward()
        optimizer.step()
    assert difference(predicted(network, x, control=control), predicted(network, x)) > 1e-6
    before: Any = network.control.branches["depth"].before  # type: ignore[union-attr, index]
    assert before.weight.abs().max() > 0


@pytest.mark.parametrize(("init", "partners"), [("first", (0, 1)), ("partner", (1, 2)), ("none", None)])
def test_a_branch_begins_with_blocks_of_the_network(init: Any, partners: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    control = partial(Control, types=["depth"], into=[1, 2], init=init)
    network = VideoDiT(
        dim=16, ffn_dim=16, num_heads=2, num_layers=3, in_channels=4, freq_dim=8, mixer=FullAttention, control=control
    )
    branch: Any = network.control.branches["depth"]  # type: ignore[union-attr, index]
    for own, like in zip(branch.blocks, partners or (0, 1), strict=True):
        same = torch.equal(own.self_attn.qkv.weight, network.blocks[like].self_attn.qkv.weight)  # type: ignore[union-attr]
        assert same == (partners is not None)


def test_hints_go_into_their_blocks_after_these() -> None:
    """Golden formula: tokens after block j += weight * after_i(c_i), c_0 = tokens + before(embedded)."""
    network, x = (
        tiny_network(FullAttention, text=None, actions=None, frame_rate=None, control=CONTROL),
        latents_of([[0]]),
    )
    network.control.into = (1, 1)  # type: ignore[union-attr]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    branch: Any = network.control.branches["depth"]  # type: ignore[union-attr, index]
    hooks = [branch.after[i].register_forward_hook(keep(f"after{i}")) for i in (0, 1)]
    hooks += [network.blocks[1].register_forward_hook(keep("block1"))]
    hooks += [network.head.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("head", inputs[0]))]
    predicted(network, x, control={"depth": drawn(1, 1, 1, 2, 4, 4, 4)}, control_weight={"depth": weight(0.25)})
    for hook in hooks:
        hook.remove()
    wanted = seen["block1"] + 0.25 * (seen["after0"] + seen["after1"])
    assert difference(seen["head"], wanted) < 1e-12


def test_weights_of_several_types_are_capped_at_1_in_every_place() -> None:
    weights = {"depth": torch.tensor([0.25, 1.0, 0.8, 0.0]), "labels": torch.tensor([0.5, 1.0, 0.4, 0.0])}
    found = capped(weights)
    assert torch.allclose(found["depth"], torch.tensor([0.25, 0.5, 0.8 / 1.2, 0.0]))
    assert torch.allclose(found["labels"], torch.tensor([0.5, 0.5, 0.4 / 1.2, 0.0]))
    total = found["depth"] + found["labels"]
    assert torch.allclose(total, torch.tensor([0.75, 1.0, 1.0, 0.0]))


def test_a_type_at_weight_0_beside_another_changes_nothing() -> None:
    network, x, control = controlled(), latents_of([[0, 1, 2]]), depth_and_labels()
    one = predicted(
        network, x, view_ids=IDS, control={"depth": control["depth"]}, control_weight={"depth": weight(0.7)}
    )
    both = {"depth": weight(0.7), "labels": weight(0.0)}
    two = predicted(network, x, view_ids=IDS, control=control, control_weight=both)
    assert difference(two, one) < 1e-12


def test_a_mask_says_where_control_counts() -> None:
    """In the last block, so that no attention carries the effect further."""
    last = partial(Control, types=["depth"], into=[1])
    network = tiny_network(FullAttention, text=None, actions=None, frame_rate=None, control=last)
    x, control = latents_of([[0, 1, 2]]), {"depth": drawn(*SHAPE)}
    mask = torch.zeros(1, 1, 3, 2, 4, 4)
    mask[:, :, 1, 1, :2, 2:] = 1  # a patch of view 1 at its second latent frame
    change = predicted(network, x, control=control, control_weight={"depth": mask}) - predicted(network, x)
    inside = mask[:, :, :, :, None].bool().expand_as(change)
    assert change[inside].abs().min() > 0
    assert change[~inside].abs().max() == 0


def test_token_weights_are_means_over_patches() -> None:
    network = tiny_network(FullAttention, text=None, actions=None, frame_rate=None)
    x = torch.zeros(1, 1, 1, 1, 4, 4, 4, dtype=torch.float64)
    values = torch.arange(16.0).view(1, 1, 1, 1, 4, 4)
    found = token_weights(values, x, network.grid(x.shape))
    assert found.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("mixer", [BlockCausalAttention, LaCT], ids=["block_causal", "lact"])
def test_a_controlled_rollout_is_the_training_pass(mixer: type) -> None:
    network = controlled(mixer=mixer)
    x, ids = latents_of([[0, 1, 2]], slots=3), IDS
    control = {"labels": drawn(1, 3, 3, 2, 4, 4, 4, seed=4)}
    weights = {"labels": torch.rand(1, 3, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))}
    sigma = torch.tensor([0.5, 0.0, 0.7], dtype=x.dtype).view(1, 3, 1, 1)
    grid = network.grid(x.shape)

    def told(part: slice) -> Conditions:
        cut = {"labels": control["labels"][:, part]}
        return Conditions(view_ids=ids, control=cut, control_weight={"labels": weights["labels"][:, part]})

    with torch.no_grad():
        whole, _ = network(x, sigma, told(slice(None)), ChunkLayout.teacher_forcing(2, 1, grid))
        memory = network.empty_memory()
        assert len(memory.layers) == 2 + 4
        _, memory = network(x[:, :1], sigma[:, :1], told(slice(1)), ChunkLayout.stream(0, grid, False), memory)
        part = slice(1, 3)
        both, memory = network(x[:, part], sigma[:, part], told(part), ChunkLayout.stream(1, grid, True), memory)
        last = slice(2, 3)
        again, _ = network(x[:, last], sigma[:, last], told(last), ChunkLayout.stream(1, grid, False), memory)
    assert difference(both, whole[:, part]) < 1e-9
    assert difference(again, whole[:, last]) < 1e-9


def test_what_is_new_has_names_of_its_own() -> None:
    names = controlled().new_parameter_names()
    assert {name.partition(".")[0] for name in names} == {"views", "control"}
    matrices = controlled().hidden_matrix_names()
    assert "control.branches.depth.blocks.0.ffn.0.weight" in matrices
    assert not any("patch_embedding" in name or "embedding.weight" in name for name in matrices)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"into": [1, 0]}, "rising"),
        ({"into": [2]}, "0 to 1"),
        ({"types": []}, "at least one"),
        ({"init": "last"}, "unknown beginning"),
        ({"hint_layers": -1}, "0 or more"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], words: str) -> None:
    controlled_by = partial(Control, **({"types": ["depth"], "into": [0]} | changes))
    with pytest.raises(ConfigError, match=words):
        tiny_network(FullAttention, control=controlled_by)


def test_a_type_without_a_branch_and_a_wrong_size_are_refused() -> None:
    network, x = controlled(), latents_of([[0, 1, 2]])
    with pytest.raises(ConfigError, match="unknown control type .* 'edge'; expected one of: depth, labels"):
        predicted(network, x, view_ids=IDS, control={"edge": drawn(*SHAPE)})
    with pytest.raises(ConfigError, match="same views, frames and size"):
        predicted(network, x, view_ids=IDS, control={"depth": drawn(1, 1, 2, 2, 4, 4, 4)})


def test_what_a_base_lacks_begins_as_a_copy_of_it() -> None:
    settings: dict[str, Any] = {"dim": 80, "ffn_dim": 96, "num_heads": 4, "num_layers": 2, "in_channels": 4}
    base = tiny_network(FullAttention, dtype=torch.float32, seed=3, **settings)
    network = tiny_network(FullAttention, dtype=torch.float32, control=CONTROL, **settings)
    missing = set(network.load_state_dict(base.state_dict(), strict=False).missing_keys)
    depth: Any = network.control.branches["depth"]  # type: ignore[union-attr, index]
    own = depth.blocks[1].ffn[0].weight.clone()
    assert not torch.equal(own, base.blocks[1].ffn[0].weight)  # type: ignore[union-attr, index]
    network.begin_new({name for name in missing if ".labels." in name})
    assert torch.equal(depth.blocks[1].ffn[0].weight, own)  # this branch was loaded, so to say
    network.begin_new(missing)
    assert torch.equal(depth.blocks[1].ffn[0].weight, base.blocks[1].ffn[0].weight)  # type: ignore[union-attr, index]
