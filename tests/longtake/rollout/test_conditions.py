"""Conditions of a clip, cut into chunks."""

from __future__ import annotations

import pytest
import torch

from longtake.errors import ConfigError
from longtake.rollout.conditions import clip_conditions, dropped, join_slots, of_chunks
from longtake.types import Clip


def clip(num_actions: int, **fields: torch.Tensor) -> Clip:
    actions = torch.arange(float(num_actions))[None, :, None].expand(2, -1, 1)
    return Clip(actions=actions, text_ids=torch.ones(2, 1, 4, dtype=torch.int64), key=["a", "b"], **fields)


def test_actions_go_to_the_chunk_and_latent_of_their_frames() -> None:
    actions = clip_conditions(clip(21), chunk_lat=3, num_chunks=2, ratio=4).actions
    assert actions is not None
    assert actions.shape == (2, 2, 3, 4)
    assert actions[0, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert actions[0, 1].tolist() == [[9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]]


def test_frames_that_only_round_up_repeat_the_last_action() -> None:
    actions = clip_conditions(clip(18), chunk_lat=3, num_chunks=2, ratio=4, num_frames_px=18).actions
    assert actions is not None
    assert actions[0, 1].tolist() == [[9, 10, 11, 12], [13, 14, 15, 16], [17, 17, 17, 17]]


def test_more_actions_than_frames_are_cut_and_fewer_are_an_error() -> None:
    longer = clip_conditions(clip(30), chunk_lat=3, num_chunks=2, ratio=4)
    assert torch.equal(longer.actions, clip_conditions(clip(21), chunk_lat=3, num_chunks=2, ratio=4).actions)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"actions are given for 20 frames, but 21 .*`num_frames`"):
        clip_conditions(clip(20), chunk_lat=3, num_chunks=2, ratio=4)
    with pytest.raises(ConfigError, match="20 frames, but 30"):
        clip_conditions(clip(20), chunk_lat=3, num_chunks=3, ratio=4, num_frames_px=30)


def test_slots_take_their_chunks() -> None:
    whole = clip_conditions(clip(33), chunk_lat=3, num_chunks=3, ratio=4)
    slots = of_chunks(whole, [0, 0, 2, 1])
    assert slots.actions is not None
    assert slots.actions.shape[1] == 4
    assert torch.equal(slots.actions[:, 2], whole.actions[:, 2])  # type: ignore[index]
    joined = join_slots(of_chunks(whole, [1]), of_chunks(whole, [2]))
    assert torch.equal(joined.actions, of_chunks(whole, [1, 2]).actions)  # type: ignore[arg-type]
    assert joined.text_ids is whole.text_ids


def test_dropping_masks_only_the_samples_named() -> None:
    whole = clip_conditions(clip(21), chunk_lat=3, num_chunks=2, ratio=4)
    out = dropped(whole, text=torch.tensor([True, False]), actions=torch.tensor([False, True]))
    assert out.text_mask is not None
    assert out.actions_mask is not None
    assert out.text_mask.any(dim=(1, 2)).tolist() == [False, True]
    assert out.actions_mask.flatten(1).all(1).tolist() == [True, False]
    assert out.actions_mask.flatten(1).any(1).tolist() == [True, False]
    padded = clip_conditions(
        clip(21, text_mask=torch.tensor([[[True, True, False, False]]] * 2)), chunk_lat=3, num_chunks=2, ratio=4
    )
    kept = dropped(padded, text=torch.tensor([True, False])).text_mask
    assert kept is not None
    assert kept[1].flatten().tolist() == [True, True, False, False]
    assert dropped(whole) == whole
