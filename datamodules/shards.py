"""The shard format: what `dataset.json` and the shard indices say, and reading one member of one sample.

A set is a folder of webdataset tars. Beside each tar lies an index, a line a sample, with the byte range and the
checksum of every member, so that any sample is read with one seek and no tar is ever parsed while training:

    dataset.json                 geometry, columns, licence, splits with shards, counts and checksums
    train-000000.tar             <key>.mp4, <key>.actions.npy, <key>.json, ...
    train-000000.index.jsonl     {"key", "episode", "num_frames", "offset", "size",
                                  "members": {name: [offset, bytes, crc32]}}

Nothing in here imports torch, and nothing that is read is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from datamodules.sources.base import SPLITS, SourceInfo, VideoSpec
from longtake.errors import BadSampleError, DataError, unknown_choice

FORMAT = "longtake-shards"
FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_SUFFIX = ".index.jsonl"
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
"""What keys, view names and control types look like: no dot, since members are `<key>.<member>`, and no path."""


def video_member(view: str, view_names: tuple[str, ...]) -> str:
    """Returns the member name of a view's video: "mp4" for a single camera, "<view>.mp4" for several."""
    return "mp4" if len(view_names) == 1 else f"{view}.mp4"


def control_member(control_type: str, view: str) -> str:
    """Returns the member name of a view's control video, "control.<type>.<view>.mp4"."""
    return f"control.{control_type}.{view}.mp4"


