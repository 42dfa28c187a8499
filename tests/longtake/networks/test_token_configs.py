"""Every token network yaml builds with every head and way of actions, and has exactly the published size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launcher.signatures import check_targets
from longtake.networks.token_head import ChainHead, FactorisedHead, FullHead
from longtake.networks.token_transformer import TokenTransformer

CONF = Path(__file__).resolve().parents[3] / "conf"
SIZES = {
    "token_1b": 1_839_271_936,
    "token_4b": 4_014_088_192,
    "token_5b": 4_584_845_312,
    "token_12b": 11_560_975_360,
    "token_13b": 13_323_125_760,
}
PER_BLOCK_4B, CROSS_5B = 218_112_256, 35_655_936


def build(name: str, *overrides: str) -> TokenTransformer:
    """Builds without memory for the weights."""
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(overrides=[f"+network={name}", *overrides])
    extra = {"data": {"action_dim": 5}, "encoder": {"actions": {"vocab_size": 64}}}
    cfg = OmegaConf.merge(OmegaConf.to_container(cfg, resolve=False), extra)
    assert check_targets(OmegaConf.to_container(cfg, resolve=True)["network"], "network") == []  # type: ignore[index]
    with torch.device("meta"):
        return instantiate(cfg.network, _convert_="all")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_published_sizes(name: str, size: int) -> None:
    network = build(name)
    assert count(network) == size
    if name == "token_4b":
        assert count(network.layers[0]) == PER_BLOCK_4B
    if name == "token_5b":
        assert count(network.layers[0]) == PER_BLOCK_4B + CROSS_5B
        assert network.embedding.table.weight.shape == (64064, 4096)
    if name in ("token_12b", "token_13b"):
        assert network.layers[0].qkv.weight.shape == (6144, 5120)


def test_every_token_network_is_tested() -> None:
    names = {path.stem for path in (CONF / "network").glob("token_*.yaml")}
    assert {*SIZES, "token_tiny"} <= names
    for name in names - set(SIZES):
        assert isinstance(build(name), TokenTransformer)


@pytest.mark.parametrize(("head", "kind"), [("full", FullHead), ("factorised", FactorisedHead), ("chain", ChainHead)])
def test_every_head(head: str, kind: type) -> None:
    assert {path.stem for path in (CONF / "network" / "head").glob("*.yaml")} == {"full", "factorised", "chain"}
    assert isinstance(build("token_4b", f"network/head={head}").head, kind)


@pytest.mark.parametrize("actions", ["cross", "cross_fast", "additive", "adaln"])
def test_every_way_of_actions(actions: str) -> None:
    network = build("token_tiny", f"network/actions={actions}", "network.cross_attn_every=1")
    assert network.actions is not None
    assert (network.layers[0].modulation is not None) == (actions == "adaln")
