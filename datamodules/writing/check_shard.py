"""Checking one shard: its tar as it really is, its index, and the content of every member.

A shard may hold anything; it is read here block by block, nothing of it is extracted, unpickled or executed,
and the whole check runs in a worker process that may die.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

from datamodules.shards import SampleEntry, ShardInfo, index_path
from datamodules.sources.base import SourceInfo
from datamodules.writing.sample_rules import (
    check_caption,
    check_content,
    check_key,
    check_member_name,
    check_safetensors,
    check_table,
    check_tokens,
    load_npy,
)
from datamodules.writing.shard_writer import BLOCK, END_OF_ARCHIVE, check_video_member
from datamodules.writing.worker_pool import Beat
from longtake.errors import BadSampleError
from longtake.media.read import check_video

MAX_PROBLEMS = 1000
_CHUNK = 2**22


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where; "" where it concerns the whole file, sample or set."""

    shard: str
    key: str
    member: str
    reason: str

    def __str__(self) -> str:
        return " ".join([*filter(None, (self.shard, self.key, self.member))]) + f": {self.reason}"


@dataclass(frozen=True)
class ShardJob:
    """One shard to check.

    Attributes:
        path: the tar.
        split: name of its split, "" where nobody knows.
        expected: what dataset.json says of it, None where that cannot be read.
        skip: keys that killed a worker before, left out now.
    """

    path: Path
    split: str
    expected: ShardInfo | None
    skip: frozenset[str] = frozenset()


