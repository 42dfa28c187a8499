"""The whole network: parity with diffusers, modulation, shapes, precision, counts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.attention import FullAttention
from longtake.networks.conditioning import TextEmbedding
from longtake.networks.lact import LaCT
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.video_dit import KEPT_PLANS, VideoDiT
from longtake.pretrained.wan import load_pretrained
from longtake.types import Conditions
from tests.longtake.networks.tiny import MIXERS, difference, tiny_grid, tiny_network, tiny_sequence


def with_diffusers(dim: int, heads: int, layers: int = 2) -> tuple[VideoDiT, torch.nn.Module]:
    """Returns our network and diffusers' with the same random weights."""
    transformers = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    torch.manual_seed(0)
    peer = transformers.WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        ffn_dim=2 * dim,
        num_layers=layers,
        text_dim=24,
        freq_dim=64,
    )
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    network = VideoDiT(
        dim=dim,
        ffn_dim=2 * dim,
        num_heads=heads,
        num_layers=layers,
        mixer=FullAttention,
        freq_dim=64,
        text=partial(TextEmbedding, text_dim=24, attends_padding=True),
    )
    assert load_pretrained(network, peer.state_dict()) == []
    return network, peer


def parity_with_diffusers(dim: int, heads: int, *, layers: int = 2) -> float:
    network, peer = with_diffusers(dim, heads, layers)
    latents, text = torch.randn(2, 16, 3, 8, 6), torch.randn(2, 7, 24)
    timestep = torch.tensor([37.25, 914.5])
    with torch.no_grad():
        theirs = peer(latents, timestep, text, return_dict=False)[0]
        slots = latents.transpose(1, 2)[:, None, None]
        ours, _ = network(
            slots,
            (timestep / 1000).view(2, 1, 1, 1),
            Conditions(text_emb=text[:, None]),
            ChunkLayout.one_shot(network.grid(slots.shape)),
        )
    return difference(ours[:, 0, 0].transpose(1, 2), theirs)


@pytest.mark.parametrize(("dim", "heads", "layers"), [(80, 4, 1), (80, 4, 2), (384, 6, 2)], ids=str)
def test_parity_with_diffusers(dim: int, heads: int, layers: int) -> None:
    """Head widths 20 (not divisible by 6) and 64; a block and a network of two."""
    assert parity_with_diffusers(dim, heads, layers=layers) < 1e-5


def test_padding_is_attended_to_as_in_wan() -> None:
    """Rows are padded with zeros before the text embedding, and attention sees them."""
    network, peer = with_diffusers(80, 4)
    assert network.text is not None
    network.text.text_len = 12
    latents, text, sigma = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 7, 24), torch.full((1, 1, 1, 1), 0.3)
    slots = latents.transpose(1, 2)[:, None, None]
    layout = ChunkLayout.one_shot(network.grid(slots.shape))
    with torch.no_grad():
        padded = torch.nn.functional.pad(text, (0, 0, 0, 5))
        theirs = peer(latents, torch.tensor([300.0]), padded, return_dict=False)[0]
        ours, _ = network(slots, sigma, Conditions(text_emb=text[:, None]), layout)
        assert difference(ours[:, 0, 0].transpose(1, 2), theirs) < 1e-5
        mask = torch.arange(12)[None, None] < 7  # what the mask leaves out becomes zeros, and is attended to
        junk = torch.cat((text, torch.randn(1, 5, 24)), dim=1)
        masked, _ = network(slots, sigma, Conditions(text_emb=junk[:, None], text_mask=mask), layout)
        assert torch.equal(masked, ours)


