"""Released Cosmos AR weights (`model.pt`) into a TokenTransformer, and ours out under their names.

Ours keeps q, k, v in one tensor, and gate and up in one; no tensor is transposed. Their rows of wqkv and kv follow each
other in the same order, so the fused form that some checkpoints have needs no reordering either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.token_transformer import TokenTransformer
from longtake.pretrained.names import unwrapped
from longtake.pretrained.wan import read_weights

_ENDS = {
    "embedding.table.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "head.output.weight": "output.weight",
}
# Ours: (theirs, stacked on axis 0 where there are several).
_LAYER: dict[str, tuple[str, ...]] = {
    "attn_norm.weight": ("attention_norm.weight",),
    "qkv.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "q_norm.weight": ("attention.q_norm.weight",),
    "k_norm.weight": ("attention.k_norm.weight",),
    "out.weight": ("attention.wo.weight",),
    "cross_norm.weight": ("cross_attention_norm.weight",),
    "cross_q.weight": ("cross_attention.wq.weight",),
    "cross_kv.weight": ("cross_attention.wk.weight", "cross_attention.wv.weight"),
    "cross_q_norm.weight": ("cross_attention.q_norm.weight",),
    "cross_k_norm.weight": ("cross_attention.k_norm.weight",),
    "cross_out.weight": ("cross_attention.wo.weight",),
    "ffn_norm.weight": ("ffn_norm.weight",),
    "gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
    "down.weight": ("feed_forward.w2.weight",),
}
_FUSED = {"qkv.weight": "attention.wqkv.weight"}
_IGNORED = "_extra_state"  # what TransformerEngine adds


def to_longtake(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Returns released weights under our names.

    Args:
        state: of `model.pt`, wrapped in {"model": ...} and prefixed with `model.` or not.

    Raises:
        ConfigError: these are not the weights of a Cosmos AR network, or tensors are missing or left over; named.
    """
    tensors = {name: value for name, value in unwrapped(_without_extra(state)).items() if _IGNORED not in name}
    if _ENDS["embedding.table.weight"] not in tensors:
        some = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ConfigError(
            f"these are not the weights of a Cosmos AR network (they hold {some}, ...); expected "
            "tok_embeddings.weight. Change `init_from`."
        )
    found: dict[str, Tensor] = {}
    half: list[str] = []
    for ours, theirs in _name_map(_num_layers(tensors, "layers")).items():
        fused = _fused_name(ours)
        if fused in tensors:
            found[ours] = tensors.pop(fused)
        elif all(name in tensors for name in theirs):
            parts = [tensors.pop(name) for name in theirs]
            found[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            half += [name for name in theirs if name not in tensors and any(other in tensors for other in theirs)]
    if tensors or half:
        raise ConfigError(
            f"the weights do not fit the names of Cosmos AR: left over {_listed(sorted(tensors))}; missing "
            f"{_listed(half)}. Change `init_from`."
        )
    return found


def from_longtake(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns our weights under released names, q, k, v and w1, w3 apart.

    Args:
        state: of a `TokenTransformer` with the full head.

    Raises:
        ConfigError: tensors have no released name (actions, adaLN, factorised heads); they are named.
    """
    names = _name_map(_num_layers(state, "layers"))
    left_over = sorted(set(state) - set(names))
    if left_over:
        raise ConfigError(f"these tensors have no name in Cosmos AR: {_listed(left_over)}. Change `network`.")
    released: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        for name, part in zip(names[ours], _parts(ours, tensor, state), strict=True):
            released[name] = part.contiguous()
    return released


def load_cosmos_ar(network: TokenTransformer, path: str | Path) -> None:
    """Puts a released `model.pt` into a network, strictly; nothing in the file is executed.

    Args:
        network: of the same sizes, with the full head and without actions.
        path: the file.

    Raises:
        ConfigError: it cannot be read, or a name or shape differs; all are named.
    """
    given, own = to_longtake(read_weights(path)), network.state_dict()
    wrong = sorted(set(own) ^ set(given))
    wrong += sorted(name for name in set(own) & set(given) if own[name].shape != given[name].shape)
    if wrong:
        lines = "; ".join(f"{name}: {_shape(given, name)}, the network {_shape(own, name)}" for name in wrong[:10])
        raise ConfigError(
            f"{len(wrong)} tensors do not fit the network. The weights hold for {lines}. Change `init_from` or "
            "`network`."
        )
    network.load_state_dict(given)


def _name_map(num_layers: int) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _ENDS.items()}
    for layer in range(num_layers):
        prefix = f"layers.{layer}."
        names |= {prefix + ours: tuple(prefix + name for name in theirs) for ours, theirs in _LAYER.items()}
    return names


def _parts(ours: str, tensor: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    end = ours.split(".", 2)[-1] if ours.startswith("layers.") else ours
    if end == "qkv.weight":
        queries = state[ours.replace("qkv", "out")].shape[1]
        keys = (len(tensor) - queries) // 2
        return tensor.split((queries, keys, keys))
    return tensor.chunk(len(_LAYER[end])) if end in _LAYER else (tensor,)


def _fused_name(ours: str) -> str | None:
    prefix, _, end = ours.rpartition("qkv.weight")
    return f"{prefix}{_FUSED['qkv.weight']}" if prefix and not end else None


def _without_extra(state: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in state.items() if _IGNORED not in name}


def _num_layers(names: Mapping[str, object], stem: str) -> int:
    found = (re.match(rf"{stem}\.(\d+)\.", name) for name in names)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) + more) if names else "nothing"


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "nothing"