@dataclass
class ShardReport:
    """What was found in one shard.

    Attributes:
        problems: what is wrong, the first `MAX_PROBLEMS` of them.
        num_problems: how much is wrong.
        keys: every sample, in tar order.
        episodes: what they were cut from.
        lengths: number of samples by pixel frames.
        sizes: number of samples by the size of their views, "64x48 @ 35/3".
        num_bytes: bytes of the tar.
    """

    problems: list[Problem] = field(default_factory=list)
    num_problems: int = 0
    keys: list[str] = field(default_factory=list)
    episodes: set[str] = field(default_factory=set)
    lengths: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0

    def add(self, problem: Problem) -> None:
        """Notes a problem."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


@dataclass(frozen=True)
class _Member:
    name: str
    header: int
    start: int
    size: int


def check_shard(source: SourceInfo | None, job: ShardJob, beat: Beat) -> ShardReport:
    """Returns what is wrong with a shard; runs in a worker process.

    Args:
        source: what is true of every sample, None where dataset.json cannot be read.
        job: the shard.
        beat: called with the key before each sample is looked at.
    """
    report = ShardReport()
    name = job.path.name
    try:
        report.num_bytes = job.path.stat().st_size
        _check_bytes(job, report)
        with job.path.open("rb") as file:
            _ShardCheck(source, job, report, file).run(beat)
    except OSError as error:
        report.add(Problem(name, "", "", f"cannot be read: {error}"))
    return report


class _ShardCheck:
    def __init__(self, source: SourceInfo | None, job: ShardJob, report: ShardReport, file: BinaryIO) -> None:
        self._source = source
        self._job = job
        self._report = report
        self._file = file

    def run(self, beat: Beat) -> None:
        samples = self._scan()
        index = self._read_index()
        if index is not None:
            self._compare(samples, index)
        for key, members in samples:
            self._report.keys.append(key)
            if key not in self._job.skip:
                beat(key)
                self._check_sample(key, members, None if index is None else index.get(key))

    def _problem(self, reason: object, key: str = "", member: str = "") -> None:
        self._report.add(Problem(self._job.path.name, key, member, str(reason)))

    def _scan(self) -> list[tuple[str, dict[str, _Member]]]:
        """Returns the samples of the tar by key, in order: neighbouring members of one key are one sample."""
        samples: list[tuple[str, dict[str, _Member]]] = []
        for entry in self._tar_members():
            key, _, member = entry.name.partition(".")
            try:
                check_key(key)
                check_member_name(member, self._source)
            except BadSampleError as error:
                self._problem(f"tar holds {entry.name!r}: {error}", key if len(key) < 100 else "")
                continue
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            if member in samples[-1][1]:
                self._problem("is there twice", key, member)
            samples[-1][1][member] = entry
        double = [key for key, count in Counter(key for key, _ in samples).items() if count > 1]
        for key in double:
            self._problem("duplicate key: another sample of this shard has it too", key)
        return samples

    def _tar_members(self) -> Iterator[_Member]:
        """Yields the plain files of the tar; names what else there is, and where it stops making sense."""
        end, offset = self._report.num_bytes, 0
        while True:
            self._file.seek(offset)
            block = self._file.read(BLOCK)
            if not block.strip(b"\0"):
                if self._file.read() != END_OF_ARCHIVE[BLOCK:] or len(block) < BLOCK:
                    self._problem(f"tar does not end as it should at byte {offset}: cut off, or followed by something")
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
                if not 0 <= info.size <= end - offset - BLOCK:
                    raise tarfile.HeaderError(f"member {info.name!r} of {info.size} bytes reaches beyond the end")
            except (tarfile.HeaderError, ValueError, UnicodeError) as error:
                self._problem(f"tar is damaged at byte {offset} of {end}: {error}; what follows cannot be read")
                return
            if info.type != tarfile.REGTYPE:
                self._problem(f"tar holds {info.name!r} of type {info.type!r}; expected plain files only")
            else:
                yield _Member(info.name, offset, offset + BLOCK, info.size)
            offset += BLOCK + info.size + -info.size % BLOCK

    def _read_index(self) -> dict[str, SampleEntry] | None:
        path = index_path(self._job.path)
        try:
            content = path.read_bytes()
        except OSError as error:
            self._problem(f"its index cannot be read: {error.strerror or error}")
            return None
        if self._job.expected and hashlib.sha256(content).hexdigest() != self._job.expected.index_sha256:
            self._problem("its index differs from the checksum in dataset.json")
        entries: dict[str, SampleEntry] = {}
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                entry = SampleEntry.from_line(line.decode("utf-8"))
                check_key(entry.key)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                self._problem(f"line {number} of its index is damaged: {type(error).__name__}: {error}")
                continue
            if entry.key in entries:
                self._problem("duplicate key: it is in the index twice", entry.key)
            entries[entry.key] = entry
        if content and not content.endswith(b"\n"):
            self._problem("its index is cut off in the last line")
        return entries

    def _compare(self, samples: list[tuple[str, dict[str, _Member]]], index: dict[str, SampleEntry]) -> None:
        """Compares what the index says with what the tar holds."""
        found = dict(samples)
        for key in index.keys() - found.keys():
            self._problem("is in the index but not in the tar", key)
        for key, members in found.items():
            if key not in index:
                self._problem("is in the tar but not in the index", key)
                continue
            entry = index[key]
            spans = {name: (start, size) for name, (start, size, _) in entry.members.items()}
            real = {name: (member.start, member.size) for name, member in members.items()}
            for name in sorted(spans.keys() | real.keys()):
                if spans.get(name) != real.get(name):
                    words = f"index says (offset, bytes) {spans.get(name)}, the tar holds {real.get(name)}"
                    self._problem(words, key, name)
            first, last = (
                min(m.header for m in members.values()),
                max(m.start + m.size for m in members.values()),
            )
            if spans == real and (entry.offset, entry.size) != (first, last + -last % BLOCK - first):
                self._problem("its byte range in the index is not that of its members", key)
        order = [key for key, _ in samples if key in index]
        if order != [key for key in index if key in found] and len(set(order)) == len(order):
            self._problem("its index lists the samples in another order than the tar")

    def _check_sample(self, key: str, members: dict[str, _Member], entry: SampleEntry | None) -> None:
        content: dict[str, bytes] = {}
        for name, member in members.items():
            self._file.seek(member.start)
            content[name] = self._file.read(member.size)
            span = entry.members.get(name) if entry is not None else None
            if span is not None and zlib.crc32(content[name]) != span[2]:
                self._problem("differs from its checksum in the index", key, name)
        num_frames = entry.num_frames if entry is not None else None
        try:
            episode, num_frames = _read_meta(content)
            self._report.episodes.add(episode)
            self._report.lengths[num_frames] += 1
            if entry is not None and (entry.episode, entry.num_frames) != (episode, num_frames):
                words = f"index says {entry.episode!r}, {entry.num_frames} frames"
                raise BadSampleError(f"{words}; it holds {episode!r}, {num_frames} frames")
        except BadSampleError as error:
            self._problem(error, key, "json")
        if self._source is not None:
            self._check_present(key, content)
        for name in content:
            try:
                self._check_member(name, content[name], num_frames)
            except BadSampleError as error:
                self._problem(error, key, name)

    def _check_present(self, key: str, content: dict[str, bytes]) -> None:
        assert self._source is not None, "only called with a source"
        try:
            check_content(set(content), self._source)
        except BadSampleError as error:
            self._problem(error, key)
        tables = (("actions.npy", self._source.action_names), ("states.npy", self._source.state_names))
        for name, columns in tables:
            if columns and name not in content:
                self._problem(f"is missing; expected the columns {', '.join(columns)}", key, name)

    def _check_member(self, name: str, content: bytes, num_frames: int | None) -> None:
        source = self._source
        if name.endswith("mp4"):
            if source is None or num_frames is None:
                info = check_video(content)
            else:
                info = check_video_member(content, source, num_frames)
            if not name.startswith("control."):
                self._report.sizes[f"{info.width}x{info.height} @ {_rate_words(info.fps)}"] += 1
        elif name == "txt":
            for caption in _text(content).removesuffix("\n").split("\n"):
                check_caption(caption)
        elif name == "latents.safetensors":
            check_safetensors(content)
        elif name.endswith(".npy"):
            array = load_npy(content)
            if source is not None and num_frames is not None and name in ("actions.npy", "states.npy"):
                what, columns = name.removesuffix(".npy"), source.action_names
                check_table(what, array, columns if what == "actions" else source.state_names, num_frames)
            elif source is not None and name.startswith("tokens."):
                check_tokens(array, source)


def _check_bytes(job: ShardJob, report: ShardReport) -> None:
    if job.expected is None:
        return
    if report.num_bytes != job.expected.bytes:
        words = f"is {report.num_bytes} bytes long; dataset.json says {job.expected.bytes}"
        report.add(Problem(job.path.name, "", "", words))
    digest = hashlib.sha256()
    with job.path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != job.expected.sha256:
        report.add(Problem(job.path.name, "", "", "differs from its checksum in dataset.json"))


def _read_meta(content: dict[str, bytes]) -> tuple[str, int]:
    if "json" not in content:
        raise BadSampleError("is missing; expected episode and num_frames in it")
    try:
        meta = json.loads(_text(content["json"]))
        episode, num_frames = meta["episode"], meta["num_frames"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSampleError(f"cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(episode, str) or not isinstance(num_frames, int) or num_frames < 1:
        raise BadSampleError(f"states episode {episode!r}, num_frames {num_frames!r}; expected a name and a count")
    return episode, num_frames


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"is not utf-8: {error}") from error


def _rate_words(fps: Fraction) -> str:
    # Time bases round: 35/3 may come back as 11.66667.
    return f"{float(fps.limit_denominator(1001)):.4g} fps"
