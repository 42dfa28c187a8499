"""Names of released Cosmos AR weights, both ways, and strict loading."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from longtake.errors import ConfigError
from longtake.networks.token_transformer import TokenTransformer
from longtake.pretrained.cosmos_ar import from_longtake, load_cosmos_ar, to_longtake
from longtake.pretrained.wan import read_weights
from tests.longtake.networks.tiny_tokens import make

NAMES = {  # as listed from a released file
    "tok_embeddings.weight",
    "norm.weight",
    "output.weight",
    *(f"layers.0.attention.{part}.weight" for part in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
    *(f"layers.0.cross_attention.{part}.weight" for part in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
    *(f"layers.0.feed_forward.w{part}.weight" for part in (1, 2, 3)),
    *(f"layers.0.{part}.weight" for part in ("attention_norm", "cross_attention_norm", "ffn_norm")),
}


@pytest.mark.parametrize("name", ["base", "narrow_heads", "video2world", "video2world_wide", "one_axis"])
def test_names_there_and_back(name: str) -> None:
    state = make(name).state_dict()
    released = from_longtake(state)
    back = to_longtake(released)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_names_are_the_released_ones() -> None:
    network = make("video2world_wide", num_layers=1)
    released = from_longtake(network.state_dict())
    assert set(released) == NAMES
    assert released["layers.0.attention.wq.weight"].shape == (96, 120)
    assert released["layers.0.attention.wk.weight"].shape == (48, 120)
    assert torch.equal(released["layers.0.feed_forward.w3.weight"], network.layers[0].gate_up.weight[128:])


def test_wrapped_and_fused_files_load(tmp_path: Path) -> None:
    network = make("base")
    released = from_longtake(network.state_dict())
    fused = {key: value for key, value in released.items() if ".attention.w" not in key or ".wo." in key}
    for i in range(3):
        parts = [released[f"layers.{i}.attention.w{part}.weight"] for part in "qkv"]
        fused[f"layers.{i}.attention.wqkv.weight"] = torch.cat(parts)
    for weights in (released, fused):
        state = {f"model.{key}": value for key, value in weights.items()}
        state["model.layers.0.attention._extra_state"] = torch.zeros(3)
        torch.save({"model": state}, tmp_path / "model.pt")
        other = make("base", seed=9)
        load_cosmos_ar(other, tmp_path / "model.pt")
        own = network.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in other.state_dict().items())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    released = from_longtake(make("base").state_dict())
    torch.save(released, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="cross_kv"):
        load_cosmos_ar(make("video2world"), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"\[96, 96\]"):
        load_cosmos_ar(make("narrow_heads"), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="left over layers.0.attention.bias"):
        to_longtake({**released, "layers.0.attention.bias": torch.zeros(1)})
    with pytest.raises(ConfigError, match="missing layers.1.attention.wk.weight"):
        to_longtake({key: value for key, value in released.items() if key != "layers.1.attention.wk.weight"})
    with pytest.raises(ConfigError, match="not the weights of a Cosmos AR"):
        to_longtake({"a": torch.zeros(1)})
    with pytest.raises(ConfigError, match="actions"):
        from_longtake(make("additive").state_dict())


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickles_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"model": Payload()}))
    with pytest.raises(ConfigError, match="no weights can be read"):
        load_cosmos_ar(make("base"), tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ConfigError):
        read_weights(tmp_path / "missing.pt")


def test_released_names_of_the_big_ones() -> None:
    """Every tensor of the 5B layout is named, on the meta device."""
    with torch.device("meta"):
        network = make_meta()
    released = from_longtake(network.state_dict())
    assert len(released) == 3 + 16 * (9 + 2 + 7)
    assert released["tok_embeddings.weight"].shape == (64064, 4096)
    assert released["output.weight"].shape == (64000, 4096)


def make_meta() -> TokenTransformer:
    from longtake.networks.token_head import FullHead

    return TokenTransformer(
        dim=4096,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        vocab_size=64000,
        grid_lat=(5, 40, 64),
        head=FullHead,
        abs_pos_emb=True,
        cross_attn_every=1,
        context_dim=1024,
        bov=True,
    )
