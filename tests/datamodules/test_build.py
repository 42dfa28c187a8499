import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from datamodules import build, parts
from datamodules.atomic_folder import sibling
from datamodules.build import WriterSettings, build_dataset, ensure_dataset
from datamodules.check import check_dataset
from datamodules.shards import DatasetInfo, iterate_entries
from longtake.errors import ConfigError, DataError
from tests.datamodules.synthetic import Squares

ROOT = Path(__file__).resolve().parents[2]
SMALL = WriterSettings(max_samples_per_shard=4, task_timeout_s=60)


def make(source: Squares, root: Path, num_workers: int = 2, settings: WriterSettings = SMALL, **options) -> DatasetInfo:
    request = {"num_tasks": source.num_tasks, "faults": {str(k): v for k, v in source.faults.items()}}
    return build_dataset(
        source, root, request=request, settings=settings, num_workers=num_workers, progress=False, **options
    )


def content(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def beside(root: Path) -> list[str]:
    return sorted(path.name for path in root.parent.iterdir())


def keys(info: DatasetInfo, split: str) -> list[str]:
    return [entry.key for _, entry in iterate_entries(info, split)]


def run_python(code: str, *arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        **options,
    )


BUILD = """
    import logging, sys
    from pathlib import Path
    from datamodules.build import ensure_dataset, WriterSettings
    from tests.datamodules.synthetic import Squares
    logging.basicConfig(level=logging.INFO)
    source = Squares(num_tasks=8, trace=sys.argv[2], pause_s=float(sys.argv[3]))
    ensure_dataset(source, Path(sys.argv[1]), {"num_tasks": 8}, num_workers=2,
                   settings=WriterSettings(max_samples_per_shard=4))
"""


def alive(folder: Path) -> list[int]:
    """The worker processes that have begun a task and still run."""
    pids = {int(path.name.rpartition("-")[2]) for path in folder.iterdir()}
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            continue
        running += [pid] if state != "Z" else []
    return running


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


class _OneProcessPool:
    """Stands in for the pool where the process itself is to be killed, again and again."""

    def __init__(self, function, context, **options) -> None:
        self._function, self._context = function, context

    def run(self, items):
        for item in items:
            yield item, self._function(self._context, item, lambda note: None)


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


def _stop_when_whole(source: Squares, root: Path, settings: WriterSettings, monkeypatch) -> None:
    """Leaves a half-built set to which nothing is missing but its name."""

    def stop(partial: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_tidy", stop)
        with pytest.raises(KeyboardInterrupt):
            make(source, root, 1, settings)
    assert (sibling(root, "partial") / "dataset.json").exists()


def _die_before_change(number: int) -> None:
    counter = iter(range(10_000))

    def counted(function):
        def change(*args, **kwargs):
            if next(counter) == number:
                os._exit(9)
            return function(*args, **kwargs)

        return change

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


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


class _AllBad(Squares):
    def __init__(self) -> None:
        super().__init__(num_tasks=1, splits=("train",))

    def samples(self, task):
        raise KeyError("nothing")


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
        patch.setattr("datamodules.parts.ShardWriter.add", full)
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


def test_two_processes_at_once_build_once(tmp_path):
    trace = tmp_path / "trace"
    trace.mkdir()
    processes = [run_python(BUILD, tmp_path / "set", trace, 0.02, stderr=subprocess.PIPE) for _ in range(3)]
    logs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], logs
    assert sum("first use" in log for log in logs) == 1
    started = [path.name.split("-")[0] for path in trace.iterdir()]
    assert sorted(started) == [f"t{n}" for n in range(8)]
    assert beside(tmp_path / "set") == ["set", "trace"]


def ensure(root: Path, num_tasks: int = 1, settings: WriterSettings = SMALL, **options) -> DatasetInfo:
    source = Squares(num_tasks=num_tasks, version=options.pop("version", 1))
    request = {"scene": {"num_tasks": num_tasks}, "seed": 0}
    return ensure_dataset(source, root, request, settings=settings, progress=False, **options)


def test_ensure_builds_once_and_reuses(tmp_path, monkeypatch):
    first = ensure(tmp_path / "set")
    monkeypatch.setattr(build, "_build", None)
    assert ensure(tmp_path / "set") == first


def test_ensure_refuses_other_settings_by_name(tmp_path):
    ensure(tmp_path / "set")
    before = content(tmp_path / "set")
    with pytest.raises(ConfigError) as caught:
        ensure(tmp_path / "set", num_tasks=2, version=3, key="data.doom")
    text = str(caught.value)
    assert "scene.num_tasks (there: 1, wanted: 2), source_version (there: 1, wanted: 3)" in text
    assert "data.doom.root" in text
    assert "data.doom.rebuild=true" in text
    assert "seed" not in text
    assert content(tmp_path / "set") == before
    with pytest.raises(ConfigError, match=r"encode\.crf \(there: 16, wanted: 20\)"):
        ensure(tmp_path / "set", settings=WriterSettings(encode=build.EncodeSettings(crf=20)))


def test_ensure_rebuilds_other_settings_when_told(tmp_path, monkeypatch):
    ensure(tmp_path / "set")
    second = ensure(tmp_path / "set", num_tasks=2, rebuild=True)
    assert len(keys(second, "train")) == 6
    monkeypatch.setattr(build, "_build", None)
    assert ensure(tmp_path / "set", num_tasks=2, rebuild=True) == second


def test_ensure_says_what_is_wrong_with_a_damaged_set(tmp_path):
    ensure(tmp_path / "set")
    (tmp_path / "set" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json cannot be read"):
        ensure(tmp_path / "set")


def test_a_stopped_build_of_other_settings_is_discarded(tmp_path, caplog):
    caplog.set_level("INFO", "longtake")
    (tmp_path / "set.partial" / "parts").mkdir(parents=True)
    (tmp_path / "set.partial" / "build.json").write_text("{}")
    (tmp_path / "set.partial" / "parts" / "000000.rows").write_text("")
    (tmp_path / "set.partial" / "parts" / "000000.data").write_text("")
    assert len(keys(ensure(tmp_path / "set"), "train")) == 3
    assert "begun with other settings" in caplog.text


@pytest.mark.parametrize(
    ("name", "is_cut"),
    [
        ("train-000000.tar", True),
        ("train-000001.index.jsonl", True),
        ("parts/000002.data", True),
        ("parts/000002.data", False),
        ("parts/000000.rows", False),
    ],
)
def test_a_tampered_partial_is_not_continued_blindly(name, is_cut, tmp_path, monkeypatch):
    source, root = Squares(num_tasks=3, splits=("train",)), tmp_path / "set"
    monkeypatch.setattr(build, "WorkerPool", _OneProcessPool)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("datamodules.parts.Packer.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            make(source, root, 1)
    path = tmp_path / "set.partial" / name
    if name.endswith(".jsonl"):
        path.unlink()
    elif name.endswith(".rows"):
        path.write_text(path.read_text().replace("s000-1", "s000-9"))
    else:
        damaged = bytearray(path.read_bytes())
        if is_cut:
            del damaged[-1000:]
        else:
            damaged[-500] ^= 1  # in the last sample, which is in no shard yet
        path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"changed by someone else.*Delete .*set\.partial"):
        make(source, root, 1)
    assert not root.exists()


def test_parts_go_as_soon_as_their_samples_are_in_shards(tmp_path):
    source = Squares(num_tasks=5, splits=("train",))
    for name in ("parts", "records"):
        (tmp_path / name).mkdir()
    context = parts.PartContext(source, source.info(), SMALL.encode, tmp_path / "parts")
    packer = parts.Packer(tmp_path, max_samples=4, max_bytes=2**20)
    left = []
    for number, task in enumerate(source.tasks()):
        parts.write_part(context, (number, task), lambda note: None)
        packer.add_part(number, task)
        left.append(sorted(path.name for path in (tmp_path / "parts").glob("*.data")))
    packer.close()
    names = [f"00000{number}.data" for number in range(5)]
    # Shards of 4 samples from parts of 3: a shard is written when the first sample of the next one is seen.
    assert left == [names[:1], names[1:2], names[2:3], names[2:4], names[4:]]


def test_memory_does_not_grow_with_the_set(tmp_path):
    """30 MB of samples pass through; neither the writer nor a worker ever holds a fifth of that."""
    code = """
        import resource, sys
        from pathlib import Path
        from datamodules import parts
        from datamodules.build import build_dataset, WriterSettings
        from tests.datamodules.synthetic import Squares

        def peak(who):
            return resource.getrusage(who).ru_maxrss * 1024

        for name, num_tasks in (("small", 1), ("large", 30)):
            source = Squares(num_tasks=num_tasks, per_task=1, splits=("train",), ballast=1_000_000)
            build_dataset(source, Path(sys.argv[1], name), request={"n": num_tasks}, num_workers=1,
                          progress=False, settings=WriterSettings(max_samples_per_shard=64))
            print(peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN))
    """
    process = run_python(code, tmp_path, stdout=subprocess.PIPE)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    small, large = (list(map(int, line.split())) for line in output.splitlines())
    assert (tmp_path / "large" / "train-000000.tar").stat().st_size > 30_000_000
    assert large[0] - small[0] < 5_000_000
    assert large[1] - small[1] < 5_000_000


def test_the_number_of_workers_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="num_workers"):
        make(Squares(), tmp_path / "set", 0)


@pytest.mark.parametrize("name", ["max_samples_per_shard", "max_bytes_per_shard", "task_timeout_s"])
@pytest.mark.parametrize("value", [0, -1, "many"])
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=f"writer.{name}"):
        WriterSettings(**{name: value})
