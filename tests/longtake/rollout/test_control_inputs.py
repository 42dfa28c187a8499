"""Control videos as conditions: chunks, weights by type, views and place; captions of views."""

from __future__ import annotations

import pytest
import torch

from longtake.errors import ConfigError
from longtake.rollout.conditions import clip_conditions, join_slots, of_chunks, slot_part
from longtake.rollout.control_inputs import control_chunks, latent_weights, weight_by_type
from longtake.types import Clip


def control(frames: int = 6) -> dict[str, torch.Tensor]:
    values = torch.arange(float(frames)).view(1, 1, -1, 1, 1, 1)
    return {"depth": values.expand(2, 3, -1, 4, 2, 2), "labels": -values.expand(2, 3, -1, 4, 2, 2)}


def test_latents_are_cut_into_chunks() -> None:
    latents, weights = control_chunks(control(), chunk_lat=3, num_chunks=2)
    assert latents["depth"].shape == (2, 2, 3, 3, 4, 2, 2)
    assert latents["depth"][0, :, 0, :, 0, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights["labels"].shape == (2, 2, 3, 1, 1, 1)
    assert (weights["labels"] == 1).all()


def test_weights_of_types_views_and_places_multiply() -> None:
    there = {"depth": torch.tensor([[True, False, True], [True, True, True]])}
    where = {"depth": torch.rand(2, 3, 6, 2, 2)}
    weight = {"depth": 0.5, "labels": 0.0}
    latents, weights = control_chunks(control(), chunk_lat=2, num_chunks=3, weight=weight, there=there, where=where)
    assert set(latents) == set(weights) == {"depth"}  # what has weight 0 is not even computed
    found = weights["depth"].transpose(1, 2).flatten(2, 3)
    wanted = 0.5 * where["depth"] * there["depth"][:, :, None, None, None]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("weight", "words"),
    [(1.5, "expected 0 to 1"), ({"depth": -0.1}, "control_weight of depth"), ({"edge": 1.0}, "unknown control type")],
)
def test_bad_weights_are_named(weight: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        weight_by_type(weight, ("depth", "labels"))  # type: ignore[arg-type]


def test_a_control_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 6 latent frames, but 9 are wanted"):
        control_chunks(control(), chunk_lat=3, num_chunks=3)


def test_a_mask_of_pixels_becomes_weights_of_latents() -> None:
    mask = torch.zeros(1, 2, 9, 16, 16)
    mask[:, 0, 0, :, 8:] = 1  # the first frame of view 0, its right half
    mask[:, 1, 1:5] = 1  # frames 1..4 of view 1: its second latent
    found = latent_weights(mask, (3, 2, 2))
    assert found.shape == (1, 2, 3, 2, 2)
    assert found[0, 0].tolist() == [[[0, 1], [0, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert found[0, 1, :, 0, 0].tolist() == [0, 1, 0]
    assert latent_weights(torch.ones(1, 1, 1, 8, 8), (1, 1, 1)).item() == 1


def test_a_clip_with_a_text_a_view_tells_each_its_own() -> None:
    ids = torch.arange(3).expand(2, -1)
    several = Clip(text_ids=torch.zeros(2, 3, 4, dtype=torch.int64), view_ids=ids, key=["a", "b"])
    made = clip_conditions(several, chunk_lat=3, num_chunks=2, ratio=4)
    assert made.text_index is not None
    assert made.text_index[1].tolist() == [[0, 1, 2], [0, 1, 2]]
    one = Clip(text_ids=torch.zeros(2, 1, 4, dtype=torch.int64), view_ids=ids, key=["a", "b"])
    assert clip_conditions(one, chunk_lat=3, num_chunks=2, ratio=4).text_index is None


def test_one_view_is_told_as_before() -> None:
    clip = Clip(
        view_ids=torch.zeros(2, 1, dtype=torch.int64), view_mask=torch.ones(2, 1, dtype=torch.bool), key=["a", "b"]
    )
    made = clip_conditions(clip, chunk_lat=3, num_chunks=2, ratio=4)
    assert made.view_mask is None
    assert made.control is None
    assert made.control_weight is None


def test_control_follows_its_slots() -> None:
    clip = Clip(control=control(), view_ids=torch.arange(3).expand(2, -1), key=["a", "b"])
    whole = clip_conditions(clip, chunk_lat=2, num_chunks=3, ratio=4, control_weight=0.5)
    assert whole.control is not None
    part = of_chunks(whole, [2, 0])
    assert part.control is not None
    assert torch.equal(part.control["depth"], whole.control["depth"][:, [2, 0]])
    both = join_slots(slot_part(of_chunks(whole, [1])), of_chunks(whole, [2]))
    assert both.control is not None
    assert both.control_weight is not None
    assert torch.equal(both.control["labels"], whole.control["labels"][:, 1:])
    assert (both.control_weight["labels"] == 0.5).all()
