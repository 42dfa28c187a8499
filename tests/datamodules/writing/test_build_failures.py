import errno
import json
import resource
import time
from pathlib import Path

import pytest

from datamodules.writing import build, parts
from datamodules.writing.build import WriterSettings
from longtake.errors import ConfigError, DataError
from tests.datamodules.synthetic import Squares
from tests.datamodules.writing.build_helpers import (
    SMALL,
    _AllBad,
    beside,
    content,
    keys,
    make,
)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("key with a dot", "key is 'a.b'"),
        ("nan", "actions hold NaN"),
        ("columns", "actions are float32 [5, 1]; expected float32 [5, 2]"),
        ("rows", "actions are float32 [4, 2]"),
        ("dtype", "actions are float64 [5, 2]"),
        ("no actions", "actions are missing"),
        ("frame size", "expected uint8 [t, 16, 24, 3]"),
        ("float frames", "is float32"),
        ("no frames", "expected at least 1"),
        ("unknown view", "unknown view 'rear'"),
        ("no video", "neither video nor tokens"),
        ("two lines", "caption is 'one\\ntwo'"),
        ("meta", "meta cannot be written"),
        ("meta nan", "meta cannot be written"),
        ("pickle member", "member 'evil.pkl' is not allowed"),
        ("broken mp4", "not a video"),
        ("episode", "expected a printable name"),
        ("leak", "episode 'episode 0' is in split 'train'"),
        ("duplicate key", "another sample has this key"),
        ("own key again", "another sample has this key"),
        ("long key", "does not fit into a tar header"),
    ],
)
def test_bad_samples_are_refused(fault, reason, monkeypatch, tmp_path):
    """In this process, task by task: what `build_dataset` does with it is tested below."""
    source = Squares(num_tasks=3, faults={2: fault})
    (tmp_path / "parts").mkdir()
    (tmp_path / "records").mkdir()
    context = parts.PartContext(source, source.info(), SMALL.encode, tmp_path / "parts")
    packer = parts.Packer(tmp_path, max_samples=4, max_bytes=2**20)
    for number, task in enumerate(source.tasks()):
        parts.write_part(context, (number, task), lambda note: None)
        packer.add_part(number, task)
    packer.finish()
    assert packer.num_skipped == 1
    assert reason in packer.examples[0]["reason"]
    assert packer.num_samples == 8


def test_views_of_different_lengths_are_refused(tmp_path):
    info = make(Squares(num_tasks=1, views=("front", "left"), faults={0: "lengths"}), tmp_path / "set", 1)
    assert info.skipped["count"] == 1
    assert "view 'left' has 5 frames; expected 4" in info.skipped["examples"][0]["reason"]


def test_everything_that_is_skipped_is_counted_and_named(tmp_path):
    faults = {0: "segv", 1: "raise", 2: "skip", 3: "own key again", 4: "nan", 5: "exit"}
    trace = tmp_path / "trace"
    trace.mkdir()
    source = Squares(num_tasks=7, faults={**faults, 6: "crash once"}, splits=("train",), trace=str(trace))
    info = make(source, tmp_path / "set")
    rows = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert info.skipped == {"count": 6, "examples": rows}
    assert [row["name"] for row in rows] == ["t0", "t1", "clip 7", "s003-0", "s004-1", "t5"]
    reasons = [row["reason"] for row in rows]
    assert "SIGSEGV" in reasons[0]
    assert "after sample 's000-0'" in reasons[0]
    assert "KeyError: 'no such thing'" in reasons[1]
    assert reasons[2] == "too dark"
    assert "exit code 3" in reasons[5]
    assert "s001-0" in keys(info, "train")  # what a task gave before it failed is kept
    assert sum(key.startswith("s006") for key in keys(info, "train")) == 3  # the second try succeeded
    tries = [path.name.split("-")[0] for path in trace.iterdir() if path.name != "crashed"]
    assert {task: tries.count(task) for task in sorted(set(tries))} == {
        "t0": 2, "t1": 1, "t2": 1, "t3": 1, "t4": 1, "t5": 2, "t6": 2
    }  # fmt: skip


def test_a_task_that_hangs_is_given_up(tmp_path):
    start = time.monotonic()
    settings = WriterSettings(task_timeout_s=1.0)
    info = make(Squares(num_tasks=2, faults={0: "hang"}), tmp_path / "set", settings=settings)
    assert time.monotonic() - start < 20
    assert info.skipped["examples"] == [
        {"name": "t0", "reason": "no progress for 1 s (writer.task_timeout_s) after sample 's000-0'"}
    ]
    assert len(keys(info, "train")) == 3


def test_a_slow_task_is_not_given_up_as_long_as_samples_come(tmp_path):
    settings = WriterSettings(task_timeout_s=1.0)
    info = make(Squares(num_tasks=1, per_task=4, pause_s=0.5), tmp_path / "set", 1, settings=settings)
    assert info.skipped["count"] == 0


