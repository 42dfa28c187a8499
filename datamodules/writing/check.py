"""Checking a whole set: dataset.json, the files beside it, every shard, and what no shard can see alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from datamodules.shards import DATASET_FILE, INDEX_SUFFIX, NAME_PATTERN, DatasetInfo, index_path
from datamodules.writing.check_shard import MAX_PROBLEMS, Problem, ShardJob, ShardReport, check_shard
from datamodules.writing.progress import ProgressDisplay
from datamodules.writing.sample_rules import check_source_info
from datamodules.writing.worker_pool import Crash, WorkerPool
from longtake.errors import ConfigError, DataError

MAX_CRASHES = 50


@dataclass
class SplitReport:
    """What was found in one split.

    Attributes:
        num_samples: clips in the tars.
        num_bytes: bytes of the tars.
        lengths: clips by pixel frames.
        sizes: views by size and rate.
        hours: of video, each view counted once; 0 where the rate is not known.
    """

    num_samples: int = 0
    num_bytes: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    hours: float = 0.0


@dataclass
class CheckReport:
    """What was found in a set: `problems` holds at most `MAX_PROBLEMS` a shard, `num_problems` counts all."""

    info: DatasetInfo | None
    problems: list[Problem] = field(default_factory=list)
    num_problems: int = 0
    splits: dict[str, SplitReport] = field(default_factory=dict)

    def add(self, shard: str, reason: str, key: str = "", member: str = "") -> None:
        """Notes a problem."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(shard, key, member, reason))


def check_dataset(
    root: Path, *, num_workers: int, timeout_s: float | None = 600.0, progress: bool = True
) -> CheckReport:
    """Returns everything that is wrong with a set, and what is in it. Survives any content.

    Args:
        root: folder of the set.
        num_workers: worker processes.
        timeout_s: seconds one sample may take; None for no limit.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: the folder does not exist, or holds nothing of a set.
    """
    if num_workers < 1:
        raise ConfigError(f"num_workers is {num_workers}; expected at least 1. Change `num_workers`.")
    tars = _tars(root)
    report = CheckReport(info=None)
    report.info = _read_head(root, report)
    jobs = _jobs(root, report, tars)
    found: dict[Path, tuple[ShardJob, ShardReport]] = {}
    with ProgressDisplay(f"checking {root}", len(jobs), enabled=progress) as shown:
        for job, shard in _run(jobs, report, num_workers, timeout_s):
            found[job.path] = job, shard
            shown.update(len(found), f"{sum(shard.num_problems for _, shard in found.values())} problems")
    in_order = [found[job.path] for job in jobs]
    for job, shard in in_order:
        _merge(report, job, shard)
    _check_across(report, in_order)
    return report


def _tars(root: Path) -> list[Path]:
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; expected a data set. Change `input`.")
    tars = sorted(path for path in root.iterdir() if path.suffix == ".tar")
    if not tars and not (root / DATASET_FILE).is_file():
        half = root.with_name(f"{root.name}.partial")
        hint = f" A half-built set lies in {half}: run make_shards again." if half.is_dir() else ""
        raise ConfigError(f"{root} holds neither {DATASET_FILE} nor tars; expected a data set.{hint} Change `input`.")
    return tars


def _read_head(root: Path, report: CheckReport) -> DatasetInfo | None:
    """Returns the content of dataset.json, None where it makes no sense; the shards then stand alone."""
    try:
        info = DatasetInfo.load(root, "input")
        problems = list(_schema_problems(json.loads((root / DATASET_FILE).read_text(encoding="utf-8"))))
        if not problems:
            check_source_info(info.source)
    except Exception as error:  # a damaged file may hold anything: wrong types, infinite numbers, endless nesting
        report.add(DATASET_FILE, str(error) if isinstance(error, DataError | ConfigError) else repr(error))
        return None
    for problem in problems:
        report.add(DATASET_FILE, problem)
    return None if problems else info