def index_path(shard: Path) -> Path:
    """Returns where the index of a shard lies: `train-000000.tar` -> `train-000000.index.jsonl`."""
    return shard.with_name(shard.name.removesuffix(".tar") + INDEX_SUFFIX)


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """One line of a shard index.

    Attributes:
        key: name of the sample, unique in the set.
        episode: what it was cut from.
        num_frames: pixel frames.
        offset: where its first tar header begins in the shard, in bytes.
        size: bytes up to the end of its last padded member.
        members: for each member name (data offset in the shard, bytes, crc32 of the bytes).
    """

    key: str
    episode: str
    num_frames: int
    offset: int
    size: int
    members: dict[str, tuple[int, int, int]]

    def to_line(self) -> str:
        """Returns the index line, with keys in a fixed order so that equal shards have equal indices."""
        row = asdict(self)
        row["members"] = {name: list(span) for name, span in self.members.items()}
        return json.dumps(row, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> SampleEntry:
        """Returns the entry of one index line. Raises ValueError, KeyError or TypeError on anything else."""
        row = json.loads(line)
        members = {str(name): (int(a), int(b), int(c)) for name, (a, b, c) in row["members"].items()}
        return cls(
            key=str(row["key"]),
            episode=str(row["episode"]),
            num_frames=int(row["num_frames"]),
            offset=int(row["offset"]),
            size=int(row["size"]),
            members=members,
        )


@dataclass(frozen=True)
class ShardInfo:
    """What `dataset.json` says of one shard; `lengths` counts its samples by pixel frames."""

    file: str
    num_samples: int
    num_frames: int
    bytes: int
    sha256: str
    index_sha256: str
    lengths: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one split, in order."""

    shards: tuple[ShardInfo, ...]

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_frames(self) -> int:
        """Pixel frames in the split, of one view."""
        return sum(shard.num_frames for shard in self.shards)

    @property
    def lengths(self) -> dict[int, int]:
        """Number of samples for each length in pixel frames, by rising length."""
        counts: dict[int, int] = {}
        for shard in self.shards:
            for length, count in shard.lengths.items():
                counts[length] = counts.get(length, 0) + count
        return dict(sorted(counts.items()))


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    Attributes:
        root: the folder that holds it.
        source: what is true of every sample (geometry, columns, licence, origin).
        splits: by name.
        request: the settings that made the set, plain JSON.
        fingerprint: hash of the request and of the format; equal requests give equal sets.
        skipped: {"count": int, "examples": [{"name", "reason"}]}.
    """

    root: Path
    source: SourceInfo
    splits: dict[str, SplitInfo]
    request: dict[str, Any]
    fingerprint: str
    skipped: dict[str, Any]

    def split(self, name: str, key: str = "data.splits") -> SplitInfo:
        """Returns a split. Raises ConfigError naming the splits that exist when it is not there."""
        if name not in self.splits:
            raise unknown_choice(f"split (of {self.root})", name, self.splits, key)
        return self.splits[name]

    def shard_paths(self, split: str) -> list[Path]:
        """Returns the paths of a split's tars, in order."""
        return [self.root / shard.file for shard in self.split(split).shards]

    def hours(self, split: str) -> float:
        """Returns how many hours of video the split holds, each view counted once; 0 without a frame rate."""
        video = self.source.video
        return 0.0 if video is None else float(self.splits[split].num_frames / video.fps / 3600)

    def to_json(self) -> str:
        """Returns the text of `dataset.json`."""
        source = asdict(self.source)
        if self.source.video is not None:
            source["video"] = {**asdict(self.source.video), "fps": str(self.source.video.fps)}
        splits = {
            name: {
                "num_samples": split.num_samples,
                "num_frames": split.num_frames,
                "shards": [
                    {**asdict(shard), "lengths": {str(k): n for k, n in shard.lengths.items()}}
                    for shard in split.shards
                ],
            }
            for name, split in self.splits.items()
        }
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        tail = {"request": self.request, "fingerprint": self.fingerprint, "splits": splits, "skipped": self.skipped}
        return json.dumps({**head, **source, **tail}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, root: Path, key: str = "data.root") -> DatasetInfo:
        """Returns the set in a folder.

        Args:
            root: the folder.
            key: configuration key to name in errors.

        Raises:
            DataError: there is no whole set, or `dataset.json` cannot be read as one.
        """
        path = root / DATASET_FILE
        if not path.is_file():
            half = root.with_name(root.name + ".partial")
            state = f"only a half-built one ({half})" if half.is_dir() else "no dataset.json"
            raise DataError(
                f"no data set in {root}: {state} is there; expected a folder written by "
                f"`python -m scripts.make_shards source=... output={root}`. Change `{key}`, or make the set."
            )
        try:
            return _parse(root, json.loads(path.read_text(encoding="utf-8")))
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise DataError(
                f"{path} cannot be read ({type(error).__name__}: {error}); expected the file as make_shards wrote it. "
                f"Make the set again with overwrite=true, or change `{key}`."
            ) from error


def _parse(root: Path, data: dict[str, Any]) -> DatasetInfo:
    if data["format"] != FORMAT or data["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{root / DATASET_FILE} has format {data['format']!r} version {data['format_version']!r}; expected "
            f"{FORMAT!r} version {FORMAT_VERSION}. Make the set again with `python -m scripts.make_shards`."
        )
    video = data["video"]
    source = SourceInfo(
        name=str(data["name"]),
        licence=str(data["licence"]),
        origin=str(data["origin"]),
        video=video and VideoSpec(Fraction(video["fps"]), int(video["height"]), int(video["width"])),
        view_names=tuple(data["view_names"]),
        action_names=tuple(data["action_names"]),
        state_names=tuple(data["state_names"]),
        control_types=tuple(data["control_types"]),
        rig=data["rig"],
        tokens=data["tokens"],
        latents=data["latents"],
    )
    splits = {}
    for name, split in data["splits"].items():
        shards = [
            ShardInfo(**{**s, "lengths": {int(k): int(n) for k, n in s["lengths"].items()}}) for s in split["shards"]
        ]
        for shard in shards:
            if Path(shard.file).name != shard.file:
                raise DataError(f"{root / DATASET_FILE} names a shard outside its folder: {shard.file!r}; refused")
        splits[str(name)] = SplitInfo(tuple(shards))
    ordered = {name: splits[name] for name in (*SPLITS, *splits) if name in splits}
    return DatasetInfo(root, source, ordered, data["request"], str(data["fingerprint"]), data["skipped"])


ADVICE = "Run `python -m scripts.check_shards input=<set>` to see all damage, and make the set again."


def read_index_bytes(path: Path, expected: ShardInfo | None = None) -> bytes:
    """Returns the content of an index file.

    Args:
        path: the index.
        expected: what `dataset.json` says of its shard; the index must have that checksum.

    Raises:
        DataError: the index is missing, or not the one that belongs to the shard.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"shard index {path} cannot be read ({error.strerror}). {ADVICE}") from error
    if expected is not None and hashlib.sha256(content).hexdigest() != expected.index_sha256:
        raise DataError(f"shard index {path} differs from its checksum in {DATASET_FILE}. {ADVICE}")
    return content


def read_index(shard: Path, expected: ShardInfo | None = None) -> list[SampleEntry]:
    """Returns the samples of a shard, in tar order; arguments and errors as for `read_index_bytes`."""
    path = index_path(shard)
    content = read_index_bytes(path, expected)
    try:
        return [SampleEntry.from_line(line) for line in content.decode("utf-8").split("\n") if line]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"shard index {path} is damaged ({type(error).__name__}: {error}). {ADVICE}") from error


def read_member(shard: BinaryIO, entry: SampleEntry, member: str) -> bytes:
    """Returns the bytes of one member, checked against the checksum taken when they were verified.

    Reads by position, so an open shard may be shared by threads and by forked processes.

    Raises:
        BadSampleError: the sample has no such member, or its bytes are not those that were written.
    """
    span = entry.members.get(member)
    if span is None:
        raise BadSampleError(f"member {member!r} is missing (it has: {', '.join(sorted(entry.members)) or 'none'})")
    offset, num_bytes, crc = span
    content = os.pread(shard.fileno(), num_bytes, offset)
    if len(content) != num_bytes:
        raise BadSampleError(f"member {member!r} is cut off: {len(content)} of {num_bytes} bytes are there")
    if zlib.crc32(content) != crc:
        raise BadSampleError(f"member {member!r} differs from its checksum: damaged after it was written")
    return content


def iterate_entries(info: DatasetInfo, split: str) -> Iterator[tuple[Path, SampleEntry]]:
    """Yields (shard path, entry) for every sample of a split, in order."""
    for path, shard in zip(info.shard_paths(split), info.split(split).shards, strict=True):
        for entry in read_index(path, shard):
            yield path, entry
