"""Names of released weights and ours, both ways, and strict loading."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.attention import FullAttention, WindowAttention
from longtake.networks.conditioning import ActionEmbedding, TextEmbedding
from longtake.networks.lact import LaCT
from longtake.networks.video_dit import VideoDiT
from longtake.pretrained.names import LACT_TENSORS, detect_naming, from_longtake, name_map, to_longtake, unwrapped
from longtake.pretrained.wan import infer_sizes, load_pretrained, read_weights


def network(mixer=FullAttention, **changes: object) -> VideoDiT:  # noqa: ANN001
    torch.manual_seed(0)
    settings = {
        "dim": 80,
        "ffn_dim": 144,
        "num_heads": 4,
        "num_layers": 2,
        "in_channels": 6,
        "out_channels": 4,
        "freq_dim": 32,
        "text": partial(TextEmbedding, text_dim=12, attends_padding=True),
    }
    made = VideoDiT(mixer=mixer, **(settings | changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


MOMENTUM = partial(LaCT, momentum=True)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mixer", [FullAttention, LaCT, MOMENTUM], ids=str)
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_round_trip(naming: str, mixer: object) -> None:
    ours = network(mixer).state_dict()
    released = from_longtake(ours, naming)  # type: ignore[arg-type]
    assert detect_naming(released) == naming
    assert equal(to_longtake(released), ours)
    assert sum(t.numel() for t in released.values()) == sum(t.numel() for t in ours.values())


def test_diffusers_loads_what_we_write_and_the_other_way_round() -> None:
    transformers = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    peer = transformers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=20, ffn_dim=144, num_layers=2, text_dim=12, freq_dim=32,
        in_channels=6, out_channels=4,
    )  # fmt: skip
    ours = network()
    peer.load_state_dict(from_longtake(ours.state_dict(), "diffusers"), strict=True)
    assert equal(to_longtake(peer.state_dict()), ours.state_dict())


def test_the_825_names_of_wan_1_3b() -> None:
    with torch.device("meta"):
        big = VideoDiT(
            dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, mixer=LaCT,
            text=partial(TextEmbedding, text_dim=4096, attends_padding=True),
        )  # fmt: skip
    names = name_map(30, "original")
    own = set(big.state_dict())
    theirs = [name for ours in own for name in names[ours]]
    assert len(theirs) == len(set(theirs)) == 825 + 300
    assert len([name for name in theirs if name.startswith("blocks.7.")]) == 27 + 10
    assert {name for name in theirs if name.startswith("blocks.7.self_attn.")} == {
        *(f"blocks.7.self_attn.{leaf}" for leaf in LACT_TENSORS),
        *(f"blocks.7.self_attn.{part}.{leaf}" for part in "qkvo" for leaf in ("weight", "bias")),
        *(f"blocks.7.self_attn.norm_{part}.weight" for part in "qk"),
    }


def test_diffusers_swaps_the_names_of_two_norms() -> None:
    names = name_map(1, "diffusers")
    assert names["blocks.0.norm3.weight"] == ("blocks.0.norm2.weight",)
    assert names["blocks.0.self_attn.qkv.bias"] == tuple(f"blocks.0.attn1.to_{part}.bias" for part in "qkv")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {f"model.{name}": t for name, t in s.items()},
        lambda s: {f"module.model.{name}": t for name, t in s.items()},
        lambda s: {"generator": {f"model.{name}": t for name, t in s.items()}, "critic": {}},
        lambda s: {"generator_ema": {f"model._fsdp_wrapped_module.{name}": t for name, t in s.items()}},
        lambda s: {"state_dict": {f"_orig_mod.{name}": t for name, t in s.items()}, "step": 3},
        lambda s: {name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for name, t in s.items()},
    ],
)
def test_wrappers_are_taken_off(wrap) -> None:  # noqa: ANN001
    released = from_longtake(network().state_dict(), "original")
    assert equal(unwrapped(wrap(released)), released)


def test_sizes_from_shapes() -> None:
    sizes = infer_sizes(from_longtake(network().state_dict(), "diffusers"), head_dim=20)
    assert sizes == {
        "dim": 80,
        "ffn_dim": 144,
        "num_heads": 4,
        "num_layers": 2,
        "in_channels": 6,
        "out_channels": 4,
        "patch_size": (1, 2, 2),
        "freq_dim": 32,
        "text_dim": 12,
        "mixer": None,
    }
    lact = network(partial(LaCT, fw_heads=4, inter_multi=3, momentum=True)).state_dict()
    assert infer_sizes(from_longtake(lact, "original"), head_dim=20)["mixer"] == {
        "fw_heads": 4,
        "inter_multi": 3,
        "momentum": True,
    }


def test_sizes_of_another_head_are_refused() -> None:
    with pytest.raises(ConfigError, match="width of 80, which heads of 128 channels do not divide"):
        infer_sizes(from_longtake(network().state_dict(), "original"))


def test_wan_into_lact_reports_the_ten_new_tensors_a_layer() -> None:
    wan, lact = network(), network(LaCT, actions=partial(ActionEmbedding, action_dim=2, zero_init=True))
    fresh = {name: value.clone() for name, value in lact.state_dict().items()}
    kept = load_pretrained(lact, from_longtake(wan.state_dict(), "original"))
    new = {f"blocks.{layer}.self_attn.mixer.{leaf}" for layer in (0, 1) for leaf in LACT_TENSORS}
    assert set(kept) == new | {
        "actions.mlp.0.weight",
        "actions.mlp.0.bias",
        "actions.mlp.2.weight",
        "actions.mlp.2.bias",
        "actions.null",
    }
    for name, value in lact.state_dict().items():
        assert torch.equal(value, fresh[name] if name in kept else wan.state_dict()[name])


def test_what_does_not_fit_is_named() -> None:
    released = from_longtake(network().state_dict(), "original")
    with pytest.raises(ConfigError, match=r"left over img_emb\.proj\.0\.weight"):
        load_pretrained(network(), {**released, "img_emb.proj.0.weight": torch.zeros(1)})
    without = {name: t for name, t in released.items() if name != "blocks.1.self_attn.k.bias"}
    with pytest.raises(ConfigError, match=r"missing blocks\.1\.self_attn\.k\.bias"):
        load_pretrained(network(), without)
    without = {name: t for name, t in released.items() if name != "blocks.1.ffn.0.bias"}
    with pytest.raises(ConfigError, match=r"blocks\.1\.ffn\.0\.bias: nothing, the network \[144\]"):
        load_pretrained(network(), without)
    with pytest.raises(ConfigError, match=r"blocks\.0\.ffn\.0\.bias: \[144\], the network \[160\]"):
        load_pretrained(network(ffn_dim=160), released)
    with pytest.raises(ConfigError, match=r"blocks\.0\.self_attn\.mixer\.w0: \[.*\], the network nothing"):
        load_pretrained(network(WindowAttention), from_longtake(network(LaCT).state_dict(), "original"))
    with pytest.raises(ConfigError, match=r"mixer\.w0: nothing"):
        load_pretrained(network(LaCT), released, may_miss=set())
    with pytest.raises(ConfigError, match="not the weights of a Wan transformer"):
        to_longtake({"encoder.conv1.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"no name in Wan \(original\): text\.null"):
        from_longtake(network(text=partial(TextEmbedding, text_dim=12)).state_dict(), "original")


def test_lact_weights_with_a_hole_are_refused() -> None:
    """Only a plain Wan may lack LaCT's tensors: one that is missing from weights of LaCT is named, not drawn anew."""
    lact, momentum = (from_longtake(network(mixer).state_dict(), "original") for mixer in (LaCT, MOMENTUM))
    hole = {name: t for name, t in lact.items() if name != "blocks.1.self_attn.w2"}
    with pytest.raises(ConfigError, match=r"1 tensors do not fit.* blocks\.1\.self_attn\.mixer\.w2: nothing"):
        load_pretrained(network(LaCT), hole)
    hole = {name: t for name, t in momentum.items() if name != "blocks.1.self_attn.momentum_proj.0.bias"}
    with pytest.raises(ConfigError, match=r"momentum_proj\.bias: nothing"):
        load_pretrained(network(MOMENTUM), hole)
    kept = load_pretrained(network(MOMENTUM), lact)  # momentum may be put on top
    assert {name.rsplit("mixer.", 1)[1] for name in kept} == {"momentum_proj.weight", "momentum_proj.bias"}


def test_files_and_folders(tmp_path: Path) -> None:
    released = from_longtake(network().state_dict(), "diffusers")
    save_file(released, tmp_path / "one.safetensors")
    torch.save({"generator": released}, tmp_path / "one.pt")
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(released)
    save_file({name: released[name] for name in names[::2]}, shards / "a-00001-of-00002.safetensors")
    save_file({name: released[name] for name in names[1::2]}, shards / "a-00002-of-00002.safetensors")
    for path in (tmp_path / "one.safetensors", tmp_path / "one.pt", shards):
        assert equal(unwrapped(read_weights(path)), released)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"generator": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00")
    (tmp_path / "empty").mkdir()
    for name in ("evil.pt", "cut.safetensors", "empty", "missing.pt"):
        with pytest.raises(ConfigError, match="init_from"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
