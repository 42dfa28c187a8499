"""A set while it is being built: a part for each finished task, and the packing of parts into shards.

    <root>.partial/build.json              which build this is
    <root>.partial/parts/000012.data       tar bytes of the samples of task 12
    <root>.partial/parts/000012.rows       their index lines, and what was skipped; the task is finished
    <root>.partial/train-000000.tar ...    finished shards
    <root>.partial/records/train-000000.json   what dataset.json will say of it; the shard is whole

Which sample goes where follows from the rows alone, taken in task order. So a build that is continued plans
everything again from the first row, finds the shards that have a record, and copies bytes only for the rest;
a part's data goes as soon as all its samples lie in finished shards, so little more than the set is ever on
disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.shards import SampleEntry, ShardInfo, SplitInfo, index_path
from datamodules.sources.base import RawSample, Skipped, Source, SourceInfo, Task
from datamodules.writing.atomic_folder import NO_SPACE
from datamodules.writing.shard_writer import (
    END_OF_ARCHIVE,
    EncodeSettings,
    ShardWriter,
    encode_sample,
    move_entry,
    pack_sample,
    write_atomic,
)
from datamodules.writing.worker_pool import Beat
from longtake.errors import BadSampleError, ConfigError, DataError

_log = logging.getLogger("longtake")
MAX_EXAMPLES = 100
MAX_LOGGED = 20
MAX_REASON = 1000
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True)
class PartContext:
    """What every worker of a build needs to know."""

    source: Source
    info: SourceInfo
    encode: EncodeSettings
    folder: Path


@dataclass(frozen=True)
class PartSummary:
    """What a finished part holds, for the progress display."""

    num_samples: int
    num_skipped: int
    num_bytes: int


def write_part(context: PartContext, item: tuple[int, Task], beat: Beat) -> PartSummary:
    """Writes the part of one task; runs in a worker process.

    Raises:
        ConfigError: the source's settings cannot work.
        OSError: the part cannot be written.
    """
    number, task = item
    data, rows = part_paths(context.folder, number)
    temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (data, rows)]
    num_samples = num_skipped = offset = 0
    try:
        with (
            temporary[0].open("wb") as data_file,
            temporary[1].open("w", encoding="utf-8", newline="\n") as rows_file,
        ):
            for result in _encoded_samples(context, task):
                if isinstance(result, Skipped):
                    rows_file.write(_skipped_line(result))
                    num_skipped += 1
                    beat("")
                    continue
                entry, content = result
                data_file.write(content)
                rows_file.write(move_entry(entry, offset).to_line())
                offset += len(content)
                num_samples += 1
                beat(f"after sample {entry.key!r}")
        temporary[0].replace(data)
        temporary[1].replace(rows)
    except OSError as error:
        error.filename = error.filename or str(data)  # a refused write does not say which file it was
        raise
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return PartSummary(num_samples, num_skipped, offset)


def write_failed_part(folder: Path, number: int, failure: Skipped) -> PartSummary:
    """Writes the part of a task that killed its workers: nothing but the reason."""
    data, rows = part_paths(folder, number)
    data.write_bytes(b"")
    write_atomic(rows, _skipped_line(failure).encode("utf-8"))
    return PartSummary(0, 1, 0)


def part_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Returns where the data and the rows of a task lie."""
    return folder / f"{number:06d}.data", folder / f"{number:06d}.rows"


def read_rows(folder: Path, number: int) -> Iterator[SampleEntry | Skipped]:
    """Yields the rows of a finished part, in order."""
    with part_paths(folder, number)[1].open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            if line.startswith('{"skipped":'):
                yield Skipped(**json.loads(line)["skipped"])
            else:
                yield SampleEntry.from_line(line)


def _encoded_samples(context: PartContext, task: Task) -> Iterator[tuple[SampleEntry, bytes] | Skipped]:
    """Yields what becomes of every sample; what the source raises ends the task, not the build."""
    try:
        for sample in context.source.samples(task):
            yield sample if isinstance(sample, Skipped) else _encoded(context, sample)
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        yield Skipped(task.id, _words(error))


def _encoded(context: PartContext, sample: RawSample) -> tuple[SampleEntry, bytes] | Skipped:
    try:
        members = encode_sample(sample, context.info, context.encode)
        content, spans = pack_sample(sample.key, members)
    except ConfigError:
        raise
    except Exception as error:  # one sample is never worth the rest of its task
        return Skipped(str(getattr(sample, "key", type(sample).__name__)), _words(error))
    num_frames = int(json.loads(members["json"])["num_frames"])
    return SampleEntry(sample.key, sample.episode, num_frames, 0, len(content), spans), content


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, BadSampleError | DataError) else f"{type(error).__name__}: {error}"


def _skipped_line(skipped: Skipped) -> str:
    # Names may come from file systems: what is not text must not keep dataset.json from being written.
    name, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (skipped.name, skipped.reason))
    text = json.dumps({"skipped": {"name": name, "reason": reason[:MAX_REASON]}})
    assert text.startswith('{"skipped":'), text
    return text + "\n"


@dataclass
class _OpenShard:
    entries: list[tuple[int, SampleEntry]] = field(default_factory=list)
    num_bytes: int = 0


