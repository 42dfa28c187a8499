"""What the tests beside this file share."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from datamodules.shards import DatasetInfo, iterate_entries
from datamodules.writing import build
from datamodules.writing.atomic_folder import sibling
from datamodules.writing.build import WriterSettings, build_dataset, ensure_dataset
from tests.datamodules.synthetic import Squares

ROOT = Path(__file__).resolve().parents[3]


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
        preexec_fn=_hear_interrupts,
        **options,
    )


def _hear_interrupts() -> None:
    # What a shell runs in the background ignores SIGINT, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


BUILD = """
    import logging, sys
    from pathlib import Path
    from datamodules.writing.build import ensure_dataset, WriterSettings
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


class _OneProcessPool:
    """Stands in for the pool where the process itself is to be killed, again and again."""

    def __init__(self, function, context, **options) -> None:
        self._function, self._context = function, context

    def run(self, items):
        for item in items:
            yield item, self._function(self._context, item, lambda note: None)


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


class _AllBad(Squares):
    def __init__(self) -> None:
        super().__init__(num_tasks=1, splits=("train",))

    def samples(self, task):
        raise KeyError("nothing")


def ensure(root: Path, num_tasks: int = 1, settings: WriterSettings = SMALL, **options) -> DatasetInfo:
    source = Squares(num_tasks=num_tasks, version=options.pop("version", 1))
    request = {"scene": {"num_tasks": num_tasks}, "seed": 0}
    return ensure_dataset(source, root, request, settings=settings, progress=False, **options)
