"""Every network yaml builds with every mixer, and has the size that it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from longtake.networks.video_dit import VideoDiT

CONF = Path(__file__).resolve().parents[3] / "conf"
NETWORKS = sorted(path.stem for path in (CONF / "network").glob("*.yaml") if not path.stem.startswith("token_"))
MIXERS = sorted(path.stem for path in (CONF / "network" / "mixer").glob("*.yaml"))


def build(name: str, *overrides: str) -> VideoDiT:
    """Builds without memory for the weights."""
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(overrides=[f"+network={name}", *overrides])
    cfg = OmegaConf.merge(OmegaConf.to_container(cfg, resolve=False), {"data": {"action_dim": 5}})
    with torch.device("meta"):
        return instantiate(cfg.network)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["video_dit_tiny", "video_dit_small"])
def test_every_mixer(name: str, mixer: str) -> None:
    network = build(name, f"network/mixer={mixer}")
    assert network.streams == (mixer != "full")
    assert network.constant_memory == (mixer != "block_causal")


@pytest.mark.parametrize(
    ("name", "overrides", "millions"),
    [
        ("video_dit_small", [], 7.68),
        ("wan_1_3b", ["network/mixer=full"], 1418.9968),
        ("wan_1_3b", [], 1418.9968 + 212.86677),
        ("wan_14b", ["network/mixer=full"], 14288.49),
    ],
)
def test_sizes(name: str, overrides: list[str], millions: float) -> None:
    network = build(name, *overrides)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)
    if name == "wan_1_3b" and overrides:
        assert sum(p.numel() for p in network.parameters()) == 1_418_996_800
        assert sum(p.numel() for p in network.blocks[0].parameters()) == 46_440_704


def test_every_network_is_tested() -> None:
    assert NETWORKS == ["video_dit_small", "video_dit_tiny", "video_dit_views", "wan_14b", "wan_1_3b"]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("views", ["channels", "cross"])
def test_several_views_and_control(views: str, mixer: str) -> None:
    network = build("video_dit_views", f"network/views={views}", f"network/mixer={mixer}")
    assert network.views is not None
    assert network.views.names[0] == "front_wide"
    assert network.control is not None
    assert len(network.empty_memory().layers) == 6 + 2
    assert network.patch_embedding.in_channels == 16 + 1 + (7 if views == "channels" else 0)
    without = build("video_dit_views", "network.control=null", "network.views=null")
    assert without.control is None
    assert without.views is None


def test_text_and_actions_are_choices() -> None:
    network = build("video_dit_tiny", "network/actions=tokens", "network/text=umt5")
    assert network.actions is not None
    assert network.actions.into == "tokens"
    assert network.text is not None
    assert network.text.text_dim == 4096
    without = build("video_dit_tiny", "network.actions=null", "network.text=null")
    assert without.actions is None
    assert without.blocks[0].cross_attn is None
