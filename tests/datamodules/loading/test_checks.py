"""What is refused, what is counted, and what is told about a set."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from datamodules.latents import LatentsDataModule
from datamodules.loading.decoding import collate
from datamodules.loading.pipeline import Shard
from datamodules.shards import DATASET_FILE, DatasetInfo, index_path
from datamodules.tokens import TokensDataModule
from datamodules.video import VideoDataModule
from longtake.errors import BadSampleError, ConfigError, DataError
from tests.datamodules.toy_set import TOKENS, damage, make_toy_set, npy, toy_info, toy_members


def module(root: Path | None, kind: type = TokensDataModule, **changes: Any) -> Any:
    data = kind(**{"root": root, "batch_size": 4, "num_frames": 9, "num_workers": 0, **changes})
    data.setup("fit")
    return data


def with_model(data: Any, **wanted: Any) -> Any:
    """Returns the datamodule attached to a stand-in for a trainer whose model wants something."""
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(data_requirements=lambda: wanted))
    return data


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"action_dim": 5}, r"built for 5 columns of actions, .* has 2 \(number, row\)"),
        ({"vocab_size": 64}, r"built for 64 tokens in the vocabulary, .* has 100000"),
        ({"latent_channels": 16}, r"built for 16 latent channels, .* has 0"),
        ({"num_views": 7}, r"built for 7 views, .* has 1"),
    ],
)
def test_a_model_of_other_dimensions_is_refused_with_both_numbers(tmp_path: Path, wanted: dict, message: str) -> None:
    data = with_model(TokensDataModule(root=make_toy_set(tmp_path / "toy"), num_frames=9), **wanted)
    with pytest.raises(ConfigError, match=message):
        data.setup("fit")


def test_a_model_that_fits_or_does_not_care_passes(tmp_path: Path) -> None:
    data = with_model(
        TokensDataModule(root=make_toy_set(tmp_path / "toy"), num_frames=9), action_dim=2, vocab_size=None
    )
    data.setup("fit")


def test_the_summary_says_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="longtake"):
        module(make_toy_set(tmp_path / "toy", num_samples=10))
    assert "64x48 at 11.67 fps, 1 view(s), licence CC0-1.0" in caplog.text
    assert "actions (2): number, row" in caplog.text
    assert "10 clips" in caplog.text
    assert "10 training clips; with fewer than 100" in caplog.text


def test_too_many_bad_samples_end_the_run(tmp_path: Path) -> None:
    root = make_toy_set(tmp_path / "toy", num_samples=20)
    for number in (2, 5):
        damage(root, "train", number)
    data = module(root, max_bad_fraction=0.05)
    with pytest.raises(
        DataError, match=r"2 distinct samples of split 'train' are bad, 10.0% [^`]*`[^`]*`[^`]*`data.max_bad_fraction`"
    ):
        list(islice(data.train_loader(Shard(0, 1)), 10))
    assert len(list(islice(module(root, max_bad_fraction=0.1).train_loader(Shard(0, 1)), 30))) == 30


def test_a_failure_in_a_worker_arrives_as_one_message(tmp_path: Path) -> None:
    root = make_toy_set(tmp_path / "toy", num_samples=20)
    for shard in root.glob("train-*.tar"):
        shard.unlink()
    data = module(root, num_workers=2)
    with pytest.raises(DataError, match=r"^shard .* cannot be opened \(No such file"):
        next(iter(data.train_loader(Shard(0, 1))))


def test_bad_samples_in_validation_leave_the_rest_in_place(tmp_path: Path) -> None:
    root = make_toy_set(tmp_path / "toy", num_samples=10)
    damage(root, "val", 3)
    for size in (1, 2):
        rows = []
        for rank in range(size):
            data = module(root, max_bad_fraction=0.2, val_batch_size=3)
            for batch in data.fixed_loader("val", Shard(rank, size)):
                kept = batch.frame_mask.any(1).tolist()
                rows += [(int(p), key) for p, key, real in zip(batch.position, batch.key, kept, strict=True) if real]
        assert sorted(rows) == [(n, f"val_{n}") for n in range(10) if n != 3]


MEMBERS = {
    "missing actions": {k: v for k, v in toy_members(4).items() if k != "actions.npy"},
    "missing tokens": {k: v for k, v in toy_members(4).items() if k != "tokens.npy"},
    "actions of another width": {**toy_members(4), "actions.npy": npy(torch.zeros(9, 3).numpy())},
    "too few actions": {**toy_members(4), "actions.npy": npy(torch.zeros(5, 2).numpy())},
    "actions not finite": {**toy_members(4), "actions.npy": npy(torch.full((9, 2), float("nan")).numpy())},
    "tokens out of range": {**toy_members(4), "tokens.npy": npy(torch.full((1, 3, 2, 2), 100_000).numpy())},
    "tokens of another grid": {**toy_members(4), "tokens.npy": npy(torch.zeros(1, 3, 4, 4).int().numpy())},
    "tokens not integers": {**toy_members(4), "tokens.npy": npy(torch.zeros(1, 3, 2, 2).numpy())},
    "garbage": {**toy_members(4), "tokens.npy": b"garbage"},
    "a pickle": {
        **toy_members(4),
        "tokens.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        + b" " * 60
        + b"\n",
    },
    "empty": {**toy_members(4), "tokens.npy": b""},
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_sample_that_is_not_what_the_set_says_is_replaced_and_named(tmp_path: Path, name: str) -> None:
    root = make_toy_set(tmp_path / "toy", num_samples=20, members={4: MEMBERS[name]})
    data = module(root, max_bad_fraction=0.05)
    keys = {key for batch in islice(data.train_loader(Shard(0, 1)), 5) for key in batch.key}
    assert "train_4" not in keys
    assert [key for _, key in data.ledgers["train"].bad] == ["train_4"]


def test_a_set_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset.json"):
        module(tmp_path / "absent")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(DataError, match="half-built"):
        module(tmp_path / "half")
    root = make_toy_set(tmp_path / "toy")
    text = (root / DATASET_FILE).read_text()
    for broken in (text[: len(text) // 2], "[]", "{}", text.replace('"format_version": 1', '"format_version": 9')):
        (root / DATASET_FILE).write_text(broken)
        with pytest.raises(DataError, match=r"dataset\.json|make_shards"):
            module(root)
    (root / DATASET_FILE).write_text(text.replace("train-000000.tar", "../train-000000.tar"))
    with pytest.raises(DataError, match="outside its folder"):
        module(root)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    root = make_toy_set(tmp_path / "toy")
    path = index_path(root / "train-000000.tar")
    path.write_text(path.read_text().replace("train_3", "train_x"))
    data = module(root)
    with pytest.raises(DataError, match=r"index .* differs from its checksum"):
        list(islice(data.train_loader(Shard(0, 1)), 10))


def test_mixed_sets_are_drawn_by_weight(tmp_path: Path) -> None:
    roots = [make_toy_set(tmp_path / "a", num_samples=10), make_toy_set(tmp_path / "b", num_samples=30)]
    data = module(None, mix=[{"root": roots[0], "weight": 3}, {"root": roots[1], "weight": 1}], batch_size=10)
    batches = list(islice(data.train_loader(Shard(0, 1)), 100))
    from_b = sum(int((batch.tokens[:, 0, 0, 0, 0] >= 10).sum()) for batch in batches)
    assert 250 * 0.6 < from_b * 1.5 < 250 * 1.4  # two thirds of b's samples have a number that a has not
    with pytest.raises(ConfigError, match="data.mix has weights"):
        module(None, mix=[{"root": roots[0], "weight": 3}, {"root": roots[1]}])
    with pytest.raises(ConfigError, match="expected exactly one of them"):
        TokensDataModule()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"mode": "random"}, "data.mode"),
        ({"order": "shard"}, "data.order"),
        ({"subclips": "all"}, "data.subclips"),
        ({"num_frames": [9, 9]}, "data.num_frames"),
        ({"worker_context": "thread"}, "data.worker_context"),
        ({"limit_samples": 0}, "data.limit_samples"),
        ({"splits": {"train": "trian"}}, "data.splits"),
        ({"shard_url": "pipe:cat {file}"}, "data.allow_remote"),
    ],
)
def test_settings_that_cannot_work_name_their_key(tmp_path: Path, changes: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        module(make_toy_set(tmp_path / "toy"), **changes).train_loader(Shard(0, 1))


def test_remote_shards_are_fetched_checked_and_evicted(tmp_path: Path) -> None:
    root = make_toy_set(tmp_path / "toy", num_samples=20)
    away = tmp_path / "away"
    away.mkdir()
    for shard in root.glob("*.tar"):
        shard.rename(away / shard.name)
    size = max(shard.stat().st_size for shard in away.iterdir())
    options = {
        "shard_url": f"{away}/{{file}}",
        "allow_remote": True,
        "cache_dir": tmp_path / "cache",
        "order": "shards",
    }
    data = module(root, **options, cache_gb=2.5 * size / 1e9)
    keys = [key for batch in islice(data.train_loader(Shard(0, 1)), 10) for key in batch.key]
    assert sorted(keys) == sorted([f"train_{n}" for n in range(20)] * 2)
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 2
    for shard in (tmp_path / "cache").glob("*.tar"):
        shard.unlink()
    for shard in away.glob("train*.tar"):
        shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(DataError, match="checksum"):
        next(iter(module(root, **options).train_loader(Shard(0, 1))))


def latents_set(tmp_path: Path) -> Path:
    members = {}
    for number in range(8):
        tensors = {f"latents.{start}": torch.full((1, 3, 4, 2, 2), float(start)) for start in (0, 4, 12)}
        tensors["latents.12"] = tensors["latents.12"][:, :2].contiguous()
        tensors["text_ids"] = torch.tensor([[number, 1]])
        tensors["text_mask"] = torch.tensor([[True, False]])
        others = {k: v for k, v in toy_members(number, 21).items() if k in ("actions.npy", "txt")}
        members[number] = {**others, "latents.safetensors": safetensors.torch.save(tensors)}
    latents = {"channels": 4, "ratio_time": 4, "ratio_space": 8, "encoder_fingerprint": "abc"}
    info = toy_info(tokens=None, latents=latents)
    return make_toy_set(tmp_path / "latents", num_samples=8, lengths=[21] * 8, info=info, members=members)


def test_latents_begin_where_an_encoding_begins(tmp_path: Path) -> None:
    data = module(latents_set(tmp_path), LatentsDataModule, encoder_fingerprint="abc")
    starts = set()
    for batch in islice(data.train_loader(Shard(0, 1)), 8):
        assert batch.latents.shape == (4, 1, 3, 4, 2, 2)
        assert batch.text_ids.shape == (4, 1, 2)
        for clip in range(4):
            start = int(batch.latents[clip, 0, 0, 0, 0, 0])
            starts.add(start)
            assert batch.actions[clip, 1:, 1].tolist() == list(range(start + 1, start + 9))
    assert starts == {0, 4}  # the encoding from frame 12 on is too short


def test_latents_of_another_encoder_are_refused(tmp_path: Path) -> None:
    root = latents_set(tmp_path)
    with pytest.raises(ConfigError, match="come from encoder abc, the model's encoder is xyz"):
        module(root, LatentsDataModule, encoder_fingerprint="xyz").train_loader(Shard(0, 1))
    with pytest.raises(ConfigError, match=r"data.num_frames is 10; expected 1 \+ k\*4 frames, for example 9 or 13"):
        module(root, LatentsDataModule, num_frames=10).train_loader(Shard(0, 1))


def test_kinds_of_sets_are_told_apart(tmp_path: Path) -> None:
    tokens, latents = make_toy_set(tmp_path / "toy"), latents_set(tmp_path)
    with pytest.raises(ConfigError, match="holds no tokens"):
        module(latents, TokensDataModule).train_loader(Shard(0, 1))
    with pytest.raises(ConfigError, match="holds no latents"):
        module(tokens, LatentsDataModule).train_loader(Shard(0, 1))
    unseen = make_toy_set(tmp_path / "blind", info=toy_info(video=None))
    with pytest.raises(ConfigError, match="holds no pixels"):
        module(unseen, VideoDataModule).train_loader(Shard(0, 1))


def test_dataset_json_comes_back_as_it_was(tmp_path: Path) -> None:
    root = make_toy_set(tmp_path / "toy")
    info = DatasetInfo.load(root)
    assert info.source == toy_info(tokens=TOKENS)
    assert info.to_json() == (root / DATASET_FILE).read_text()
    assert info.split("train").num_samples == 40
    assert info.hours("train") == pytest.approx(40 * 9 / (35 / 3) / 3600)
    with pytest.raises(ConfigError, match="expected one of: train, val"):
        info.split("tarin")


@pytest.mark.parametrize("field", ["actions", "control"])
def test_a_batch_in_which_one_sample_lacks_a_field_says_which(field: str) -> None:
    whole = {"key": "a", "actions": np.zeros((5, 2)), "control": {"depth": torch.zeros(1, 5, 1, 4, 4)}}
    with pytest.raises(BadSampleError, match=f"has no {field}, which other samples of its batch have: b"):
        collate([whole, {**whole, "key": "b", field: None}])
