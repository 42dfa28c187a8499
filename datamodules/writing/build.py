"""A source -> a set of shards: in parallel, continued where a killed build was, never seen half-built.

`<root>.partial` holds the build (see `parts.py`) and is renamed to `<root>` when it is whole. `<root>.lock`
is held meanwhile, so of several processes that need the same set one builds it and the others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.shards import DATASET_FILE, FORMAT_VERSION, NAME_PATTERN, DatasetInfo
from datamodules.sources.base import Skipped, Source, SourceInfo, Task
from datamodules.writing.atomic_folder import disk_errors, locked, sibling, swap
from datamodules.writing.parts import Packer, PartContext, PartSummary, part_paths, write_failed_part, write_part
from datamodules.writing.progress import ProgressDisplay
from datamodules.writing.sample_rules import check_source_info
from datamodules.writing.shard_writer import EncodeSettings, write_atomic
from datamodules.writing.worker_pool import Crash, WorkerPool
from longtake.errors import ConfigError, DataError

_log = logging.getLogger("longtake")
_STATE_FILE = "build.json"
_FIRST_REASONS = 3
_OURS = re.compile(r"parts|records|(build|dataset)\.json.*|skipped\.jsonl|[A-Za-z0-9_-]+\.(tar|index\.jsonl).*")


@dataclass(frozen=True)
class WriterSettings:
    """How a set is written; only `encode` changes what is in it.

    Attributes:
        max_samples_per_shard: small enough that sets of a few hundred clips have shards for several workers.
        max_bytes_per_shard: tar bytes; a single larger sample has a shard of its own.
        task_timeout_s: seconds without a finished sample after which a worker counts as hung; None: never.
        encode: how frames become h264.
    """

    max_samples_per_shard: int = 16
    max_bytes_per_shard: int = 256 * 2**20
    task_timeout_s: float | None = 600.0
    encode: EncodeSettings = field(default_factory=EncodeSettings)

    def __post_init__(self) -> None:
        for name, kind in (
            ("max_samples_per_shard", int),
            ("max_bytes_per_shard", int),
            ("task_timeout_s", float),
        ):
            value = getattr(self, name)
            if value is None and name == "task_timeout_s":
                continue
            if not isinstance(value, int | kind) or value <= 0:
                raise ConfigError(f"writer.{name} is {value!r}; expected a positive number. Change `writer.{name}`.")


def full_request(source: Source, request: dict[str, Any], settings: WriterSettings) -> dict[str, Any]:
    """Returns all that decides what is in a set: the request, the version of the source's code, the encoding.

    Raises:
        ConfigError: the request is not plain JSON.
    """
    versioned = {
        **request,
        "source_version": getattr(source, "version", 1),
        "encode": asdict(settings.encode),
    }
    try:
        return json.loads(json.dumps(versioned, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the request of a set must be plain JSON ({error}): {request}") from error


def request_fingerprint(request: dict[str, Any]) -> str:
    """Returns the sha256 of a full request and the format version; equal fingerprints mean equal sets."""
    return _digest({"request": request, "format_version": FORMAT_VERSION})


def build_dataset(
    source: Source,
    root: Path,
    *,
    request: dict[str, Any],
    settings: WriterSettings,
    num_workers: int,
    overwrite: bool = False,
    progress: bool = True,
) -> DatasetInfo:
    """Builds a set in `root`, or continues a build of the same request that was stopped.

    Args:
        source: where the samples come from.
        root: folder of the set.
        request: the source's settings, plain JSON.
        settings: how it is written.
        num_workers: worker processes; the bytes do not depend on it.
        overwrite: whether a set in `root` may be replaced; it stays until the new one is whole.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: `root` exists and may not be replaced, or the settings cannot work.
        DataError: no sample of a split is left, or the disk is full or cannot be written; what is done is kept.
    """
    wanted = full_request(source, request, settings)
    root = root.resolve()
    with locked(root):
        _check_free(root, overwrite)
        return _build(source, root, wanted, settings, num_workers, progress)


def ensure_dataset(
    source: Source,
    root: Path,
    request: dict[str, Any],
    *,
    settings: WriterSettings | None = None,
    num_workers: int = 1,
    rebuild: bool = False,
    progress: bool = True,
    key: str = "data",
) -> DatasetInfo:
    """Returns the set in `root`, built first if it is not there; many processes may call this at once.

    Args:
        source, root, request, settings, num_workers, progress: as for `build_dataset`.
        rebuild: whether a set of other settings is replaced; one of the same settings is used as it is.
        key: configuration node that holds `root` and `rebuild`, for messages.

    Raises:
        ConfigError: `root` holds a set of other settings (the message names them), or something else.
        DataError: see `build_dataset`.
    """
    settings = settings or WriterSettings()
    wanted = full_request(source, request, settings)
    root = root.resolve()
    with contextlib.suppress(DataError):
        found = DatasetInfo.load(root, f"{key}.root")
        if found.fingerprint == request_fingerprint(wanted):
            return found
    with locked(root):
        if (root / DATASET_FILE).is_file():
            found = DatasetInfo.load(root, f"{key}.root")
            if found.fingerprint == request_fingerprint(wanted):
                return found
            if not rebuild:
                raise _other_settings(found, wanted, key)
            _log.info("the set in %s has other settings; it is made again (%s.rebuild=true)", root, key)
        else:
            _check_free(root, overwrite=False, key=f"{key}.root")
        _log.info("building %s (first use)", root)
        return _build(source, root, wanted, settings, num_workers, progress)


def _build(
    source: Source,
    root: Path,
    wanted: dict[str, Any],
    settings: WriterSettings,
    num_workers: int,
    progress: bool,
) -> DatasetInfo:
    if num_workers < 1:
        raise ConfigError(f"num_workers is {num_workers}; expected at least 1. Change `num_workers`.")
    info, tasks = _checked(source)
    partial = sibling(root, "partial")
    with disk_errors(partial, lambda: _still_needed(partial, len(tasks))):
        state = _state(info, tasks, wanted, settings)
        if not _is_whole(partial, state):
            _open_partial(partial, state)
            _build_partial(source, info, tasks, partial, wanted, settings, num_workers, progress)
        _tidy(partial)
        swap(partial, root)
    return DatasetInfo.load(root)


def _build_partial(
    source: Source,
    info: SourceInfo,
    tasks: list[Task],
    partial: Path,
    wanted: dict[str, Any],
    settings: WriterSettings,
    num_workers: int,
    progress: bool,
) -> None:
    packer = Packer(partial, max_samples=settings.max_samples_per_shard, max_bytes=settings.max_bytes_per_shard)
    with contextlib.closing(packer):
        with ProgressDisplay(
            f"building {partial.name.removesuffix('.partial')}", len(tasks), enabled=progress
        ) as shown:
            parts = PartContext(source, info, settings.encode, partial / "parts")
            finished = _finished_parts(parts, tasks, num_workers, settings.task_timeout_s)
            with contextlib.closing(finished):
                for number, num_finished in finished:
                    packer.add_part(number, tasks[number])
                    shown.update(num_finished, f"{packer.num_samples} samples, {packer.num_skipped} skipped")
        splits = packer.finish()
    skipped = {"count": packer.num_skipped, "examples": packer.examples}
    empty = sorted({task.split for task in tasks} - splits.keys())
    if empty:
        shutil.rmtree(partial)  # nothing in it is worth continuing, and what was wrong may be put right
        first = "; ".join(f"{row['name']}: {row['reason']}" for row in packer.examples[:_FIRST_REASONS])
        reasons = first or "the source is empty"
        what = f"in the split {', '.join(empty)}: " if packer.num_samples else "to write: all "
        raise DataError(
            f"nothing is left {what}{packer.num_skipped} samples were skipped ({reasons}). "
            "Expected at least one usable clip in every split. Change `source` or `input`."
        )
    whole = DatasetInfo(partial, info, splits, wanted, request_fingerprint(wanted), skipped)
    write_atomic(partial / DATASET_FILE, whole.to_json().encode("utf-8"))


def _finished_parts(
    parts: PartContext, tasks: list[Task], num_workers: int, timeout_s: float | None
) -> Generator[tuple[int, int], None, None]:
    """Yields (number of the next task in order, number of all finished tasks) as the workers finish them."""
    finished = {n for n in range(len(tasks)) if part_paths(parts.folder, n)[1].exists()}
    if finished:
        _log.info("continuing a build: %d of %d tasks are done", len(finished), len(tasks))
    missing = [(n, task) for n, task in enumerate(tasks) if n not in finished]
    pool = WorkerPool(
        write_part,
        parts,
        num_workers=max(1, min(num_workers, len(missing))),
        timeout_s=timeout_s,
        timeout_key="writer.task_timeout_s",
    )
    following, num_finished = 0, len(finished)
    with _without_left_overs(parts.folder), contextlib.closing(pool.run(missing)) as results:
        while following < len(tasks):
            while following in finished:
                finished.remove(following)
                yield following, num_finished
                following += 1
            if following == len(tasks):
                return
            (number, task), result = next(results)
            if isinstance(result, Crash):
                write_failed_part(parts.folder, number, Skipped(task.id, f"{result.reason} {result.note}".rstrip()))
            else:
                assert isinstance(result, PartSummary), result
            finished.add(number)
            num_finished += 1


@contextlib.contextmanager
def _without_left_overs(folder: Path) -> Iterator[None]:
    """Removes what killed workers had begun: on a full disk every byte counts."""
    try:
        yield
    finally:
        for left_over in folder.glob("*.tmp"):
            left_over.unlink(missing_ok=True)


def _checked(source: Source) -> tuple[SourceInfo, list[Task]]:
    info = source.info()
    check_source_info(info)
    tasks = source.tasks()
    ids = [task.id for task in tasks]
    for name in (*ids, *{task.split for task in tasks}):
        if not NAME_PATTERN.fullmatch(name):
            raise ConfigError(f"the source has a task or split named {name!r}; expected letters, digits, _ and - only")
    double, count = Counter(ids).most_common(1)[0] if ids else ("", 0)
    if count > 1:
        raise ConfigError(f"the source has two tasks named {double!r}; expected every id once")
    if not tasks:
        raise DataError("the source has no clips at all. Change `source` or `input`.")
    return info, tasks


def _state(info: SourceInfo, tasks: list[Task], wanted: dict[str, Any], settings: WriterSettings) -> dict[str, Any]:
    """Returns all that decides the bytes of a build; a build with another state cannot be continued."""
    work = _digest([[task.id, task.split, task.payload] for task in tasks])
    layout = {"samples": settings.max_samples_per_shard, "bytes": settings.max_bytes_per_shard}
    head = _digest({**asdict(info), "video": str(info.video)})
    return {
        "request": wanted,
        "fingerprint": request_fingerprint(wanted),
        "tasks": work,
        "layout": layout,
        "head": head,
    }


def _is_whole(partial: Path, state: dict[str, Any]) -> bool:
    """Returns whether a build of this state was stopped after its last step: dataset.json is written last."""
    if not (partial / DATASET_FILE).is_file() or _read_state(partial) not in (state, None):
        return False
    with contextlib.suppress(DataError):
        return DatasetInfo.load(partial).fingerprint == state["fingerprint"]
    return False


def _open_partial(partial: Path, state: dict[str, Any]) -> None:
    """Makes the folder of a build, or readies the one of the same build that was stopped."""
    if partial.exists() and _read_state(partial) != state:
        _check_ours(partial)
        _log.info("discarding %s: it was begun with other settings", partial)
        (partial / DATASET_FILE).unlink(missing_ok=True)  # first: what is half-deleted is not whole
        shutil.rmtree(partial)
    for folder in (partial, partial / "parts", partial / "records"):
        folder.mkdir(parents=True, exist_ok=True)
    for left_over in partial.rglob("*.tmp"):
        left_over.unlink()
    write_atomic(partial / _STATE_FILE, json.dumps(state).encode("utf-8"))


def _read_state(partial: Path) -> Any:
    try:
        return json.loads((partial / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _tidy(partial: Path) -> None:
    """Removes what a set does not need once it is whole."""
    for name in ("parts", "records"):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    (partial / _STATE_FILE).unlink(missing_ok=True)


def _check_ours(partial: Path) -> None:
    strangers = [path.name for path in partial.iterdir() if not _OURS.fullmatch(path.name)]
    if strangers:
        raise ConfigError(
            f"{partial} holds {strangers[0]!r}, which is no part of a half-built set; sets are built in that "
            "folder. Move it away, or change `output`."
        )


def _still_needed(partial: Path, num_tasks: int) -> int | None:
    """Returns about how many bytes a build still has to write, by what it has written; None at first."""
    num_finished = len(list(partial.glob("parts/*.rows")))
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    return written * (num_tasks - num_finished) // num_finished if num_finished else None


def _check_free(root: Path, overwrite: bool, key: str = "output") -> None:
    """Refuses to build over something. Raises ConfigError."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not (root / DATASET_FILE).is_file():
        raise ConfigError(f"{root} exists and is not a data set; it is never replaced. Change `{key}`.")
    if not overwrite:
        raise ConfigError(f"{root} exists already; set overwrite=true to replace it, or change `{key}`.")


def _other_settings(found: DatasetInfo, wanted: dict[str, Any], key: str) -> ConfigError:
    old, new = _flat(found.request), _flat(wanted)
    names = sorted(name for name in {*old, *new} if old.get(name, None) != new.get(name, None))
    words = ", ".join(f"{name} (there: {old.get(name, 'none')}, wanted: {new.get(name, 'none')})" for name in names)
    return ConfigError(
        f"the set in {found.root} was made with other settings: {words or 'another format version'}. "
        f"Give these their old values, change `{key}.root` to keep both sets, or set {key}.rebuild=true to "
        "replace it."
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for child in value for k, v in _flat(value[child], f"{name}.{child}" if name else str(child)).items()}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
