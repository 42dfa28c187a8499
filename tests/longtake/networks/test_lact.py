"""LaCT against the literal reference, and its properties one by one."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from longtake.networks import fast_weights
from longtake.networks.attention import WindowAttention
from longtake.networks.conditioning import TextEmbedding
from longtake.networks.fast_weights import FastWeights
from longtake.networks.lact import LaCT, fast_weight_steps
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.video_dit import VideoDiT
from longtake.types import Conditions
from tests.longtake.networks import lact_reference
from tests.longtake.networks.tiny import difference, teacher_forced, tiny_network, tiny_sequence


def lact_network(dim: int = 80, num_heads: int = 4, **settings: object) -> VideoDiT:
    """A LaCT network with Wan's text embedding and without actions, as the reference describes it."""
    text = partial(TextEmbedding, text_dim=12, attends_padding=True)
    plain = {"text": text, "actions": None, "frame_rate": None}
    return tiny_network(partial(LaCT, **settings), dim=dim, num_heads=num_heads, **plain)


def against_reference(network: VideoDiT, repeats: int, **sizes: object) -> tuple[float, dict[str, float]]:
    """Returns the difference to the reference in outputs and in the gradient of every parameter (float64, 4 chunks)."""
    sequence = tiny_sequence(batch=1, chunks=4, repeats=repeats)
    sequence.sigma = sequence.sigma[..., :1].expand_as(sequence.sigma)  # the release: one noise level a chunk
    grid = Grid(1, 3, 2, 2)
    layout = ChunkLayout.teacher_forcing(4, repeats, grid)
    x, sigma, _ = sequence.slots(layout)
    ours, _ = network(x, sigma[..., :1], Conditions(text_emb=sequence.text[:, :1]), layout)
    ours = ours[0, :, 0].transpose(1, 2)  # [s c f h w]
    weights = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    theirs, slots = lact_reference.forward(
        weights,
        lact_reference.Sizes(**({"heads": 4, "fw_heads": 2, "frames": 3, "height": 2, "width": 2} | sizes)),  # type: ignore[arg-type]
        clean=sequence.clean[0, :, 0].transpose(1, 2),
        noisy=sequence.noisy[0, :, :, 0].transpose(2, 3),
        sigma=sequence.sigma[0, :, :, 0, 0],
        text=sequence.text[0, 0],
    )
    assert len(slots) == len(layout.slots)
    aim = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    network.zero_grad()
    (ours * aim).sum().backward()
    (theirs * aim).sum().backward()
    gradients = {
        name: difference(torch.zeros_like(p) if p.grad is None else p.grad, weights[name].grad)  # type: ignore[arg-type]
        for name, p in network.named_parameters()
        if weights[name].grad is not None and weights[name].grad.abs().max() > 0  # type: ignore[union-attr]
    }
    return difference(ours, theirs), gradients


@pytest.mark.parametrize(
    ("repeats", "settings"),
    [(1, {}), (2, {}), (3, {}), (1, {"kv_tokens": 5}), (2, {"kv_tokens": 5}), (2, {"momentum": True})],
    ids=str,
)
def test_equals_the_literal_reference(repeats: int, settings: dict[str, object]) -> None:
    outputs, gradients = against_reference(lact_network(**settings), repeats, **settings)
    assert outputs < 1e-9
    assert max(gradients.values()) < 1e-8
    new = {name.rsplit("mixer.", 1)[1] for name in gradients if "mixer." in name}
    assert {"w0", "w1", "w2", "qk_scale", "qk_offset", "lr_proj.weight", "ttt_scale_proj.weight"} <= new


@pytest.mark.parametrize(("heads", "fw_heads"), [(3, 2), (2, 3), (5, 1)])
def test_fast_weight_heads_of_any_width(heads: int, fw_heads: int) -> None:
    """A fast-weight head is a share of the width: it may cut through an attention head, as in the released code."""
    outputs, gradients = against_reference(
        lact_network(60, heads, fw_heads=fw_heads), 2, heads=heads, fw_heads=fw_heads
    )
    assert outputs < 1e-9
    assert max(gradients.values()) < 1e-8


def test_closed_gate_is_wan_with_a_window() -> None:
    """At init LaCT is Wan restricted to the window, to the last bit, and the gate can be learned."""
    network = tiny_network(LaCT, dtype=torch.float32)
    for block in network.blocks:
        block.self_attn.mixer.reset_parameters()
    windowed = tiny_network(partial(WindowAttention, window=1), dtype=torch.float32)
    state = {name: value for name, value in network.state_dict().items() if ".mixer." not in name}
    windowed.load_state_dict(state)
    sequence = tiny_sequence(chunks=4, repeats=2, dtype=torch.float32)
    ours, _ = teacher_forced(network, sequence)
    theirs, _ = teacher_forced(windowed, sequence)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    for block in network.blocks:
        assert block.self_attn.mixer.ttt_scale_proj.weight.grad.abs().max() > 0


