"""The plan: endless permutations, exact shares, pure runs, and ranks that share every position once."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from datamodules.loading.plan import CYCLE, SamplePlan, Stream, cycle_counts


def stream(
    name: str, size: int, *, dataset: int = 0, num_frames: int = 9, weight: float = 1.0, **more: object
) -> Stream:
    return Stream(
        name=name,
        samples=np.arange(size),
        starts=None,
        dataset=dataset,
        num_frames=num_frames,
        shape=(num_frames,),
        weight=weight,
        **more,  # type: ignore[arg-type]
    )


def test_each_epoch_is_another_permutation() -> None:
    plan = SamplePlan([stream("a", 23)], seed=5)
    epochs = [[plan[epoch * 23 + i].sample for i in range(23)] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_the_seed_changes_the_order_and_nothing_else_does() -> None:
    first, again, other = (SamplePlan([stream("a", 50)], seed=seed) for seed in (1, 1, 2))
    order = [first[i].sample for i in range(50)]
    assert order == [again[i].sample for i in reversed(range(50))][::-1]
    assert order != [other[i].sample for i in range(50)]


@pytest.mark.parametrize(("batch_size", "size"), [(1, 1), (4, 1), (3, 2), (5, 3), (2, 4)])
@pytest.mark.parametrize("start", [0, 17])
def test_ranks_share_every_position_once(batch_size: int, size: int, start: int) -> None:
    plan = SamplePlan([stream("a", 10)], seed=0)
    used = []
    for rank in range(size):
        for batch in islice(plan.batches(start, batch_size, rank, size), 8):
            assert len(batch) == batch_size
            assert all(position % size == (rank + start) % size for position in batch)
            used += batch
    assert sorted(used) == list(range(start, start + 8 * batch_size * size))


def test_weights_are_kept_in_every_cycle() -> None:
    streams = [stream("a", 30, weight=3.0), stream("b", 500, dataset=1, weight=1.0)]
    plan = SamplePlan(streams, seed=0)
    for cycle in range(3):
        drawn = Counter(plan[cycle * CYCLE + i].dataset for i in range(CYCLE))
        assert drawn == {0: 750, 1: 250}


def test_each_stream_of_a_mix_goes_through_its_own_epochs() -> None:
    plan = SamplePlan([stream("a", 30, weight=3.0), stream("b", 7, dataset=1)], seed=0)
    drawn = [plan[i] for i in range(2000)]
    for dataset, size in ((0, 30), (1, 7)):
        samples = [draw.sample for draw in drawn if draw.dataset == dataset]
        for begin in range(0, len(samples) - size, size):
            assert sorted(samples[begin : begin + size]) == list(range(size))


def test_a_tiny_weight_is_still_drawn() -> None:
    assert cycle_counts([1.0, 1e-9]) == (1000, 1)
    assert sum(cycle_counts([1.0] * 7)) == CYCLE


def test_runs_of_one_shape_never_mix_in_a_batch() -> None:
    plan = SamplePlan([stream("s", 40, num_frames=9), stream("l", 20, num_frames=17)], seed=3, run=16)
    for size in (1, 2, 4):
        used: list[int] = []
        batches = [list(islice(plan.batches(0, 3, rank, size), 50)) for rank in range(size)]
        for group in zip(*batches, strict=True):
            assert len({len(batch) for batch in group}) == 1
            assert len({plan[position].num_frames for batch in group for position in batch}) == 1
            used += [position for batch in group for position in batch]
        assert sorted(used) == list(range(len(used)))


def test_ranks_that_cannot_share_a_run_are_told() -> None:
    plan = SamplePlan([stream("s", 40, num_frames=9), stream("l", 20, num_frames=17)], seed=3, run=16)
    assert plan.misfit(0, 3)
    assert plan.misfit(6, 4)
    assert not plan.misfit(8, 4)
    assert not SamplePlan([stream("s", 40)], seed=3, run=16).misfit(5, 3)


def test_order_by_shards_mixes_only_inside_blocks() -> None:
    groups = (5, 8, 3, 9, 5)
    plan = SamplePlan([stream("a", 30, groups=groups, groups_per_block=2)], seed=1)
    shard_of = np.repeat(np.arange(5), groups)
    orders = set()
    for epoch in range(4):
        samples = [plan[epoch * 30 + i].sample for i in range(30)]
        assert sorted(samples) == list(range(30))
        left = dict(enumerate(groups))
        for shard in shard_of[samples]:
            left[int(shard)] -= 1
            begun = [number for number, size in enumerate(groups) if 0 < left[number] < size]
            assert len(begun) <= 2
        orders.add(tuple(samples))
    assert len(orders) == 4


def test_substitutes_are_pure_and_come_from_the_same_stream() -> None:
    plan = SamplePlan([stream("s", 40, num_frames=9), stream("l", 20, num_frames=17)], seed=3, run=16)
    for position in (0, 20, 70):
        draws = [plan.substitute(position, attempt) for attempt in range(8)]
        assert draws == [plan.substitute(position, attempt) for attempt in range(8)]
        assert {draw.num_frames for draw in draws} == {plan[position].num_frames}
        assert len({draw.sample for draw in draws}) > 3