@pytest.mark.parametrize("mixer", ["full", "block_causal", "window2_sink1", "lact_momentum"])
def test_modulation_is_the_same_however_it_is_given(mixer: str) -> None:
    """One noise level for all, given once or for every view and latent frame."""
    network, sequence = tiny_network(MIXERS[mixer], actions=None), tiny_sequence(chunks=3, views=2)
    layout = ChunkLayout.teacher_forcing(3, 1, tiny_grid(sequence))
    x, sigma, conditions = sequence.slots(layout)
    sigma = sigma[:, :, :1, :1]
    with torch.no_grad():
        once, _ = network(x, sigma, conditions, layout)
        for shape in ((2, 1), (1, 3), (2, 3)):
            full, _ = network(x, sigma.expand(-1, -1, *shape), conditions, layout)
            assert difference(full, once) < 1e-12
        one_frame = sigma.expand(-1, -1, 2, 3).clone()
        one_frame[:, 1, 1, 2] += 0.3
        other, _ = network(x, one_frame, conditions, layout)
    assert difference(other[:, 1, 1, 2], once[:, 1, 1, 2]) > 1e-2


def test_shapes_and_precision() -> None:
    """Any views and sizes; float64 stays, autocast keeps the velocity and the residual stream float32."""
    network = tiny_network(LaCT, dtype=torch.float32)
    sequence = tiny_sequence(views=3, frames=2, size=6, chunks=2, repeats=2, dtype=torch.float32)
    layout = ChunkLayout.teacher_forcing(2, 2, tiny_grid(sequence))
    x, sigma, conditions = sequence.slots(layout)
    exact, memory = network(x, sigma, conditions, layout)
    assert memory is None
    assert exact.shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = network(x, sigma, conditions, layout)
    assert low.dtype == torch.float32
    assert 1e-4 < difference(low, exact) < 5e-2
    low.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in network.named_parameters() if "null" not in n)


def test_values_in_bfloat16_are_nearer_to_float32_than_the_peer() -> None:
    network, peer = with_diffusers(384, 6)
    latents, text, timestep = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 7, 24), torch.tensor([640.0])
    slots = latents.transpose(1, 2)[:, None, None]
    layout = ChunkLayout.one_shot(network.grid(slots.shape))

    def ours() -> Tensor:
        out, _ = network(slots, (timestep / 1000).view(1, 1, 1, 1), Conditions(text_emb=text[:, None]), layout)
        return out[:, 0, 0].transpose(1, 2)

    def theirs() -> Tensor:
        return peer(latents, timestep, text, return_dict=False)[0].float()

    with torch.no_grad():
        exact = ours()
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(low - exact).square().mean().sqrt().item() for low in (ours(), theirs())]
    assert errors[0] < errors[1]