def test_a_config_error_of_the_source_stops_the_build(tmp_path):
    with pytest.raises(ConfigError, match=r"source\.num_tasks is wrong"):
        make(Squares(faults={1: "config"}), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_nothing_left_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match=r"all 1 samples were skipped \(t0: KeyError"):
        make(_AllBad(), tmp_path / "set", 1)
    assert beside(tmp_path / "set") == []


class _NoVal(Squares):
    def samples(self, task):
        if task.split == "val":
            raise FileNotFoundError("the working folder is gone")
        yield from super().samples(task)


def test_a_split_without_any_clip_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nothing is left in the split val: 1 samples were skipped \(t2: FileNotFound"):
        make(_NoVal(num_tasks=4), tmp_path / "set", 1)
    assert beside(tmp_path / "set") == []


def test_a_source_without_tasks_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no clips at all"):
        make(Squares(num_tasks=0), tmp_path / "set")
    assert beside(tmp_path / "set") == []


@pytest.mark.parametrize("licence", ["", "  ", None])
def test_a_source_must_state_its_licence(licence, tmp_path):
    with pytest.raises(ConfigError, match="licence"):
        make(Squares(licence=licence), tmp_path / "set")
    assert beside(tmp_path / "set") == []


def test_what_is_there_is_not_overwritten(tmp_path):
    root = tmp_path / "set"
    make(Squares(num_tasks=1), root, 1)
    before = content(root)
    with pytest.raises(ConfigError, match="overwrite=true"):
        make(Squares(num_tasks=2), root, 1)
    assert content(root) == before
    make(Squares(num_tasks=2), root, 1, overwrite=True)
    assert content(root) != before
    assert beside(root) == ["set"]


def test_a_folder_that_is_no_set_is_never_overwritten(tmp_path):
    root = tmp_path / "home"
    root.mkdir()
    (root / "thesis.txt").write_text("five years")
    with pytest.raises(ConfigError, match="is never replaced"):
        make(Squares(num_tasks=1), root, 1, overwrite=True)
    assert (root / "thesis.txt").read_text() == "five years"


def test_a_foreign_partial_folder_is_left_alone(tmp_path):
    foreign = tmp_path / "set.partial"
    foreign.mkdir()
    (foreign / "movie.mkv").write_text("half a download")
    with pytest.raises(ConfigError, match=r"movie\.mkv"):
        make(Squares(num_tasks=1), tmp_path / "set", 1)
    assert (foreign / "movie.mkv").exists()


def test_the_old_set_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    root = tmp_path / "set"
    make(Squares(num_tasks=1), root, 1)
    before = content(root)
    with pytest.raises(DataError, match="nothing is left"):
        make(_AllBad(), root, 1, overwrite=True)
    assert content(root) == before


@pytest.mark.parametrize("num_renames", [0, 1])
def test_an_interrupted_swap_is_repaired(num_renames, tmp_path, monkeypatch):
    root = tmp_path / "set"
    make(Squares(num_tasks=1), root, 1)
    before, rename, calls = content(root), Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        if len(calls) == num_renames:
            raise KeyboardInterrupt
        calls.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            make(Squares(num_tasks=2), root, 1, overwrite=True)
    with pytest.raises(ConfigError, match="overwrite=true"):
        make(Squares(num_tasks=2), root, 1)
    assert content(root) == before
    monkeypatch.setattr(build, "_finished_parts", None)  # the new set is whole already: nothing is made again
    assert len(keys(make(Squares(num_tasks=2), root, 1, overwrite=True), "train")) == 6
    assert beside(root) == ["set"]


def test_unwritable_output_is_one_message(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be written"):
        make(Squares(num_tasks=1), tmp_path / "file" / "set", 1)
    with pytest.raises(DataError, match="cannot be written"):
        make(Squares(num_tasks=1), Path("/proc/longtake/set"), 1)


def test_disk_full_while_packing_keeps_what_is_done(tmp_path, monkeypatch):
    source, root = Squares(num_tasks=6, splits=("train",)), tmp_path / "set"
    make(source, tmp_path / "reference")

    def full(self, entry, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("datamodules.writing.parts.ShardWriter.add", full)
        with pytest.raises(DataError, match=r"MiB are free, about .* MiB are still to be written.*same command"):
            make(source, root)
    assert not root.exists()
    assert not list((tmp_path / "set.partial").rglob("*.tmp"))
    assert list((tmp_path / "set.partial" / "parts").iterdir())
    make(source, root)
    assert content(root) == content(tmp_path / "reference")


def test_disk_full_in_a_worker_is_one_message(tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails in the worker itself."""
    source, root = Squares(num_tasks=4, ballast=200_000), tmp_path / "set"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"parts.*File too large.*run the same command") as caught:
            make(source, root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not root.exists()
    assert not list((tmp_path / "set.partial").rglob("*.tmp"))
    make(source, root)
    make(source, tmp_path / "reference")
    assert content(root) == content(tmp_path / "reference")
