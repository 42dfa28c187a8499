"""Any prefix and a resume equal no interruption, bit for bit, on any number of workers and ranks."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.loading.pipeline import Shard
from datamodules.tokens import TokensDataModule
from longtake.errors import ConfigError
from longtake.types import Clip
from tests.datamodules.toy_set import damage, make_toy_set

BAD = (3, 11, 12, 20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 40 samples, of which four are damaged."""
    root = make_toy_set(tmp_path_factory.mktemp("set") / "toy")
    for number in BAD:
        damage(root, "train", number)
    return root


def module(root: Path, **changes: Any) -> TokensDataModule:
    settings = {"root": root, "batch_size": 3, "num_frames": 9, "num_workers": 0, "max_bad_fraction": 0.5, "seed": 4}
    data = TokensDataModule(**{**settings, **changes})
    data.setup("fit")
    return data


ALONE = Shard(0, 1)


def batches(data: TokensDataModule, count: int, shard: Shard = ALONE) -> list[Clip]:
    return list(islice(data.train_loader(shard), count))


def assert_same(first: Clip, second: Clip) -> None:
    assert first.key == second.key
    assert first.captions == second.captions
    for name in ("tokens", "actions", "position", "frame_mask", "fps"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stop", [1, 4, 13, 30])  # 13 x 3 straddles the first epoch of 40, 30 lies in the third
def test_prefix_and_resume_equal_no_interruption(root: Path, num_workers: int, size: int, stop: int) -> None:
    for rank in range(size):
        shard = Shard(rank, size)
        whole = batches(module(root), stop + 6, shard)
        begun = module(root, num_workers=num_workers)
        for number, batch in enumerate(batches(begun, stop, shard)):
            begun._progress.begin(batch, number)
            assert_same(batch, whole[number])
        resumed = module(root, num_workers=num_workers)
        resumed.load_state_dict(begun._progress.state(stop))
        for batch, expected in zip(batches(resumed, 6, shard), whole[stop:], strict=True):
            assert_same(batch, expected)


def test_bad_samples_are_substituted_and_counted(root: Path) -> None:
    data = module(root)
    seen = batches(data, 40 // 3 * 2)
    keys = {key for batch in seen for key in batch.key}
    assert keys.isdisjoint(f"train_{number}" for number in BAD)
    ledger = data.ledgers["train"]
    assert {key for _, key in ledger.bad} == {f"train_{number}" for number in BAD}
    assert ledger.substitutions >= len(BAD)
    assert all("checksum" in reason for reason in ledger.bad.values())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_ranks_neither_repeats_nor_skips(
    root: Path, before: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = [module(root) for _ in range(before)]
    used: list[int] = []
    for rank, data in enumerate(first):
        for number, batch in enumerate(batches(data, 5, Shard(rank, before))):
            data._progress.begin(batch, number)
            used += batch.position.tolist()
    states = [data._progress.state(5) for data in first]
    assert len({state["position"] for state in states}) == 1
    with caplog.at_level(logging.INFO, logger="longtake"):
        for rank in range(after):
            data = module(root, batch_size=2)
            data.load_state_dict(states[0])
            for batch in batches(data, 4, Shard(rank, after)):
                used += batch.position.tolist()
    assert sorted(used) == list(range(5 * 3 * before + 4 * 2 * after))
    assert f"saved on {before} data-parallel ranks, resumed on {after}" in caplog.text


def test_another_set_or_seed_is_refused(root: Path, tmp_path: Path) -> None:
    data = module(root)
    data._progress.begin(batches(data, 1)[0], 0)
    state = data._progress.state(1)
    for changes in ({"seed": 5}, {"num_frames": 5}, {"root": make_toy_set(tmp_path / "other", num_samples=41)}):
        other = module(**{"root": root, **changes})
        other.load_state_dict(state)
        with pytest.raises(ConfigError, match="another plan of data"):
            other.train_loader(Shard(0, 1))


class Recorder(L.LightningModule):
    """Trains one number and notes every batch that its training steps were given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Clip] = []

    def training_step(self, batch: Clip, index: int) -> torch.Tensor:
        self.seen.append(batch)
        return (self.weight - batch.tokens.float().mean()) ** 2

    def validation_step(self, batch: Clip, index: int) -> None:
        assert batch.tokens is not None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(root: Path, folder: Path, steps: int, ckpt: Path | None = None, **options: Any) -> tuple[Recorder, Path]:
    model = Recorder()
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        **{"num_sanity_val_steps": 1, "val_check_interval": 4, "limit_val_batches": 2, **options},
    )
    trainer.fit(model, module(root), ckpt_path=ckpt, weights_only=True)
    path = folder / f"step_{steps}.ckpt"
    trainer.save_checkpoint(path)
    return model, path


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"limit_train_batches": 4}],
    ids=["plain", "accumulated", "short epochs"],
)
def test_resume_inside_lightning(root: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole, _ = fit(root, tmp_path, 12, **options)
    first, ckpt = fit(root, tmp_path, 5, **options)
    second, _ = fit(root, tmp_path, 12, ckpt, **options)
    assert len(first.seen) + len(second.seen) == len(whole.seen)
    for got, expected in zip(first.seen + second.seen, whole.seen, strict=True):
        assert_same(got, expected)


def test_a_half_accumulated_step_is_done_again(root: Path, tmp_path: Path) -> None:
    data = module(root)
    for number, batch in enumerate(batches(data, 8)):  # three batches an optimiser step: two steps and two thirds
        data._progress.begin(batch, number // 3)
    assert data._progress.state(2)["position"] == 6 * 3
    assert data._progress.next_position == 8 * 3
