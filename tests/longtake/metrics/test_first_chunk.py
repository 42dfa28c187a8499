"""The table of the first chunk on synthetic clips whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.metrics.first_chunk import FirstChunks, Table, first_chunk_table
from tests.longtake.metrics.test_metrics import moving


def panning(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns last frames [b 1 ...], true frames [b t ...] and turns [b t] of clips that pan left or right."""
    turns, clips = [], []
    for index in range(count):
        step = 3 if index % 2 else -3
        clips.append(moving([step] * 6, seed=index))
        turns.append([-float(step)] * 6)  # a turn to the right moves the picture to the left
    frames = torch.cat(clips)
    return frames[:, :1], frames[:, 1:], torch.tensor(turns)


@pytest.fixture(scope="module")
def table() -> Table:
    last, truth, turns = panning(12)
    noise = torch.randn((4, *truth.shape), generator=torch.Generator().manual_seed(0))
    good = (truth + 0.02 * noise).clamp(0, 1)
    wrong = truth.roll(1, dims=0)[None]  # what the neighbour's actions would have led to
    recoded = (truth + 0.01 * noise[0]).clamp(0, 1)
    chunks = FirstChunks(last, truth, recoded, {"true": good, "shuffled": wrong, "absent": wrong}, turns)
    return first_chunk_table(chunks, blur=1.5, least_turn=6.0)


def test_psnr_of_known_errors(table: Table) -> None:
    assert table["psnr, one sample"].mean == pytest.approx(-20 * np.log10(0.02), abs=0.3)
    assert table["psnr, mean of 4 samples"].mean == pytest.approx(-20 * np.log10(0.01), abs=0.3)
    assert table["psnr, ceiling of the first stage"].mean == pytest.approx(40, abs=0.3)


def test_a_good_prediction_beats_both_copies_and_the_blurred_one_is_better(table: Table) -> None:
    assert table["psnr, blurred copy"].mean > table["psnr, copy of the last frame"].mean
    assert table["one sample - copy"].low > 5
    assert table["mean of samples - blurred copy"].low > 5


def test_wrong_actions_cost_something_and_the_interval_says_so(table: Table) -> None:
    assert table["true - shuffled actions"].low > 5
    assert table["true - absent actions"].mean == table["true - shuffled actions"].mean


def test_looks_and_direction(table: Table) -> None:
    assert table["sharpness / true sharpness"].mean == pytest.approx(1.0, abs=0.3)
    assert table["frame change / true frame change"].mean == pytest.approx(1.0, abs=0.3)
    assert table["moves as turned, one sample"].mean == 1
    assert table["moves as turned, truth"].mean == 1


def test_predictions_that_turn_the_other_way_are_found() -> None:
    last, truth, turns = panning(6)
    chunks = FirstChunks(last, truth, truth, {"true": truth[None]}, -turns)
    table = first_chunk_table(chunks, blur=0.0)
    assert table["moves as turned, one sample"].mean == 0
    with pytest.raises(KeyError):
        table["true - shuffled actions"]


def test_a_still_prediction_has_no_change() -> None:
    last, truth, turns = panning(4)
    still = last.expand_as(truth)[None]
    table = first_chunk_table(FirstChunks(last, truth, truth, {"true": still}, turns), blur=0.0)
    assert table["frame change / true frame change"].mean == 0
    assert table["one sample - copy"].mean == 0


def test_clips_that_hardly_turn_do_not_count() -> None:
    last, truth, turns = panning(6)
    turns[:2] *= 0.01
    table = first_chunk_table(FirstChunks(last, truth, truth, {"true": truth[None]}, turns), blur=0.0, least_turn=1.0)
    assert next(row.num_clips for row in table.rows if row.name == "moves as turned, truth") == 4
    assert "4 clips" in table.text()
    assert table.to_json()["one sample - copy"]["num_clips"] == 6
