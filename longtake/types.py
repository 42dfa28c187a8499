"""The contracts between data, networks and objectives: one batch of clips, what a network is told, what a loss returns.

Axis letters, the same in the whole project: b batch, v views, t time (pixel frames of a clip, or its latent frames),
c channels, h w height and width, a action columns, s state columns, n texts of a clip, l tokens of a text, d width.
Inside networks: s slots, f latent frames of a slot. A single camera is v = 1. What is not there is None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorGroup:
    """Named tensors that travel together. Fields hold a tensor, a dict of tensors, anything else, or None."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Returns this group with every tensor on `device`; dtypes stay, so uint8 pixels travel as bytes."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Returns this group with `function` applied to every tensor in it."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, dict):
                return {name: apply(item) for name, item in value.items()}
            return value

        return type(self)(**{entry.name: apply(getattr(self, entry.name)) for entry in dataclasses.fields(self)})


@dataclass(frozen=True)
class Clip(TensorGroup):
    """A batch of clips. Exactly one of `video`, `latents`, `tokens` is usually present; the others are None.

    Attributes:
        video: uint8 in 0..255 as loaded, or float in [-1, 1] once scaled, [b v t c h w].
        latents: normalised latents of a video encoder, float, [b v t c h w] with t in latent frames.
        tokens: codebook indices, int64, [b v t h w] with t in latent frames.
        control: control videos by type ("depth", "labels", ...), each as `video`, or as `latents` where clips are
            latents, [b v t c h w].
        control_mask: for each control type which (clip, view) has it, bool [b v]; an absent one is zeros in `control`.
        actions: float32 [b t a]; `actions[:, t]` is what produced pixel frame t; `actions[:, 0]` of an episode is null.
        states: float32 [b t s], what was measured at pixel frame t.
        captions: the one caption drawn for each clip, b strings.
        text_emb: embeddings of n texts, float [b n l d], or None where `text_ids` is used.
        text_ids: word ids of n texts, int64 [b n l].
        text_mask: True where a text token is real, bool [b n l].
        view_ids: index of each view in the rig, int64 [b v].
        view_mask: True where the view is real, bool [b v].
        frame_mask: True where the pixel frame is real, bool [b t]; all False in a clip that only fills up a batch.
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

    def pin_memory(self) -> Clip:
        """Returns this batch in page-locked memory (called by torch's DataLoader)."""
        return self.map(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        """Returns the number of clips in the batch."""
        return len(self.key)


@dataclass(frozen=True)
class Conditions(TensorGroup):
    """What a network is told about a sequence of slots, encoded and grouped by latent frame. Every axis is real: what
    is equal for all views or frames has size 1 there only where that is said.

    Attributes:
        text_emb: embeddings of n texts, float [b n l d]; or None where `text_ids` is used.
        text_ids: word ids of n texts, int64 [b n l].
        text_mask: True where a text token is real, bool [b n l]; None: all are. A text without any real token was
            dropped (or is empty), and stands for "no text".
        text_index: which of the n texts a slot and view is told, int64 [b s v]; None: text 0.
        actions: what led to the pixel frames of a latent frame, float [b s f a], a = pixel frames a latent frame times
            action columns.
        actions_mask: False where actions are absent or dropped, bool [b s f]; None: all are given.
        motion: sums of the action columns of each latent frame (`latent_motion`), float [b s f 2a]; None: not told.
        fps: frames per second, float [b]; 0 or less where it was dropped.
        view_ids: index of each view in the rig, int64 [b v].
        view_mask: False for views that are absent: no other view sees them, bool [b v]; None: all are there.
        control: latents of control videos by type, [b s v f c h w].
        control_weight: how much each type counts where, 0..1, of the latents [b s v f h w], with size 1 in v, f, h and
            w where it is equal for all; None or a missing type: 1 everywhere.
        given: which latents are given, bool [b s v f], for networks that are told; None: those at noise level 0.
    """

    text_emb: Tensor | None = None
    text_ids: Tensor | None = None
    text_mask: Tensor | None = None
    text_index: Tensor | None = None
    actions: Tensor | None = None
    actions_mask: Tensor | None = None
    motion: Tensor | None = None
    fps: Tensor | None = None
    view_ids: Tensor | None = None
    view_mask: Tensor | None = None
    control: dict[str, Tensor] | None = None
    control_weight: dict[str, Tensor] | None = None
    given: Tensor | None = None

    @classmethod
    def stack(cls, branches: list[Conditions]) -> Conditions:
        """Returns the conditions of several branches of guidance as one batch, branch after branch.

        A mask that only some branches have is filled in as all True for the others.
        """
        has_mask = any(branch.text_mask is not None or branch.actions_mask is not None for branch in branches)
        filled = [_with_masks(branch) for branch in branches] if has_mask else branches
        stacked = {}
        for entry in dataclasses.fields(cls):
            values = [getattr(branch, entry.name) for branch in filled]
            present = [value for value in values if value is not None]
            assert len(present) in (0, len(values)), f"only {len(present)} of {len(values)} branches have {entry.name}"
            stacked[entry.name] = joined(present, dim=0)
        return cls(**stacked)


def joined(values: list[Any], dim: int) -> Any:
    """Returns tensors, or dicts of tensors with equal names, one after another along an axis; None of nothing."""
    if not values:
        return None
    if isinstance(values[0], dict):
        names = [sorted(value) for value in values]
        assert all(other == names[0] for other in names), f"different names: {names}"
        return {name: torch.cat([value[name] for value in values], dim) for name in values[0]}
    return torch.cat(values, dim)


def _with_masks(conditions: Conditions) -> Conditions:
    changes = {}
    text = conditions.text_ids if conditions.text_ids is not None else conditions.text_emb
    if conditions.text_mask is None and text is not None:
        changes["text_mask"] = torch.ones(text.shape[:3], dtype=torch.bool, device=text.device)
    if conditions.actions_mask is None and conditions.actions is not None:
        shape, device = conditions.actions.shape[:3], conditions.actions.device
        changes["actions_mask"] = torch.ones(shape, dtype=torch.bool, device=device)
    return dataclasses.replace(conditions, **changes)


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    Attributes:
        loss: mean over samples of each sample's mean over what it predicts, scalar.
        per_chunk: the loss of each chunk, averaged over samples, [chunks], detached.
        logs: scalars to log by name, detached.
    """

    loss: Tensor
    per_chunk: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
