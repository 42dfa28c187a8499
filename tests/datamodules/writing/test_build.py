import json
import os
import random
import signal
import subprocess
import time

import pytest

from datamodules.writing import build
from datamodules.writing.build import WriterSettings
from datamodules.writing.check import check_dataset
from tests.datamodules.synthetic import Squares
from tests.datamodules.writing.build_helpers import (
    BUILD,
    _die_before_change,
    _OneProcessPool,
    _stop_when_whole,
    alive,
    beside,
    content,
    keys,
    make,
    run_python,
)


def test_splits_shards_and_order(tmp_path):
    info = make(Squares(num_tasks=6), tmp_path / "set")
    expected = {"train": [0, 1, 3, 4], "val": [2, 5]}
    for split, numbers in expected.items():
        assert keys(info, split) == [f"s{number:03d}-{index}" for number in numbers for index in range(3)]
    assert [shard.num_samples for shard in info.splits["train"].shards] == [4, 4, 4]
    assert info.splits["train"].lengths == {5: 12}
    assert sorted(content(tmp_path / "set")) == sorted(
        [
            "dataset.json",
            "skipped.jsonl",
            *(f"train-00000{n}.{end}" for n in range(3) for end in ("tar", "index.jsonl")),
            *(f"val-00000{n}.{end}" for n in range(2) for end in ("tar", "index.jsonl")),
        ]
    )
    assert beside(tmp_path / "set") == ["set"]
    assert check_dataset(tmp_path / "set", num_workers=1, progress=False).problems == []


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    faults = {1: "raise", 2: "skip", 4: "nan"}
    sets = []
    for num_workers in (1, 2, 3):
        make(Squares(num_tasks=7, faults=faults), tmp_path / str(num_workers), num_workers)
        sets.append(content(tmp_path / str(num_workers)))
    assert sets[0] == sets[1] == sets[2]


def test_shards_are_limited_in_bytes(tmp_path):
    source = Squares(num_tasks=2, splits=("train",))
    whole = make(source, tmp_path / "whole", settings=WriterSettings()).splits["train"].shards
    assert [shard.num_samples for shard in whole] == [6]
    limit = whole[0].bytes // 2
    halves = make(source, tmp_path / "halves", settings=WriterSettings(max_bytes_per_shard=limit))
    sizes = [(shard.num_samples, shard.bytes) for shard in halves.splits["train"].shards]
    assert sum(count for count, _ in sizes) == 6
    assert len(sizes) > 1
    assert all(num_bytes <= limit + 1024 for _, num_bytes in sizes)
    single = make(source, tmp_path / "single", settings=WriterSettings(max_bytes_per_shard=1))
    assert [shard.num_samples for shard in single.splits["train"].shards] == [1] * 6


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(tmp_path):
    """SIGKILL, each time after some more tasks were done, until a build gets through."""
    trace, moments = tmp_path / "trace", random.Random(3)
    trace.mkdir()
    root, reference = tmp_path / "set", tmp_path / "reference"
    assert run_python(BUILD, reference, trace, 0).wait(60) == 0
    continued = 0
    for is_last in (False, False, False, True):
        parts = tmp_path / "set.partial" / "parts"
        before = len(list(parts.glob("*.rows")))
        process = run_python(BUILD, root, trace, 0.05, stderr=subprocess.PIPE)
        while not is_last and process.poll() is None and len(list(parts.glob("*.rows"))) == before:
            time.sleep(0.005)
        if not is_last:
            time.sleep(moments.uniform(0, 0.1))
            process.kill()
        continued += "continuing a build" in process.communicate(timeout=60)[1]
        assert root.exists() == is_last
    assert process.returncode == 0
    assert continued >= 2
    assert content(root) == content(reference)
    assert beside(root) == ["reference", "set", "trace"]


@pytest.mark.parametrize("situation", ["new", "overwrite", "discard"])
def test_killed_before_each_change_on_disk_it_goes_on(situation, tmp_path, monkeypatch):
    """For every n: a process that ends without a word before its n-th change, then one that finishes."""
    monkeypatch.setattr(build, "WorkerPool", _OneProcessPool)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a killed process loses nothing that it has written
    source = Squares(num_tasks=3, per_task=2, num_frames=2, faults={1: "skip"})
    settings, other_layout = (WriterSettings(max_samples_per_shard=number) for number in (3, 2))
    overwrite = situation == "overwrite"
    make(source, tmp_path / "reference", 1, settings)
    expected = content(tmp_path / "reference")
    # What is there already matters at the end of a build, what is to be discarded at its begin.
    changes = {"new": range(100), "overwrite": range(25, 100), "discard": range(30)}[situation]
    for number in changes:
        root = tmp_path / f"{number:03d}" / "set"
        if overwrite:
            make(Squares(num_tasks=1, per_task=1, num_frames=2), root, 1, settings)
        if situation == "discard":
            _stop_when_whole(source, root, other_layout, monkeypatch)
        child = os.fork()
        if child == 0:
            _die_before_change(number)
            make(source, root, 1, settings, overwrite=overwrite)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        if root.exists():  # whole, whichever it is
            assert json.loads((root / "dataset.json").read_text())["name"] == "squares"
        if code == 9 and (overwrite or not root.exists()):
            make(source, root, 1, settings, overwrite=overwrite)
        assert content(root) == expected, f"killed before change {number}"
        if code == 0:
            break
    assert number > 28
    assert beside(root) == ["set"]


def test_no_worker_outlives_a_killed_build(tmp_path):
    trace = tmp_path / "trace"
    trace.mkdir()
    for stop in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = run_python(BUILD, tmp_path / "set", trace, 0.5, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while len(alive(trace)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(stop)
        assert process.wait(20) != 0
        while alive(trace):
            assert time.monotonic() < deadline, f"{alive(trace)} survived {stop}"
            time.sleep(0.02)
