"""The contract between data and models: one batch of clips.

Axis letters, the same in the whole project: b batch, v views, t time (pixel frames of a clip, or its latent frames),
c channels, h w height and width, a action columns, s state columns, n texts of a clip, l tokens of a text, d width.
A single camera is v = 1. What a clip does not have is None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """A batch of clips. Exactly one of `video`, `latents`, `tokens` is usually present; the others are None.

    Attributes:
        video: uint8 in 0..255 as loaded, or float in [-1, 1] once scaled, [b v t c h w].
        latents: normalised latents of a video encoder, float, [b v t c h w] with t in latent frames.
        tokens: codebook indices, int64, [b v t h w] with t in latent frames.
        control: control videos by type ("depth", "labels", ...), each as `video`, [b v t c h w].
        control_mask: for each control type which (clip, view) has it, bool [b v]; an absent one is all zeros in `control`.
        actions: float32 [b t a]; `actions[:, t]` is what produced pixel frame t, and `actions[:, 0]` of an episode is null.
        states: float32 [b t s], what was measured at pixel frame t.
        captions: the one caption drawn for each clip, b strings.
        text_emb: embeddings of n texts, float [b n l d], or None where `text_ids` is used.
        text_ids: word ids of n texts, int64 [b n l].
        text_mask: True where a text token is real, bool [b n l].
        view_ids: index of each view in the rig, int64 [b v].
        view_mask: True where the view is real, bool [b v].
        frame_mask: True where the pixel frame is real, bool [b t]; all False in a clip that only fills up a validation batch.
        fps: frames per second after striding, float32 [b].
        key: name of each sample, b strings.
        position: position of each sample in the training plan (validation: its index in the fixed list), int64 [b].
    """

    video: Tensor | None = None
    latents: Tensor | None = None
    tokens: Tensor | None = None
    control: dict[str, Tensor] | None = None
    control_mask: dict[str, Tensor] | None = None
    actions: Tensor | None = None
    states: Tensor | None = None
    captions: list[str] | None = None
    text_emb: Tensor | None = None
    text_ids: Tensor | None = None
    text_mask: Tensor | None = None
    view_ids: Tensor | None = None
    view_mask: Tensor | None = None
    frame_mask: Tensor | None = None
    fps: Tensor | None = None
    key: list[str] = field(default_factory=list)
    position: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Clip:
        """Returns this batch with every tensor on `device`; dtypes stay, so uint8 pixels travel as bytes."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Clip:
        """Returns this batch in page-locked memory (called by torch's DataLoader)."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> Clip:
        """Returns this batch with `function` applied to every tensor in it."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, dict):
                return {name: apply(item) for name, item in value.items()}
            return value

        return Clip(**{entry.name: apply(getattr(self, entry.name)) for entry in dataclasses.fields(self)})

    def __len__(self) -> int:
        """Returns the number of clips in the batch."""
        return len(self.key)
