"""Every kind of damage is planted in a set, alone where that is possible, and must be named where it is."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from datamodules.shards import index_path, read_index
from datamodules.writing.check import check_dataset
from datamodules.writing.check_shard import Problem
from datamodules.writing.worker_pool import WorkerPool
from tests.scripts.damage import (
    SHARD,
    assert_only,
    edit_json,
    found,
)

pytestmark = pytest.mark.usefixtures("one_process_pool")


@pytest.mark.parametrize("is_real", [False, True])
def test_a_clean_set_is_clean(root, is_real, monkeypatch):
    if is_real:
        monkeypatch.setattr("datamodules.writing.check.WorkerPool", WorkerPool)
    report = check_dataset(root, num_workers=2, progress=False)
    assert report.problems == []
    assert {name: (split.num_samples, dict(split.lengths)) for name, split in report.splits.items()} == {
        "train": (9, {5: 9}),
        "val": (3, {5: 3}),
    }
    assert report.splits["train"].sizes == {"24x16 @ 11.67 fps": 18}
    assert report.splits["train"].hours == pytest.approx(45 * 3 / 35 / 3600)


def test_missing_shard(root):
    (root / SHARD).unlink()
    assert_only(root, (SHARD, "", "", "is missing"))


def test_unlisted_files(root):
    shutil.copy(root / SHARD, root / "train-000007.tar")
    (root / "train-000009.index.jsonl").write_text("")
    assert_only(
        root,
        ("train-000007.tar", "", "", "not listed"),
        ("train-000009.index.jsonl", "", "", "belongs to no shard"),
    )


def test_a_shard_listed_twice(root):
    def twice(data):
        part = data["splits"]["train"]
        part["shards"].append(part["shards"][0])
        for name in ("num_samples", "num_frames"):
            part[name] += part["shards"][0][name]

    edit_json(root, twice)
    assert_only(root, (SHARD, "", "", "listed twice"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_tar_cut_off(root, share):
    content = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(content[: int(len(content) * share)])
    problems = found(root)
    reasons = " ".join(problem.reason for problem in problems if problem.shard == SHARD)
    assert "bytes long" in reasons
    assert "differs from its checksum in dataset.json" in reasons
    assert ("reaches beyond the end" if 0 < share < 0.9 else "tar does not end as it should") in reasons
    assert {problem.shard for problem in problems} == {SHARD}


def test_garbage_behind_the_tar(root):
    with (root / SHARD).open("ab") as file:
        file.write(b"more")
    assert_only(
        root,
        (SHARD, "", "", "bytes long"),
        (SHARD, "", "", "differs from its checksum in dataset.json"),
        (SHARD, "", "", "tar does not end as it should"),
    )


def test_a_tar_of_garbage(root):
    (root / SHARD).write_bytes(np.random.default_rng(0).bytes(5000))
    assert "tar is damaged at byte 0" in " ".join(problem.reason for problem in found(root))


def test_flipped_byte_in_a_member(root):
    entry = read_index(root / SHARD)[1]
    start, size, _ = entry.members["left.mp4"]
    content = bytearray((root / SHARD).read_bytes())
    content[start + size // 2] ^= 0x55
    (root / SHARD).write_bytes(content)
    problems = found(root)
    assert Problem(SHARD, entry.key, "left.mp4", "differs from its checksum in the index") in problems
    assert Problem(SHARD, "", "", "differs from its checksum in dataset.json") in problems
    assert {problem.key for problem in problems} == {"", entry.key}


def test_missing_index(root):
    index_path(root / SHARD).unlink()
    assert_only(root, (SHARD, "", "", "its index cannot be read"))


def test_damaged_index_lines(root):
    path = index_path(root / SHARD)
    lines = path.read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    path.write_text("\n".join([lines[0], "{", lines[2], '{"key": 3}', lines[4]]))
    assert_only(
        root,
        (SHARD, "", "", "its index differs from the checksum"),
        (SHARD, "", "", "line 2 of its index"),
        (SHARD, "", "", "line 4 of its index"),
        (SHARD, "", "", "cut off in the last line"),
        (SHARD, keys[1], "", "in the tar but not in the index"),
        (SHARD, keys[3], "", "in the tar but not in the index"),
        (SHARD, keys[4], "", "in the tar but not in the index"),
    )


@pytest.mark.parametrize(
    ("change", "key", "member", "reason"),
    [
        (
            lambda row: row["members"]["json"].__setitem__(0, 512),
            "s000-0",
            "json",
            "index says (offset, bytes)",
        ),
        (lambda row: row["members"].pop("json"), "s000-0", "json", "index says (offset, bytes) None"),
        (lambda row: row["members"]["json"].__setitem__(2, 1), "s000-0", "json", "differs from its checksum"),
        (lambda row: row.update(size=512), "s000-0", "", "byte range"),
        (lambda row: row.update(num_frames=6), "s000-0", "json", "index says 'episode 0', 6 frames"),
        (lambda row: row.update(episode="other"), "s000-0", "json", "index says 'other', 5 frames"),
    ],
)
def test_an_index_that_lies(root, change, key, member, reason):
    path = index_path(root / SHARD)
    lines = path.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    change(row)
    path.write_text("".join([json.dumps(row) + "\n", *lines[1:]]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(root, lambda data: data["splits"]["train"]["shards"][0].update(index_sha256=digest))
    assert_only(root, (SHARD, key, member, reason))


def test_an_index_in_another_order(root):
    path = index_path(root / SHARD)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(root, lambda data: data["splits"]["train"]["shards"][0].update(index_sha256=digest))
    assert_only(root, (SHARD, "", "", "another order"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "longtake-shards", "format_version": 1}',
        b'{"format": "other", "format_version": 1}',
        b'{"format": "longtake-shards", "format_version": 99}',
    ],
    ids=range(9),
)
def test_garbage_dataset_json_and_still_every_shard_is_checked(root, content):
    (root / "dataset.json").write_bytes(content)
    repacked = root / SHARD
    damaged = bytearray(repacked.read_bytes())
    damaged[read_index(repacked)[0].members["front.mp4"][0] + 100] ^= 0xFF
    repacked.write_bytes(damaged)
    problems = found(root)
    assert problems[0].shard == "dataset.json"
    assert Problem(SHARD, "s000-0", "front.mp4", "differs from its checksum in the index") in problems


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.update(licence=""), "licence"),
        (lambda data: data.update(origin=None), "origin"),
        (lambda data: data.update(view_names=[1]), "view_names"),
        (lambda data: data.update(view_names=["a.b", "left"]), "view_names"),
        (lambda data: data.update(request=[]), "request"),
        (lambda data: data.update(tokens={"vocab_size": 3}), "tokens.grid"),
        (lambda data: data.update(skipped=None), "skipped"),
        (lambda data: data.pop("rig"), "rig"),
        (lambda data: data["video"].update(fps="0/0"), "cannot be read"),
        (lambda data: data["video"].update(height=1e400), "infinity"),
        (lambda data: data["splits"]["train"].update(num_samples=1), "states num_samples 1"),
        (lambda data: data["splits"]["train"].pop("num_frames"), "num_frames"),
        (lambda data: data["splits"]["train"]["shards"][0].update(bytes="many"), "makes no sense"),
        (lambda data: data["splits"]["train"]["shards"][0].update(file="../x.tar"), "outside its folder"),
        (lambda data: data["splits"].update({"a/b": data["splits"].pop("val")}), "a/b"),
    ],
)
def test_dataset_json_that_breaks_the_format(root, change, reason):
    edit_json(root, change)
    assert_only(root, ("dataset.json", "", "", reason))


def test_wrong_counts(root):
    def change(data):
        data["splits"]["train"]["shards"][0].update(num_samples=6, lengths={"5": 4, "7": 1})
        data["splits"]["train"]["num_samples"] += 1

    edit_json(root, change)
    assert_only(
        root,
        (SHARD, "", "", "holds 5 samples; dataset.json says 6"),
        (SHARD, "", "", "holds clips by frames {5: 5}"),
    )
