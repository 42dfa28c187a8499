"""Every rank and worker reads its own share, however the workers were started."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from datamodules.loading.pipeline import Shard
from datamodules.tokens import TokensDataModule
from longtake.errors import ConfigError
from tests.datamodules.toy_set import make_toy_set


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_set(tmp_path_factory.mktemp("set") / "toy", num_samples=24, per_shard=5)


def module(root: Path, **changes: object) -> TokensDataModule:
    data = TokensDataModule(**{"root": root, "batch_size": 3, "num_frames": 9, **changes})  # type: ignore[arg-type]
    data.setup("fit")
    return data


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_two_ranks_share_an_epoch(root: Path, context: str, num_workers: int) -> None:
    keys = []
    for rank in range(2):
        data = module(root, num_workers=num_workers, worker_context=context)
        got = [key for batch in islice(data.train_loader(Shard(rank, 2)), 4) for key in batch.key]
        assert len(got) == 12
        keys.append(set(got))
    assert len(keys[0]) == len(keys[1]) == 12
    assert keys[0] | keys[1] == {f"train_{number}" for number in range(24)}
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_is_equal_padded_and_complete_on_every_rank(root: Path, size: int, num_workers: int) -> None:
    real: list[str] = []
    counts = set()
    for rank in range(size):
        loader = module(root, num_workers=num_workers, val_batch_size=5).fixed_loader("val", Shard(rank, size))
        got = list(loader)
        assert len(got) == len(loader)
        counts.add(len(got))
        for batch in got:
            assert len(batch) == 5
            real += [key for key, kept in zip(batch.key, batch.frame_mask.any(1).tolist(), strict=True) if kept]
    assert len(counts) == 1
    assert sorted(real) == sorted(f"val_{number}" for number in range(24))


def test_validation_repeats_itself_and_spreads_over_the_split(root: Path) -> None:
    loader = module(root, num_workers=0, val_samples=6, seed=1).fixed_loader("val", Shard(0, 1))
    keys = [key for batch in loader for key in batch.key]
    assert keys == ["val_0", "val_4", "val_8", "val_12", "val_16", "val_20"]
    other = module(root, num_workers=0, val_samples=6, seed=2).fixed_loader("val", Shard(0, 1))
    assert keys == [key for batch in other for key in batch.key]


def test_too_few_shards_suggests_a_number(root: Path) -> None:
    data = module(root, mode="resampled", num_workers=3)
    with pytest.raises(ConfigError, match=r"has 5 training shards for 2 ranks x 3 workers.* expected 6 or more"):
        data.train_loader(Shard(0, 2))


def test_resampled_gives_whole_batches_from_the_split(root: Path) -> None:
    data = module(root, mode="resampled", num_workers=2, batch_size=4)
    got = list(islice(data.train_loader(Shard(0, 2)), 12))
    assert all(len(batch) == 4 for batch in got)
    numbers = [[int(value) for value in batch.tokens[:, 0, 0, 0, 0]] for batch in got]
    assert [[f"train_{number}" for number in row] for row in numbers] == [batch.key for batch in got]
    other = [batch.key for batch in islice(data.train_loader(Shard(1, 2)), 12)]
    assert other != [batch.key for batch in got]


def test_a_loader_tells_how_long_it_was_waited_for(root: Path) -> None:
    loader = module(root, num_workers=1).train_loader(Shard(0, 1))
    assert loader.waited_s == 0
    batches = iter(loader)
    next(batches)
    first = loader.waited_s
    assert first > 0  # the worker had to start
    for _ in range(3):
        next(batches)
    assert first < loader.waited_s < 60
