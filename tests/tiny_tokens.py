"""A complete token module of a few thousand parameters, on clips of smooth noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lightning_modules.ar_tokens import ARTokens
from longtake.schedules import warmup_constant
from tests.random_clips import RandomClips

VIDEO = {"fps": "10", "height": 16, "width": 16, "num_frames": 17}
ACTIONS = 3
FULL = {"_target_": "longtake.networks.token_head.FullHead", "_partial_": True}
ADDITIVE = {
    "_target_": "longtake.networks.action_conditioning.PerLatentActions",
    "_partial_": True,
    "action_dim": ACTIONS,
    "ratio_time": 8,
}
FAST = {
    "_target_": "longtake.networks.action_conditioning.FastActions",
    "_partial_": True,
    "action_dim": ACTIONS,
    "ratio_time": 8,
    "vocab_size": 64,
}


def network_node(**changes: Any) -> dict[str, Any]:
    """Returns the node of a small network for `tests.block_tokens`."""
    return {
        "_target_": "longtake.networks.token_transformer.TokenTransformer",
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "ffn_dim": 48,
        "vocab_size": 64,
        "grid_lat": [3, 2, 2],
        "head": FULL,
        "actions": ADDITIVE,
        **changes,
    }


def make_tokens_module(lr: float = 1e-2, **changes: Any) -> ARTokens:
    """Returns the module; `changes` replace arguments, those of objective and network under their names."""
    objective = changes.pop("objective", {})
    settings: dict[str, Any] = {
        "network": network_node(**changes.pop("network", {})),
        "objective": {"_target_": "longtake.objectives.next_token.NextToken", "context_lat": 2, **objective},
        "rollout": {"_target_": "longtake.rollout.tokens.TokenRollout", "top_p": 0.9},
        "encoder": {"video": {"_target_": "tests.block_tokens.BlockTokens"}, "text": None, "actions": {}},
        "video": dict(VIDEO),
        "seed": 0,
        "action_dim": ACTIONS,
        "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.01),
        "scheduler": partial(warmup_constant, warmup_steps=2),
    }
    return ARTokens(**{**settings, **changes})


def make_tokens_data(**changes: Any) -> RandomClips:
    """Returns clips of smooth noise in the size that the module takes."""
    settings = {"batch_size": 2, "num_workers": 0, "action_dim": ACTIONS, "seed": 0, "height": 16, "width": 16}
    return RandomClips(
        **{**settings, "num_frames": VIDEO["num_frames"], "val_clips": 3, "limit_samples": None, **changes}
    )  # type: ignore[arg-type]