class Packer:
    """Packs parts into shards, in task order.

    Args:
        folder: the half-built set.
        max_samples: samples a shard holds at most.
        max_bytes: tar bytes a shard holds at most; a single larger sample has a shard of its own.
    """

    def __init__(self, folder: Path, *, max_samples: int, max_bytes: int) -> None:
        self._folder = folder
        self._parts = folder / "parts"
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._open: dict[str, _OpenShard] = {}
        self._closed: dict[str, list[ShardInfo]] = {}
        self._unpacked: dict[int, int] = {}
        self._keys: set[str] = set()
        self._episodes: dict[str, str] = {}
        self._skipped_file = (folder / SKIPPED_FILE).open("w", encoding="utf-8", newline="\n")
        self.examples: list[dict[str, str]] = []
        self.num_skipped = 0
        self.num_samples = 0

    def add_part(self, number: int, task: Task) -> None:
        """Plans the samples of the next task, and writes the shards that it fills."""
        self._unpacked[number] = 1  # kept until every row has been seen
        for row in read_rows(self._parts, number):
            problem = row if isinstance(row, Skipped) else self._refusal(row, task.split)
            if problem is not None:
                self._skip(problem)
                continue
            assert isinstance(row, SampleEntry), row
            self._keys.add(row.key)
            self._episodes[row.episode] = task.split
            shard = self._open.setdefault(task.split, _OpenShard())
            full = len(shard.entries) == self._max_samples or shard.num_bytes + row.size > self._max_bytes
            if shard.entries and full:
                self._close(task.split)
                shard = self._open[task.split] = _OpenShard()
            shard.entries.append((number, row))
            shard.num_bytes += row.size
            self._unpacked[number] += 1
            self.num_samples += 1
        self._packed(number)

    def finish(self) -> dict[str, SplitInfo]:
        """Writes the shards that are still open. Returns the splits that have samples."""
        for split in list(self._open):
            self._close(split)
            del self._open[split]
        self._skipped_file.flush()
        os.fsync(self._skipped_file.fileno())
        self.close()
        return {split: SplitInfo(tuple(shards)) for split, shards in self._closed.items()}

    def close(self) -> None:
        """Closes what is open; what is half-written stays as it is, to be continued."""
        self._skipped_file.close()

    def _refusal(self, row: SampleEntry, split: str) -> Skipped | None:
        if row.key in self._keys:
            return Skipped(row.key, "another sample has this key already")
        other = self._episodes.get(row.episode, split)
        if other != split:
            return Skipped(row.key, f"episode {row.episode!r} is in split {other!r}; it cannot be in {split!r} as well")
        return None

    def _skip(self, skipped: Skipped) -> None:
        self.num_skipped += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(asdict(skipped))
        self._skipped_file.write(json.dumps(asdict(skipped), ensure_ascii=True) + "\n")
        if self.num_skipped <= MAX_LOGGED:
            _log.warning("skipped %s: %s", skipped.name, skipped.reason)
        elif self.num_skipped == MAX_LOGGED + 1:
            _log.warning("more is skipped; all of it will be in %s", SKIPPED_FILE)

    def _close(self, split: str) -> None:
        entries = self._open[split].entries
        done = self._closed.setdefault(split, [])
        name = f"{split}-{len(done):06d}"
        record = self._folder / "records" / f"{name}.json"
        if record.exists():
            info = self._recorded(record, name, entries)
        else:
            info = self._write_shard(self._folder / f"{name}.tar", entries)
            write_atomic(record, json.dumps(asdict(info)).encode("utf-8"))
        done.append(info)
        for number, _ in entries:
            self._packed(number)

    def _packed(self, number: int) -> None:
        self._unpacked[number] -= 1
        if not self._unpacked[number]:
            del self._unpacked[number]
            part_paths(self._parts, number)[0].unlink(missing_ok=True)

    def _write_shard(self, path: Path, entries: list[tuple[int, SampleEntry]]) -> ShardInfo:
        writer = ShardWriter(path)
        try:
            for number, entry in entries:
                writer.add(entry, self._read_part(number, entry))
            return writer.close()
        except BaseException:
            writer.abort()
            raise

    def _read_part(self, number: int, entry: SampleEntry) -> bytes:
        path = part_paths(self._parts, number)[0]
        with path.open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.size)
        spans = move_entry(entry, 0).members.values()
        whole = len(content) == entry.size
        if not whole or any(zlib.crc32(content[start : start + size]) != crc for start, size, crc in spans):
            raise self._damaged(f"{path} no longer holds sample {entry.key!r} as it was written")
        return content

    def _recorded(self, record: Path, name: str, entries: list[tuple[int, SampleEntry]]) -> ShardInfo:
        """Returns what was recorded of a finished shard, if it is the shard that is planned now."""
        offset, lines = 0, []
        for _, entry in entries:
            lines.append(move_entry(entry, offset).to_line())
            offset += entry.size
        row: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        info = ShardInfo(**{**row, "lengths": {int(length): count for length, count in row["lengths"].items()}})
        tar = self._folder / f"{name}.tar"
        planned = hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()
        size = tar.stat().st_size if tar.is_file() else None
        if info.index_sha256 != planned or size != offset + len(END_OF_ARCHIVE) or not index_path(tar).is_file():
            raise self._damaged(f"{tar} is not the shard that is planned")
        return info

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"the half-built set was changed by someone else: {what}. Delete {self._folder} and start again."
        )
