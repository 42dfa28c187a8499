"""Weights of a tiny network of seven views with text and control, untrained, in a file as training exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from longtake.model_spec import DiffusionSpec
from longtake.pretrained.weights_file import build, write_weights
from longtake.rollout.plan import TrainedFor

RIG = yaml.safe_load((Path(__file__).parents[1] / "conf" / "rig" / "doom7.yaml").read_text())
WORDS = ["a", "night", "drive", "it", "begins", "to", "rain", "blurred", "lorry"]
CHUNK_PX = 9


def network_node(control: tuple[str, ...] = ("depth",), text: bool = True) -> dict[str, Any]:
    """Returns the config node of the network."""
    node: dict[str, Any] = {
        "_target_": "longtake.networks.video_dit.VideoDiT",
        "dim": 16,
        "ffn_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "in_channels": 4,
        "patch_size": [1, 1, 1],
        "freq_dim": 32,
        "given_channel": True,
        "mixer": {"_target_": "longtake.networks.attention.FullAttention", "_partial_": True},
        "views": {"_target_": "longtake.networks.views.ViewChannels", "_partial_": True, "rig": RIG},
    }
    if control:
        node["control"] = {
            "_target_": "longtake.networks.control.Control",
            "_partial_": True,
            "types": list(control),
            "into": [0],
        }
    if text:
        node["text"] = {
            "_target_": "longtake.networks.conditioning.TextEmbedding",
            "_partial_": True,
            "text_dim": 8,
            "vocab_size": 32,
        }
    return node


def write_views(
    path: Path, *, control: tuple[str, ...] = ("depth",), text: bool = True, width: int = 16, data: str | None = None
) -> Path:
    """Writes the weights and returns their path."""
    words = {"_target_": "longtake.encoders.text.WordsEncoder", "words": WORDS, "vocab_size": 32, "max_words": 6}
    spec = DiffusionSpec(
        video={"fps": "10", "height": 16, "width": width, "num_frames": CHUNK_PX, "chunk_lat": 3},
        network=network_node(control, text),
        encoder={"video": {"_target_": "tests.block_code.BlockCode"}, "text": words if text else None},
        rollout={"_target_": "longtake.rollout.one_shot.OneShotRollout", "num_steps": 2, "guidance": 1.0},
        solver={"_target_": "longtake.rollout.solvers.Euler"},
        trained_for=TrainedFor(rollouts=("sliding_window", "one_shot"), chunk_lat=3, starts_lat=(0, 1, 2)),
        encoder_fingerprint="block-code-1",
        num_context_frames=0,
        data={"action_names": [], "action_typical": [], "view_names": list(RIG["views"]), "rig": RIG, "name": data},
    )
    network = build(spec.network, ["tests"])
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # all of them matter, also those that begin at zero
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    write_weights(path, network.state_dict(), spec.to_dict())
    return path
