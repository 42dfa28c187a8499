"""What a clip tells the network, cut into chunks: `Conditions` whose slot axis is the chunks 0, 1, ... of the clip.

Objectives and rollouts pick from it what the slots of a pass need. The dropping that guidance needs is done here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.geometry import group_by_latent, pixel_frames
from longtake.rollout.control_inputs import Weight, control_chunks
from longtake.types import Clip, Conditions, joined

# fields of Conditions with a slot axis, always the second one
PER_SLOT = ("text_index", "actions", "actions_mask", "motion", "control", "control_weight", "given")

ConditionSource = Conditions | Callable[[int], Conditions]


def clip_conditions(
    clip: Clip,
    *,
    chunk_lat: int,
    num_chunks: int,
    ratio: int,
    num_frames_px: int | None = None,
    own_starts: bool = False,
    control_weight: Weight = 1.0,
    control_where: Mapping[str, Tensor] | None = None,
) -> Conditions:
    """Returns the conditions of the chunks of a clip.

    Args:
        clip: texts and control videos already encoded; actions [b t a] from pixel frame 0 on. Where there are as many
            texts as views, and more than one, each view is told its own, else all are told the first one.
        chunk_lat: latent frames of a chunk.
        num_chunks: chunks wanted from the first one on.
        ratio: pixel frames a latent frame.
        num_frames_px: pixel frames that must have an action; None: all of the chunks. Frames after them are only there
            because a length was rounded up; they repeat the last action.
        own_starts: whether every chunk is a causal start of its own (`TrainedFor.own_starts`).
        control_weight: see `control_chunks`.
        control_where: see `control_chunks`.

    Raises:
        ConfigError: there are fewer actions than that, or the control is too short or weighted wrongly.
    """
    actions, block_lat = clip.actions, chunk_lat if own_starts else None
    if actions is not None:
        wanted = pixel_frames(num_chunks * chunk_lat, ratio, block_lat)
        needed = wanted if num_frames_px is None else min(num_frames_px, wanted)
        if actions.shape[1] < needed:
            raise ConfigError(
                f"actions are given for {actions.shape[1]} frames, but {needed} frames are wanted. Give actions for "
                "every frame (`actions`) or lower `num_frames`."
            )
        actions = actions[:, :wanted]
        missing = wanted - actions.shape[1]
        if missing > 0:
            actions = torch.cat([actions, actions[:, -1:].expand(-1, missing, -1)], dim=1)
        actions = group_by_latent(actions, ratio, block_lat).unflatten(1, (num_chunks, chunk_lat))
    control, weights = control_chunks(
        clip.control or {},
        chunk_lat=chunk_lat,
        num_chunks=num_chunks,
        weight=control_weight if clip.control else 1.0,
        there=clip.control_mask,
        where=control_where,
    )
    views = 1 if clip.view_ids is None else clip.view_ids.shape[1]
    return Conditions(
        text_emb=clip.text_emb,
        text_ids=clip.text_ids,
        text_mask=clip.text_mask,
        text_index=_text_of_each_view(clip, views, num_chunks),
        actions=actions,
        fps=clip.fps,
        view_ids=clip.view_ids,
        view_mask=clip.view_mask if views > 1 else None,
        control=control or None,
        control_weight=weights or None,
    )


def _text_of_each_view(clip: Clip, views: int, num_chunks: int) -> Tensor | None:
    texts = clip.text_ids if clip.text_ids is not None else clip.text_emb
    if texts is None or views == 1 or texts.shape[1] != views:
        return None
    return torch.arange(views, device=texts.device).expand(len(texts), num_chunks, -1)


def of_chunks(conditions: Conditions, chunks: Sequence[int]) -> Conditions:
    """Returns the conditions of slots that hold `chunks`, in that order; a chunk may come several times."""

    def pick(tensor: Tensor) -> Tensor:
        assert max(chunks) < tensor.shape[1], (
            f"chunk {max(chunks)} has no conditions; there are {tensor.shape[1]} chunks"
        )
        return tensor.index_select(1, torch.tensor(list(chunks), device=tensor.device))

    return _on_slots(conditions, pick)


def of_rows(conditions: Conditions, rows: Tensor, chunks: Tensor) -> Conditions:
    """Returns the conditions of some samples, each with slots of its own.

    Args:
        conditions: of b samples.
        rows: indices of the samples, int64 [n] on the CPU.
        chunks: for each of them the chunks that its slots hold, int64 [n s] on the CPU.
    """
    own = conditions.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def pick(tensor: Tensor) -> Tensor:
        picked = chunks.to(tensor.device)
        return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], picked]

    return _on_slots(own, pick)


def join_slots(first: Conditions, second: Conditions) -> Conditions:
    """Returns the conditions of the slots of `first`, then those of `second`; texts and the rest are of `second`."""
    changes = {}
    for name in PER_SLOT:
        one, two = getattr(first, name), getattr(second, name)
        assert (one is None) == (two is None), f"{name} is given for some slots only"
        changes[name] = None if one is None else joined([one, two], dim=1)
    return dataclasses.replace(second, **changes)


def with_slots(conditions: Conditions, slots: Conditions) -> Conditions:
    """Returns `conditions` for other slots: everything that has a slot axis comes from `slots`."""
    return dataclasses.replace(conditions, **{name: getattr(slots, name) for name in PER_SLOT})


def slot_part(conditions: Conditions) -> Conditions:
    """Returns only what belongs to the slots, without texts and the other things that hold for the whole video."""
    return Conditions(**{name: getattr(conditions, name) for name in PER_SLOT})


def dropped(
    conditions: Conditions,
    *,
    text: Tensor | None = None,
    actions: Tensor | None = None,
    control: Tensor | None = None,
) -> Conditions:
    """Returns the conditions without the texts, actions and control of some samples.

    Args:
        conditions: of b samples.
        text: True for the samples that lose their text, bool [b]; None: nobody does, and no mask is made.
        actions: the same for actions.
        control: the same for control: its weight becomes 0.
    """
    changes = {}
    texts = conditions.text_ids if conditions.text_ids is not None else conditions.text_emb
    if text is not None and texts is not None:
        keep = ~text.to(texts.device)[:, None, None].expand(texts.shape[:3])
        changes["text_mask"] = keep if conditions.text_mask is None else conditions.text_mask & keep
    if actions is not None and conditions.actions is not None:
        keep = ~actions.to(conditions.actions.device)[:, None, None].expand(conditions.actions.shape[:3])
        changes["actions_mask"] = keep if conditions.actions_mask is None else conditions.actions_mask & keep
    if control is not None and conditions.control:
        weights = conditions.control_weight or {}
        kept = (~control).float().view(-1, *[1] * 5)
        changes["control_weight"] = {
            kind: kept.to(latents.device) * weights.get(kind, latents.new_ones(*latents.shape[:2], 1, 1, 1, 1))
            for kind, latents in conditions.control.items()
        }
    return dataclasses.replace(conditions, **changes)


def _on_slots(conditions: Conditions, function: Callable[[Tensor], Tensor]) -> Conditions:
    part = slot_part(conditions).map(function)
    return dataclasses.replace(conditions, **{name: getattr(part, name) for name in PER_SLOT})
