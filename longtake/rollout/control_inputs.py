"""From control videos that are encoded already to what a network is told: cut into chunks, and weighted by place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice

Weight = float | Mapping[str, float]


def control_chunks(
    control: Mapping[str, Tensor],
    *,
    chunk_lat: int,
    num_chunks: int,
    weight: Weight = 1.0,
    there: Mapping[str, Tensor] | None = None,
    where: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns latents [b s v f c h w] and weights [b s v f h w] of `Conditions`, the chunks as slots, by type.

    A type whose weight is 0 is left out: the network then spends nothing on it.

    Args:
        control: latents of the control videos by type, [b v t c h w].
        chunk_lat: latent frames of a chunk.
        num_chunks: chunks wanted from the first one on.
        weight: of all types, or by type; 0..1.
        there: which (clip, view) has a control video, bool [b v] by type; None: all do. An absent one has weight 0.
        where: how much it counts where, 0..1, of the latents [b v t h w] by type (see `latent_weights`); None: 1.

    Raises:
        ConfigError: a weight outside of [0, 1] or of a type that there is not, or a control video that is too short.
    """
    weights = weight_by_type(weight, tuple(control))
    num_lat, slots = chunk_lat * num_chunks, (num_chunks, chunk_lat)
    latents, found = {}, {}
    for kind, own in control.items():
        if weights[kind] == 0:
            continue
        if own.shape[2] < num_lat:
            raise ConfigError(
                f"the control video {kind!r} has {own.shape[2]} latent frames, but {num_lat} are wanted. Give a longer "
                "control video or lower `num_frames`."
            )
        latents[kind] = own[:, :, :num_lat].unflatten(2, slots).transpose(1, 2)
        b, views = own.shape[:2]
        value = torch.full((b, num_chunks, views, 1, 1, 1), weights[kind], device=own.device)
        if there is not None and kind in there:
            value = value * there[kind].to(own.device)[:, None, :, None, None, None]
        if where is not None and kind in where:
            value = value * where[kind][:, :, :num_lat].unflatten(2, slots).transpose(1, 2)
        found[kind] = value
    return latents, found


def weight_by_type(weight: Weight, types: tuple[str, ...]) -> dict[str, float]:
    """Returns the weight of every type: one number for all, or one each, 1 where there is none.

    Raises:
        ConfigError: a number outside of [0, 1], or an unknown type.
    """
    given = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(types, weight)
    for kind, value in given.items():
        if kind not in types:
            raise unknown_choice("control type", kind, types, "control_weight")
        if not 0 <= value <= 1:
            raise ConfigError(
                f"control_weight{f' of {kind}' if isinstance(weight, Mapping) else ''} is {value}; expected 0 to 1. "
                "Change `control_weight`."
            )
    return {kind: float(given.get(kind, 1.0)) for kind in types}


def latent_weights(mask: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Returns a mask of pixels on the grid of latents: the first frame by itself, as an encoder codes it, the rest
    trilinearly (Cosmos Transfer 2.5).

    Args:
        mask: 0..1, 1 where control counts, [b v t h w] from a causal start.
        size: latent frames, rows and columns.

    Returns:
        [b v t' h' w'], float32.
    """
    frames, *grid = size
    b, views = mask.shape[:2]
    clips = mask.float().flatten(0, 1)[:, None]  # [n 1 t h w]
    parts = [F.interpolate(clips[:, :, 0], size=tuple(grid), mode="bilinear", align_corners=False)[:, :, None]]
    if frames > 1:
        parts.append(F.interpolate(clips[:, :, 1:], size=(frames - 1, *grid), mode="trilinear", align_corners=False))
    return torch.cat(parts, dim=2)[:, 0].unflatten(0, (b, views))