def test_untrained_network_returns_zeros_and_learns() -> None:
    torch.manual_seed(0)
    settings = {"dim": 80, "ffn_dim": 128, "num_heads": 4, "num_layers": 2, "in_channels": 4}
    network = VideoDiT(mixer=LaCT, text=partial(TextEmbedding, text_dim=12), **settings)
    sequence = tiny_sequence(chunks=2, dtype=torch.float32)
    layout = ChunkLayout.teacher_forcing(2, 1, tiny_grid(sequence))
    x, sigma, conditions = sequence.slots(layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        out, _ = network(x, sigma, conditions, layout)
        if step == 0:
            assert out.abs().max() == 0
        loss = (out - x.roll(1, dims=-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_initialisation_treats_fused_projections_one_by_one() -> None:
    torch.manual_seed(0)
    network = VideoDiT(dim=160, ffn_dim=320, num_heads=4, num_layers=1, mixer=LaCT)
    limit = (6 / (160 + 160)) ** 0.5  # xavier of a square matrix
    block = network.blocks[0]
    assert block.self_attn.qkv.weight.abs().max().item() == pytest.approx(limit, rel=1e-2)
    assert block.self_attn.mixer.ttt_scale_proj.weight.abs().max() == 0
    assert block.modulation.std().item() == pytest.approx(160**-0.5, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_layers": 0}, r"network\.num_layers"),
        ({"num_heads": 3}, r"network\.num_heads"),
        ({"dim": 100, "num_heads": 20}, r"network\.num_heads"),
        ({"patch_size": (2, 2, 2)}, r"network\.patch_size"),
        ({"mixer": partial(LaCT, fw_heads=3)}, r"network\.mixer\.fw_heads"),
        ({"mixer": partial(LaCT, time_rope="relative")}, r"network\.mixer\.time_rope"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(changes: dict, key: str) -> None:
    settings = {"dim": 80, "ffn_dim": 128, "num_heads": 4, "num_layers": 1, "mixer": LaCT}
    with pytest.raises(ConfigError, match=key):
        VideoDiT(**(settings | changes))


def test_latents_that_do_not_fit_are_refused() -> None:
    network = tiny_network(LaCT)
    with pytest.raises(ConfigError, match=r"network\.patch_size"):
        network.grid((1, 1, 1, 3, 4, 5, 4))
    assert network.grid((1, 1, 2, 3, 4, 6, 4)) == Grid(2, 3, 3, 2)


@pytest.mark.parametrize("mixer", ["block_causal", "window2_sink1", "lact"])
def test_num_flops_counts_what_is_multiplied(mixer: str) -> None:
    """Against torch's own counter, which does not know the CPU's attention kernel: in bfloat16 attention is matmuls.

    The embeddings of noise level and actions, a few numbers a frame, are left out.
    """
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode(display=False)
    network = tiny_network(MIXERS[mixer], dtype=torch.float32)
    sequence = tiny_sequence(size=16, chunks=4, repeats=2, dtype=torch.float32)
    layout = ChunkLayout.teacher_forcing(4, 2, tiny_grid(sequence))
    x, sigma, conditions = sequence.slots(layout)
    with counter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(x, sigma[:, :, :1, :1], conditions, layout)
    assert network.num_flops(layout, 2, 6) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_names_of_what_a_pretrained_network_does_not_have() -> None:
    network = tiny_network(LaCT)
    names = network.new_parameter_names()
    assert len(names) == 10 * 2
    assert names <= {name for name, _ in network.named_parameters()}
    assert tiny_network(MIXERS["window1"]).new_parameter_names() == set()
    assert isinstance(network.blocks[0], VideoDiT.block_class)


@pytest.mark.parametrize(
    "mixer",
    [
        "full",
        pytest.param("window2_sink1", marks=pytest.mark.slow),
        pytest.param("lact_momentum", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_give_the_same(mixer: str) -> None:
    """Traced by dynamo with its eager backend: no graph break inside a block, the same values and gradients."""
    network = tiny_network(MIXERS[mixer], dtype=torch.float32)
    sequence = tiny_sequence(chunks=3, dtype=torch.float32)
    layout = ChunkLayout.one_shot(tiny_grid(sequence))
    if mixer != "full":
        layout = ChunkLayout.teacher_forcing(3, 1, tiny_grid(sequence))
    inputs = sequence.slots(layout)
    exact, _ = network(*inputs, layout)
    exact.square().sum().backward()
    gradient = network.blocks[0].self_attn.qkv.weight.grad.clone()
    network.zero_grad()
    for block in network.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled, _ = network(*inputs, layout)
    compiled.square().sum().backward()
    assert difference(compiled, exact) < 1e-5
    assert difference(network.blocks[0].self_attn.qkv.weight.grad, gradient) < 1e-4


def test_plans_are_kept_and_fit_training_after_validation() -> None:
    """One layout, one plan; made in inference mode it can still be trained with; few are kept, and none is stale."""
    network, sequence = tiny_network(LaCT), tiny_sequence(chunks=3)
    layout = ChunkLayout.teacher_forcing(3, 1, tiny_grid(sequence))
    inputs = sequence.slots(layout)
    with torch.inference_mode():
        first, _ = network(*inputs, layout)
    second, _ = network(*inputs, layout)
    second.sum().backward()
    assert torch.equal(first, second.detach())
    assert len(network._plans) == 1
    for start in range(10):
        late = ChunkLayout.teacher_forcing(3, 1, tiny_grid(sequence), first_lat=start)
        out, _ = network(*inputs, late)
        assert torch.equal(out, second) == (start == 0)
    assert len(network._plans) <= KEPT_PLANS
