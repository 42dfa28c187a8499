"""What the tests beside this file share."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from datamodules.shards import DatasetInfo, SampleEntry, SplitInfo, read_index, read_member
from datamodules.writing.check import check_dataset
from datamodules.writing.check_shard import Problem, ShardJob, ShardReport, check_shard
from datamodules.writing.shard_writer import ShardWriter, pack_sample

ROOT = Path(__file__).resolve().parents[2]


SHARD = "train-000000.tar"


Samples = list[tuple[SampleEntry, dict[str, bytes]]]


def found(root: Path, num_workers: int = 1) -> list[Problem]:
    report = check_dataset(root, num_workers=num_workers, progress=False)
    assert report.num_problems == len(report.problems)
    return report.problems


def assert_only(root: Path, *expected: tuple[str, str, str, str]) -> None:
    """Exactly these problems: shard, key and member as given, and the reason holds the last part."""
    problems = found(root)
    for shard, key, member, reason in expected:
        place = (shard, key, member)
        fitting = [p for p in problems if (p.shard, p.key, p.member) == place and reason in p.reason]
        assert len(fitting) == 1, (place, reason, problems)
        problems.remove(fitting[0])
    assert problems == []


def edit_json(root: Path, change: Callable[[dict], object]) -> None:
    path = root / "dataset.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def repack(root: Path, change: Callable[[Samples], object], name: str = SHARD) -> None:
    """Writes a shard anew with other samples, and dataset.json to fit: only its content is wrong then."""
    shard = root / name
    with shard.open("rb") as file:
        samples = [(e, {m: read_member(file, e, m) for m in e.members}) for e in read_index(shard)]
    change(samples)
    writer = ShardWriter(shard)
    for sample, members in samples:
        content, spans = pack_sample(sample.key, members)
        writer.add(replace(sample, offset=0, size=len(content), members=spans), content)
    written = writer.close()
    info = DatasetInfo.load(root)
    splits = {
        split: SplitInfo(tuple(written if old.file == name else old for old in part.shards))
        for split, part in info.splits.items()
    }
    (root / "dataset.json").write_text(replace(info, splits=splits).to_json())


def set_member(number: int, name: str, content: bytes | None) -> Callable[[Samples], None]:
    def change(samples: Samples) -> None:
        if content is None:
            del samples[number][1][name]
        else:
            samples[number][1][name] = content

    return change


def rewrite_tar(root: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> None:
    """Writes a tar anew with other members; index and dataset.json stay."""
    with tarfile.open(root / SHARD) as tar:
        items = [(item, tar.extractfile(item).read()) for item in tar]  # type: ignore[union-attr]
    change(items)
    with tarfile.open(root / SHARD, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item, content in items:
            tar.addfile(item, io.BytesIO(content))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


FPS = Fraction(35, 3)


def crashing_check(source, job: ShardJob, beat) -> ShardReport:
    """Stands in for a decoder that takes the process with it."""

    def fatal(note: str) -> None:
        beat(note)
        if note in ("s000-1", "s001-0"):
            os.kill(os.getpid(), signal.SIGSEGV)

    return check_shard(source, job, fatal)


def _named(name: str, content: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info
