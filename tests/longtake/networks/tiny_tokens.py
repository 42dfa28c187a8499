"""Small token networks, and sequences for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longtake.networks.action_conditioning import CrossAttentionActions, PerLatentActions
from longtake.networks.action_motion import latent_motion
from longtake.networks.token_head import ChainHead, FactorisedHead, FullHead
from longtake.networks.token_transformer import TokenTransformer, token_layout
from longtake.types import Conditions

VOCAB = 640
GRID = (3, 4, 4)
ACTIONS, RATIO, CONTEXT = 5, 8, 32

PLAIN: dict[str, Any] = {
    "dim": 96,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 24,
    "ffn_dim": 128,
    "vocab_size": VOCAB,
    "grid_lat": GRID,
    "head": FullHead,
}
TEXT = {"cross_attn_every": 1, "context_dim": CONTEXT}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "bov": {"bov": True},
    "narrow_heads": {"dim": 120},
    "multi_query": {"num_kv_heads": 1},
    "no_groups": {"num_kv_heads": 4},
    "one_axis": {"rope": "1d", "qk_norm": False},
    "one_axis_bov": {"rope": "1d", "bov": True},
    "yarn": {"yarn": {"scale": 2.0, "original": (2, 3, 4)}},
    "video2world": {"bov": True, "abs_pos_emb": True, **TEXT, "attends_padding": True},
    "video2world_wide": {"dim": 120, "bov": True, "abs_pos_emb": True, **TEXT},
    "some_cross": {"cross_attn_every": 2, "context_dim": CONTEXT},
    "additive": {"actions": partial(PerLatentActions, action_dim=ACTIONS, ratio_time=RATIO)},
    "adaln": {
        "bov": True,
        "actions": partial(PerLatentActions, action_dim=ACTIONS, ratio_time=RATIO, into="modulation"),
    },
    "action_keys": {
        "cross_attn_every": 1,
        "actions": partial(CrossAttentionActions, action_dim=ACTIONS, ratio_time=RATIO),
    },
    "pan": {
        "bov": True,
        "cross_attn_every": 1,
        "actions": partial(CrossAttentionActions, action_dim=ACTIONS, ratio_time=RATIO, totals=True, pan=True),
    },
    "text_and_action_keys": {
        "dim": 96,
        "bov": True,
        "cross_attn_every": 1,
        "context_dim": 96,
        "actions": partial(CrossAttentionActions, action_dim=ACTIONS, ratio_time=RATIO),
    },
    "factorised": {
        "head": partial(FactorisedHead, factors=(32, 20)),
        "embedding_factors": (32, 20),
        "bov": True,
    },
    "chain": {"head": partial(ChainHead, factors=(8, 4, 5, 4), width=16), "embedding_factors": (32, 20)},
}


def make(name: str, seed: int = 0, **changes: Any) -> TokenTransformer:
    """Returns a network in evaluation mode whose every weight matters (a fresh one hardly mixes)."""
    torch.manual_seed(seed)
    network = TokenTransformer(**{**PLAIN, **VARIANTS[name], **changes}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.shape[1] <= 256 and parameter.abs().mean() < 0.05:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return network


def video(b: int, num_lat: int = 3, views: int = 1, seed: int = 1) -> Tensor:
    """Returns codes [b s v f h w], one latent frame a slot."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (b, num_lat, views, 1, *GRID[1:]), generator=generator)


def conditions(name: str, b: int, num_lat: int = 3, seed: int = 2) -> Conditions:
    """Returns what a variant is told."""
    generator = torch.Generator().manual_seed(seed)
    settings = {**PLAIN, **VARIANTS[name]}
    told: dict[str, Tensor] = {}
    if settings.get("context_dim"):
        told["text_emb"] = torch.randn(b, 1, 6, settings["context_dim"], generator=generator)
        mask = torch.arange(6) < torch.tensor([6, 3, 1, 0, 5])[:b, None]
        told["text_mask"] = mask[:, None]
    if settings.get("actions"):
        told["actions"] = torch.randn(b, num_lat, 1, ACTIONS * RATIO, generator=generator)
        told["motion"] = latent_motion(told["actions"], RATIO)
    return Conditions(**told)


def layout(num_lat: int = 3, views: int = 1):
    """Returns the layout of `video`."""
    return token_layout(num_lat, views=views, height=GRID[1], width=GRID[2])
