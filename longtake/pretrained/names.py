"""Names of the tensors of Wan 2.1 (original and diffusers naming), with LaCT's, and of ours, in both directions.

No tensor is transposed or reshaped. Ours keeps q, k and v in one tensor, so one of our names may stand for several of
theirs, stacked on axis 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from longtake.errors import ConfigError

Naming = Literal["original", "diffusers"]

# Ours: (original, diffusers). A stem stands for its .weight and .bias.
_ENDS: dict[str, tuple[str, str]] = {
    "patch_embedding": ("patch_embedding", "patch_embedding"),
    "text.mlp.0": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text.mlp.2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time_embedding.0": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time_embedding.2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "time_projection": ("time_projection.1", "condition_embedder.time_proj"),
    "head.head": ("head.head", "proj_out"),
}
_BLOCK: dict[str, tuple[str, str]] = {
    "self_attn.o": ("self_attn.o", "attn1.to_out.0"),
    "cross_attn.q": ("cross_attn.q", "attn2.to_q"),
    "cross_attn.o": ("cross_attn.o", "attn2.to_out.0"),
    "norm3": ("norm3", "norm2"),  # diffusers swaps the names of norm2 and norm3
    "ffn.0": ("ffn.0", "ffn.net.0.proj"),
    "ffn.2": ("ffn.2", "ffn.net.2"),
}
_FUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "self_attn.qkv": (
        ("self_attn.q", "self_attn.k", "self_attn.v"),
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ),
    "cross_attn.kv": (("cross_attn.k", "cross_attn.v"), ("attn2.to_k", "attn2.to_v")),
}
_SINGLE: dict[str, tuple[str, str]] = {
    "modulation": ("modulation", "scale_shift_table"),
    "self_attn.norm_q.weight": ("self_attn.norm_q.weight", "attn1.norm_q.weight"),
    "self_attn.norm_k.weight": ("self_attn.norm_k.weight", "attn1.norm_k.weight"),
    "cross_attn.norm_q.weight": ("cross_attn.norm_q.weight", "attn2.norm_q.weight"),
    "cross_attn.norm_k.weight": ("cross_attn.norm_k.weight", "attn2.norm_k.weight"),
}
LACT_TENSORS = (
    "w0",
    "w1",
    "w2",
    "qk_scale",
    "qk_offset",
    "lr_proj.weight",
    "lr_proj.bias",
    "output_norm.weight",
    "ttt_scale_proj.weight",
    "ttt_scale_proj.bias",
)
_MOMENTUM = {"momentum_proj.weight": "momentum_proj.0.weight", "momentum_proj.bias": "momentum_proj.0.bias"}
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("module.", "model.")
_NESTS = ("generator_ema", "generator", "model", "state_dict", "module")


def name_map(num_layers: int, naming: Naming) -> dict[str, tuple[str, ...]]:
    """Returns for each of our names the released ones that it stands for, stacked on axis 0 where there are several."""
    side = 0 if naming == "original" else 1
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in _ENDS.items():
        for leaf in ("weight", "bias"):
            names[f"{ours}.{leaf}"] = (f"{theirs[side]}.{leaf}",)
    names["head.modulation"] = ("head.modulation" if naming == "original" else "scale_shift_table",)
    for layer in range(num_layers):
        prefix = f"blocks.{layer}."
        for leaf in ("weight", "bias"):
            for ours, theirs in _BLOCK.items():
                names[f"{prefix}{ours}.{leaf}"] = (f"{prefix}{theirs[side]}.{leaf}",)
            for ours, several in _FUSED.items():
                names[f"{prefix}{ours}.{leaf}"] = tuple(f"{prefix}{part}.{leaf}" for part in several[side])
        for ours, theirs in _SINGLE.items():
            names[f"{prefix}{ours}"] = (f"{prefix}{theirs[side]}",)
        attention = "self_attn" if naming == "original" else "attn1"
        for ours, theirs in [(name, name) for name in LACT_TENSORS] + list(_MOMENTUM.items()):
            names[f"{prefix}self_attn.mixer.{ours}"] = (f"{prefix}{attention}.{theirs}",)
    return names


def unwrapped(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Returns the tensors of a state dict without what wrappers added: {"generator": ...}, module., _orig_mod. ..."""
    nest = next((key for key in _NESTS if isinstance(state.get(key), Mapping)), None)
    if nest is not None:
        return unwrapped(state[nest])  # type: ignore[arg-type]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        tensors = {name.replace(wrapper, ""): value for name, value in tensors.items()}
    while tensors and (prefix := _common_prefix(tensors)):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def detect_naming(names: Iterable[str]) -> Naming:
    """Returns whose names these are.

    Raises:
        ConfigError: they are of no Wan transformer.
    """
    names = set(names)
    if "blocks.0.self_attn.q.weight" in names:
        return "original"
    if "blocks.0.attn1.to_q.weight" in names:
        return "diffusers"
    some = ", ".join(sorted(names)[:3]) or "nothing"
    raise ConfigError(
        f"these are not the weights of a Wan transformer (they hold {some}, ...); expected "
        "blocks.0.self_attn.q.weight or blocks.0.attn1.to_q.weight. Change `init_from`."
    )


def to_longtake(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Returns released weights under our names.

    Args:
        state: weights of Wan or LaCT in either naming, wrapped or not.

    Raises:
        ConfigError: tensors are left over, or one of those that we keep in one is missing; they are named.
    """
    tensors = unwrapped(state)
    naming = detect_naming(tensors)
    names = name_map(count_layers(tensors), naming)
    known = {theirs for several in names.values() for theirs in several}
    left_over = sorted(set(tensors) - known)
    half = [
        theirs
        for several in names.values()
        if any(name in tensors for name in several)
        for theirs in several
        if theirs not in tensors
    ]
    if left_over or half:
        raise ConfigError(
            f"the weights do not fit the names of Wan ({naming}): left over {_listed(left_over)}; missing "
            f"{_listed(half)}. Change `init_from`."
        )
    stacked = {ours: several for ours, several in names.items() if several[0] in tensors}
    return {
        ours: tensors[several[0]] if len(several) == 1 else torch.cat([tensors[name] for name in several])
        for ours, several in stacked.items()
    }


def from_longtake(state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Returns our weights under released names.

    Raises:
        ConfigError: tensors have no released name (actions, frame rate, word tables); they are named.
    """
    names = name_map(count_layers(state), naming)
    left_over = sorted(set(state) - set(names))
    if left_over:
        raise ConfigError(f"these tensors have no name in Wan ({naming}): {_listed(left_over)}. Change `network`.")
    released = {}
    for ours, tensor in state.items():
        parts = tensor.chunk(len(names[ours])) if len(names[ours]) > 1 else (tensor,)
        released |= {name: part.contiguous() for name, part in zip(names[ours], parts, strict=True)}
    return released


def count_layers(names: Iterable[str]) -> int:
    """Returns the number of blocks that are named."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _common_prefix(names: Iterable[str]) -> str | None:
    names = list(names)
    return next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names)), None)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) + more) if names else "nothing"