def _schema_problems(data: dict[str, Any]) -> Iterator[str]:
    """Yields what in a dataset.json has another type than the format says."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "name": _is_text,
        "licence": _is_text,
        "origin": _is_text,
        "view_names": _is_names,
        "action_names": _is_names,
        "state_names": _is_names,
        "control_types": _is_names,
        "rig": _is_object_or_null,
        "tokens": _is_object_or_null,
        "latents": _is_object_or_null,
        "request": lambda value: isinstance(value, dict),
        "fingerprint": _is_text,
    }
    for name, fits in kinds.items():
        if not fits(data[name]):
            yield f"{name} is {str(data[name])[:100]}, which the format does not allow"
    if data["tokens"] is not None and isinstance(data["tokens"], dict):
        grid = data["tokens"].get("grid")
        if not (isinstance(grid, list) and len(grid) == 3 and all(map(_is_count, grid))):
            yield f"tokens.grid is {grid}; expected [t, h, w]"
        if not _is_count(data["tokens"].get("vocab_size")):
            yield f"tokens.vocab_size is {data['tokens'].get('vocab_size')}; expected a count"
    skipped = data["skipped"]
    if not isinstance(skipped, dict) or not _is_count(skipped.get("count")):
        yield "skipped has no count"
    for split, content in data["splits"].items():
        if not NAME_PATTERN.fullmatch(split):
            yield f"split is named {split!r}"
        for shard in content["shards"]:
            counts = (
                *(shard[name] for name in ("num_samples", "num_frames", "bytes")),
                *shard["lengths"].values(),
            )
            if not all(map(_is_count, counts)) or not _is_text(shard["sha256"]) or not _is_text(shard["index_sha256"]):
                yield f"the entry of shard {shard['file']!r} makes no sense"
        sums = {name: sum(shard[name] for shard in content["shards"]) for name in ("num_samples", "num_frames")}
        for name, total in sums.items():
            if content[name] != total:
                yield f"split {split!r} states {name} {content[name]}, its shards have {total}"


def _jobs(root: Path, report: CheckReport, tars: list[Path]) -> list[ShardJob]:
    """Returns the shards to check; names those that are missing or that nobody knows."""
    if report.info is None:
        return [ShardJob(path, "", None) for path in tars]
    jobs, listed = [], set()
    for split, content in report.info.splits.items():
        for shard in content.shards:
            path = root / shard.file
            if shard.file in listed:
                report.add(shard.file, "is listed twice in dataset.json")
            elif not path.is_file():
                report.add(shard.file, "is missing")
            else:
                jobs.append(ShardJob(path, split, shard))
            listed.add(shard.file)
    for path in tars:
        if path.name not in listed:
            report.add(path.name, "is not listed in dataset.json; remove it, or make the set again")
    indices = {index_path(root / name).name for name in listed}
    for path in sorted(root.iterdir()):
        if path.name.endswith(INDEX_SUFFIX) and path.name not in indices:
            report.add(path.name, "belongs to no shard of dataset.json")
    return jobs


def _run(
    jobs: list[ShardJob], report: CheckReport, num_workers: int, timeout_s: float | None
) -> Iterator[tuple[ShardJob, ShardReport]]:
    """Yields the report of every shard; a sample that kills its worker is named and then left out."""
    pool = WorkerPool(
        check_shard,
        report.info and report.info.source,
        num_workers=num_workers,
        timeout_s=timeout_s,
        timeout_key="task_timeout_s",
        attempts=1,
    )
    num_crashes = 0
    for job, result in pool.run(jobs):
        if not isinstance(result, Crash):
            yield job, result
            continue
        num_crashes += 1
        report.add(job.path.name, result.reason, key=result.note)
        if result.note and result.note not in job.skip and num_crashes <= MAX_CRASHES:
            pool.submit(replace(job, skip=job.skip | {result.note}))
        else:
            report.add(job.path.name, "was not checked to its end")
            yield job, ShardReport()


def _merge(report: CheckReport, job: ShardJob, found: ShardReport) -> None:
    split = report.splits.setdefault(job.split, SplitReport())
    split.num_samples += len(found.keys)
    split.num_bytes += found.num_bytes
    split.lengths += found.lengths
    split.sizes += found.sizes
    report.num_problems += found.num_problems
    report.problems += found.problems
    video = report.info.source.video if report.info is not None else None
    if video is not None:
        frames = sum(length * count for length, count in found.lengths.items())
        split.hours += float(Fraction(frames) / video.fps / 3600)
    if job.expected is not None and not found.num_problems and not job.skip:
        # With other problems the counts differ because of them.
        if len(found.keys) != job.expected.num_samples:
            words = f"holds {len(found.keys)} samples; dataset.json says {job.expected.num_samples}"
            report.add(job.path.name, words)
        if dict(found.lengths) != job.expected.lengths:
            words = f"holds clips by frames {dict(found.lengths)}; dataset.json says {job.expected.lengths}"
            report.add(job.path.name, words)


def _check_across(report: CheckReport, reports: list[tuple[ShardJob, ShardReport]]) -> None:
    """Looks for keys that stand in two shards, and for episodes that stand in two splits."""
    keys: dict[str, str] = {}
    episodes: dict[str, ShardJob] = {}
    for job, found in reports:
        for key in dict.fromkeys(found.keys):
            if key in keys:
                report.add(job.path.name, f"duplicate key: {keys[key]} has it too", key=key)
            keys.setdefault(key, job.path.name)
        for episode in sorted(found.episodes):
            first = episodes.setdefault(episode, job)
            if first.split != job.split:
                other = f"by {first.path.name}, in {first.split!r}"
                words = f"episode {episode!r} is in split {job.split!r} and, {other}"
                report.add(job.path.name, words)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_object_or_null(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
