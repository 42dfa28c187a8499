"""Reads released Wan and LaCT weights into a VideoDiT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from longtake.errors import ConfigError
from longtake.networks.video_dit import VideoDiT
from longtake.pretrained.names import count_layers, to_longtake

WAN_HEAD_DIM = 128


def read_weights(path: str | Path) -> dict[str, Any]:
    """Returns the state dict of a .safetensors file, a .pt or .pth file, or a folder of safetensors shards.

    Nothing in a file is executed: pickles are read as tensors and plain containers only.

    Raises:
        ConfigError: nothing can be read there.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_shards(path)
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle, OS and format errors alike: the file is not what it should be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"no weights can be read from {path} ({reason}); expected a .safetensors file, a .pt file or a folder of "
            "safetensors shards. Change `init_from`."
        ) from error


def infer_sizes(state: Mapping[str, object], head_dim: int = WAN_HEAD_DIM) -> dict[str, Any]:
    """Returns the network's sizes from the shapes of released weights: the arguments of `VideoDiT` that are numbers.

    Args:
        state: weights of Wan or LaCT in either naming.
        head_dim: channels of an attention head, which no shape tells; Wan has 128.

    Returns:
        dim, ffn_dim, num_heads, num_layers, in_channels, out_channels, patch_size, freq_dim, text_dim; and for LaCT
        "mixer" = {fw_heads, inter_multi, momentum}, else None.

    Raises:
        ConfigError: these are no such weights, or their width is no multiple of `head_dim`.
    """
    tensors = to_longtake(state)
    patch = tensors["patch_embedding.weight"].shape
    dim, patch_size = patch[0], tuple(patch[2:])
    if dim % head_dim:
        raise ConfigError(
            f"the weights have a width of {dim}, which heads of {head_dim} channels do not divide; expected the width "
            "of a head that they were trained with. Change `head_dim`."
        )
    mixer = None
    if "blocks.0.self_attn.mixer.w0" in tensors:
        heads, hidden, width = tensors["blocks.0.self_attn.mixer.w0"].shape
        momentum = "blocks.0.self_attn.mixer.momentum_proj.weight" in tensors
        mixer = {"fw_heads": heads, "inter_multi": hidden // width, "momentum": momentum}
    return {
        "dim": dim,
        "ffn_dim": tensors["blocks.0.ffn.0.weight"].shape[0],
        "num_heads": dim // head_dim,
        "num_layers": count_layers(tensors),
        "in_channels": patch[1],
        "out_channels": tensors["head.head.weight"].shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
        "patch_size": patch_size,
        "freq_dim": tensors["time_embedding.0.weight"].shape[1],
        "text_dim": tensors["text.mlp.0.weight"].shape[1],
        "mixer": mixer,
    }


def load_pretrained(network: VideoDiT, state: Mapping[str, object], *, may_miss: set[str] | None = None) -> list[str]:
    """Puts released weights into a network, strictly.

    Args:
        network: of the same sizes.
        state: weights of Wan or LaCT in either naming.
        may_miss: parameters that keep their initial values if the weights do not hold them; None: what Wan does not
            have (actions, frame rate, and LaCT's tensors unless the weights hold some of them).

    Returns:
        The parameters that kept their initial values.

    Raises:
        ConfigError: something else is missing, something is left over, or a shape differs; all are named.
    """
    given, own = to_longtake(state), network.state_dict()
    if may_miss is None:
        may_miss = {name for name in own if name.startswith(("actions.", "frame_rate."))} | _new_in_mixers(own, given)
    missing = sorted(set(own) - set(given))
    wrong = [name for name in missing if name not in may_miss] + sorted(set(given) - set(own))
    wrong += [name for name in sorted(set(own) & set(given)) if own[name].shape != given[name].shape]
    if wrong:
        lines = "; ".join(f"{name}: {_shape(given, name)}, the network {_shape(own, name)}" for name in wrong[:10])
        raise ConfigError(
            f"{len(wrong)} tensors do not fit the network. The weights hold for {lines}. Change `init_from` or "
            "`network`."
        )
    network.load_state_dict(given, strict=False)
    return missing


def _new_in_mixers(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> set[str]:
    """Returns what the mixers have that the weights know nothing of: all, only momentum, or nothing.

    Weights of LaCT that lack one of its tensors are damaged; those of a plain Wan lack all of them.
    """
    new = {name for name in own if ".self_attn.mixer." in name}
    held = [name for name in given if ".self_attn.mixer." in name]
    if not held:
        return new
    has_momentum = any(".momentum_proj." in name for name in held)
    return set() if has_momentum else {name for name in new if ".momentum_proj." in name}


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "nothing"


def _read_shards(folder: Path) -> dict[str, Tensor]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        files = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError("no safetensors file in this folder")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= load_file(folder / name)
    return tensors