def kernel_inputs(tokens: int = 7) -> tuple[FastWeights, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    weights = FastWeights(*(torch.randn(3, *shape).double() for shape in ((10, 6), (6, 10), (10, 6))))
    k, v, rates = (
        torch.randn(3, tokens, 6).double(),
        torch.randn(3, tokens, 6).double(),
        torch.rand(3, tokens, 3).double(),
    )
    return weights, k, v, rates


def test_update_is_the_gradient_of_its_loss() -> None:
    weights, k, v, rates = kernel_inputs()
    for weight in weights.matrices:
        weight.requires_grad_()
    changes = fast_weights.gradient(weights, k, v, rates)
    for j, (weight, change) in enumerate(zip(weights.matrices, changes, strict=True)):
        loss = -(rates[..., j] * (fast_weights.read(weights, k) * v).sum(-1)).sum()
        assert difference(change, -torch.autograd.grad(loss, weight)[0]) < 1e-14


def test_gradients_written_out_by_hand() -> None:
    """What flows back through an update and a read, against finite differences."""
    weights, k, v, rates = kernel_inputs(tokens=3)
    norms = tuple(fast_weights.row_norm(weight) * 1.5 for weight in weights.matrices)
    inputs = [*weights.matrices, k, v, rates, *norms]

    def chunk(w0: Tensor, w1: Tensor, w2: Tensor, k: Tensor, v: Tensor, rates: Tensor, *norms: Tensor) -> Tensor:
        new = fast_weights.update(FastWeights(w0, w1, w2), k, v, rates, norms=norms)  # type: ignore[arg-type]
        return fast_weights.read(new, k)

    assert torch.autograd.gradcheck(chunk, [tensor.detach().requires_grad_() for tensor in inputs], fast_mode=True)


def updated(weights: FastWeights, k: Tensor, v: Tensor, rates: Tensor, **options: object) -> FastWeights:
    norms = tuple(fast_weights.row_norm(weight) for weight in weights.matrices)
    return fast_weights.update(weights, k, v, rates, norms=norms, **options)  # type: ignore[arg-type]


def test_no_rate_no_change() -> None:
    weights, k, v, rates = kernel_inputs()
    still = updated(weights, k, v, 0 * rates)
    for new, old in zip(still.matrices, weights.matrices, strict=True):
        assert difference(new, old) < 1e-4  # the 1e-5 beside the row norms


def test_rows_keep_their_norms() -> None:
    weights, k, v, rates = kernel_inputs()
    for new, old in zip(updated(weights, k, v, 10 * rates).matrices, weights.matrices, strict=True):
        assert difference(new, old) > 0.1
        assert difference(fast_weights.row_norm(new), fast_weights.row_norm(old)) < 1e-4


def test_order_of_tokens_does_not_matter() -> None:
    weights, k, v, rates = kernel_inputs()
    order = torch.randperm(k.shape[1])
    shuffled = updated(weights, k[:, order], v[:, order], rates[:, order])
    assert difference(shuffled.w0, updated(weights, k, v, rates).w0) < 1e-14


def test_heads_are_independent() -> None:
    weights, k, v, rates = kernel_inputs()
    before = updated(weights, k, v, rates)
    k = k.clone()
    k[1] += 1
    after = updated(weights, k, v, rates)
    assert torch.equal(after.w0[[0, 2]], before.w0[[0, 2]])
    assert difference(after.w0[1], before.w0[1]) > 1e-3


def test_momentum_adds_earlier_updates() -> None:
    weights, k, v, rates = kernel_inputs()
    share = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    first = updated(weights, k, v, rates, momentum=share)
    assert torch.equal(first.w0, updated(weights, k, v, rates).w0)
    second = updated(first, k, v, rates, momentum=share)
    for change, earlier, total in zip(fast_weights.gradient(first, k, v, rates), first.sums, second.sums, strict=True):
        assert earlier is not None
        assert total is not None
        assert difference(total, change + share[:, None, None] * earlier) < 1e-14
    plain = FastWeights(*first.matrices)
    assert torch.equal(second.w0[0], updated(plain, k, v, rates).w0[0])


def test_muon_makes_singular_values_equal() -> None:
    torch.manual_seed(0)
    for shape in ((64, 128), (128, 64)):
        update = torch.randn(2, *shape)
        values = torch.linalg.svdvals(fast_weights.orthogonalised(update, 5))
        assert values.min() > 0.6
        assert values.max() < 1.25
        left, _, right = torch.linalg.svd(update, full_matrices=False)
        near = fast_weights.orthogonalised(update, 5)
        assert torch.einsum("bij,bij->", near, left @ right) / (near.norm() * (left @ right).norm()) > 0.95


def test_initial_rates_and_their_layout() -> None:
    mixer = LaCT(8, 2, fw_heads=2)
    with torch.no_grad():
        mixer.lr_proj.weight.zero_()
        mixer.lr_proj.bias.zero_()
        assert difference(mixer.rates(torch.randn(5, 8)), torch.full((5, 2, 3), 1e-3)) < 1e-5
        mixer.lr_proj.bias[3 * 1 + 2] = 5.0  # head 1, W2
    rates = mixer.rates(torch.randn(5, 8))
    assert rates[:, 1, 2].min() > 0.1
    assert rates.flatten(1)[:, [0, 1, 2, 3, 4]].max() < 1.1e-3


def test_parameter_counts_of_the_release() -> None:
    """Wan 1.3B: 7,095,559 parameters a layer; the fast state is 3 d^2."""
    with torch.device("meta"):
        mixer = LaCT(1536, 12)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == 7_095_559
    assert mixer.w0.numel() + mixer.w1.numel() + mixer.w2.numel() == 3 * 1536**2


def test_steps_of_the_fast_weights() -> None:
    grid = Grid(1, 1, 1, 1)
    steps = fast_weight_steps(ChunkLayout.teacher_forcing(3, 2, grid))
    assert [(step.writes, step.reads) for step in steps] == [(None, (0, 1)), (2, (2, 3, 4)), (5, (5, 6, 7))]
    steps = fast_weight_steps(ChunkLayout.stream(4, grid, commit=True))
    assert [(step.writes, step.reads) for step in steps] == [(0, (0, 1))]
    steps = fast_weight_steps(ChunkLayout.diffusion_forcing(2, grid))
    assert [(step.writes, step.reads) for step in steps] == [(None, (0,)), (0, (1,)), (1, ())]


def test_time_rope_none_does_not_know_where_it_is() -> None:
    """What was written 400 latent frames ago is read as if it were near; with absolute time it is not."""
    outs = {}
    for time_rope in ("none", "absolute"):
        mixer = LaCT(80, 4, time_rope=time_rope, window=0).double()  # type: ignore[arg-type]
        torch.manual_seed(0)
        with torch.no_grad():
            mixer.qk_offset.normal_()
        x = torch.randn(1, 1, 12, 4, 20).double()
        tables = [
            mixer.prepare(
                ChunkLayout.one_shot(Grid(1, 3, 2, 2), start), None, device=torch.device("cpu"), dtype=x.dtype
            )
            for start in (0, 400)
        ]
        near, far = (mixer.fast_channels(x, table.table, 0) for table in tables)
        outs[time_rope] = difference(far, near)
    assert outs["none"] == 0
    assert outs["absolute"] > 0.1


def test_a_warning_beyond_the_trained_length(caplog: pytest.LogCaptureFixture) -> None:
    network = tiny_network(partial(LaCT, trained_frames_lat=11), dtype=torch.float32)
    with caplog.at_level("WARNING", logger="longtake"), torch.no_grad():
        teacher_forced(network, tiny_sequence(batch=1, chunks=3, dtype=torch.float32))
        assert not caplog.records
        teacher_forced(network, tiny_sequence(batch=1, chunks=4, dtype=torch.float32))
        assert "11 latent frames" in caplog.text


def test_state_is_float32_under_autocast() -> None:
    network = tiny_network(LaCT, dtype=torch.float32)
    sequence = tiny_sequence(chunks=3, dtype=torch.float32)
    memory = network.empty_memory()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for chunk in range(3):
            layout = ChunkLayout.stream(chunk, Grid(1, 3, 2, 2), commit=chunk > 0)
            out, memory = network(*sequence.slots(layout), layout, memory)
            assert out.dtype == torch.float32
    fast = memory.layers[0].fast
    assert {name: value.dtype for name, value in fast.items()} == dict.fromkeys(("w0", "w1", "w2"), torch.float32)
    norm = network.blocks[0].self_attn.mixer.w0.norm().item()
    assert math.isclose(fast["w0"][0].norm().item(), norm, rel_tol=1e-3)
