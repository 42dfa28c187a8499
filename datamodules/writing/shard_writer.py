"""Samples -> bytes -> shards: encoding and checking one sample, and writing tars and indices.

Equal samples give equal bytes: headers carry no time, owner or process, videos are encoded on one thread, and
JSON has its keys in order. Every video is decoded again before it is accepted, so a checksum in an index says
that these bytes were decoded once, to the right number of frames.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.shards import SampleEntry, ShardInfo, control_member, index_path, video_member
from datamodules.sources.base import RawSample, SourceInfo
from datamodules.writing.sample_rules import (
    check_key,
    check_safetensors,
    check_sample,
    check_tables,
    has_encoded_video,
    video_members,
)
from longtake.errors import BadSampleError, ConfigError
from longtake.media.read import VideoInfo, check_video, probe_video
from longtake.media.write import encode_video

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
RESERVED_META = ("episode", "num_frames")
FPS_TOLERANCE = Fraction(1, 1000)
"""Relative difference of frame rates that is rounding of a container's time base, not another rate."""


@dataclass(frozen=True)
class EncodeSettings:
    """How raw frames become h264.

    Attributes:
        crf: quality, 0 (lossless) to 51; 16 is close to transparent.
        gop: frames from key frame to key frame: what is decoded in vain when a clip starts in between.
    """

    crf: int = 16
    gop: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.crf, int) or not 0 <= self.crf <= 51:
            raise ConfigError(f"crf is {self.crf!r}; expected 0 to 51. Change `writer.encode.crf`.")
        if not isinstance(self.gop, int) or self.gop < 1:
            raise ConfigError(f"gop is {self.gop!r}; expected at least 1 frame. Change `writer.encode.gop`.")


def encode_sample(sample: RawSample, info: SourceInfo, settings: EncodeSettings) -> dict[str, bytes]:
    """Returns the members of a sample by name, in the order in which they are written.

    Raises:
        BadSampleError: the sample is not what `info` says, or a video of it cannot be decoded.
    """
    num_frames = check_sample(sample, info)
    videos = _encode_videos(sample, info, settings)
    if num_frames is None:
        first = next(name for name in videos if not name.startswith("control."))
        num_frames = probe_video(videos[first]).num_frames
        check_tables(sample, info, num_frames)
    for name, content in videos.items():
        try:
            check_video_member(content, info, num_frames)
        except BadSampleError as error:
            raise BadSampleError(f"member {name!r}: {error}") from error
    others = {name: sample.encoded[name] for name in sorted(sample.encoded) if name not in videos}
    if "latents.safetensors" in others:
        check_safetensors(others["latents.safetensors"])
    members = {**videos, **others}
    if sample.tokens is not None:
        members["tokens.npy"] = _npy(sample.tokens.astype(np.int32))
    if sample.actions is not None:
        members["actions.npy"] = _npy(sample.actions)
    if sample.states is not None:
        members["states.npy"] = _npy(sample.states)
    try:
        if sample.captions:
            members["txt"] = "".join(caption + "\n" for caption in sample.captions).encode("utf-8")
        members["json"] = _meta_json(sample, num_frames)
    except UnicodeEncodeError as error:
        raise BadSampleError(f"text cannot be written as utf-8: {error}") from error
    return members


def check_video_member(content: bytes, info: SourceInfo, num_frames: int) -> VideoInfo:
    """Decodes a video, compares it with what the set states, and returns what it is.

    Raises:
        BadSampleError: it cannot be decoded to the last frame, is of a kind that fast readers get wrong, or
            its size, rate or number of frames differ.
    """
    spec = info.video
    if spec is None:
        raise BadSampleError("it is a video, but the source states no frame size")
    found = check_video(content)
    if (found.height, found.width) != (spec.height, spec.width):
        raise BadSampleError(f"frames are {found.width}x{found.height}; expected {spec.width}x{spec.height}")
    if found.num_frames != num_frames:
        raise BadSampleError(f"{found.num_frames} frames can be decoded; expected {num_frames}")
    # A single frame lasts as long as the container says: there is no rate to measure.
    if num_frames > 1 and abs(found.fps - spec.fps) > spec.fps * FPS_TOLERANCE:
        raise BadSampleError(f"it runs at {found.fps} frames/s; expected {spec.fps}")
    return found


def pack_sample(key: str, members: dict[str, bytes]) -> tuple[bytes, dict[str, tuple[int, int, int]]]:
    """Returns the tar bytes of one sample and, by member, (offset in them, bytes, crc32).

    Raises:
        BadSampleError: a name is too long for a tar header, or a member too large.
    """
    check_key(key)
    parts: list[bytes] = []
    spans: dict[str, tuple[int, int, int]] = {}
    offset = 0
    for member, content in members.items():
        header = tarfile.TarInfo(f"{key}.{member}")
        header.size, header.mode = len(content), 0o644
        try:
            head = header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        except ValueError as error:
            raise BadSampleError(f"member {member!r} does not fit into a tar header: {error}") from error
        spans[member] = (offset + len(head), len(content), zlib.crc32(content))
        parts += [head, content, bytes(-len(content) % BLOCK)]
        offset += len(head) + len(content) + len(parts[-1])
    return b"".join(parts), spans


class ShardWriter:
    """Writes one shard and its index, seen under their names only when both are whole and on disk.

    Args:
        path: where the tar goes; its index goes beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _temporary(path).open("wb")
        self._hash = hashlib.sha256()
        self._lines: list[str] = []
        self._lengths: Counter[int] = Counter()
        self._offset = 0

    def add(self, entry: SampleEntry, content: bytes) -> None:
        """Appends a sample.

        Args:
            entry: the sample, its offsets relative to wherever `entry.offset` lies.
            content: its tar bytes, as `pack_sample` returns them.
        """
        assert len(content) == entry.size, f"{len(content)} bytes for {entry}"
        moved = move_entry(entry, self._offset)
        self._write(content)
        self._lines.append(moved.to_line())
        self._lengths[entry.num_frames] += 1

    def close(self) -> ShardInfo:
        """Ends the tar, writes the index and puts both in place. Returns what `dataset.json` says of them."""
        self._write(END_OF_ARCHIVE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = "".join(self._lines).encode("utf-8")
        _temporary(self.path).replace(self.path)
        write_atomic(index_path(self.path), index)
        return ShardInfo(
            file=self.path.name,
            num_samples=len(self._lines),
            num_frames=sum(length * count for length, count in self._lengths.items()),
            bytes=self._offset,
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            lengths=dict(sorted(self._lengths.items())),
        )

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        _temporary(self.path).unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._offset += len(content)


def move_entry(entry: SampleEntry, offset: int) -> SampleEntry:
    """Returns the entry of a sample that is put at another place."""
    by = offset - entry.offset
    members = {name: (start + by, size, crc) for name, (start, size, crc) in entry.members.items()}
    return SampleEntry(entry.key, entry.episode, entry.num_frames, offset, entry.size, members)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file that is seen whole or not at all, also after a loss of power."""
    with _temporary(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _temporary(path).replace(path)


def _temporary(path: Path) -> Path:
    # The process id keeps a killed build's last breath out of the files of the one that continues it.
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _encode_videos(sample: RawSample, info: SourceInfo, settings: EncodeSettings) -> dict[str, bytes]:
    raw = {video_member(view, info.view_names): frames for view, frames in sample.views.items()}
    for kind, views in sample.control.items():
        raw |= {control_member(kind, view): frames for view, frames in views.items()}
    videos: dict[str, bytes] = {}
    for name in video_members(info) if raw or has_encoded_video(sample) else ():
        if name in raw:
            assert info.video is not None, "check_sample refuses video without a frame size"
            videos[name] = encode_video(raw[name], fps=info.video.fps, crf=settings.crf, gop=settings.gop)
        elif name in sample.encoded:
            videos[name] = sample.encoded[name]
    return videos


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def _meta_json(sample: RawSample, num_frames: int) -> bytes:
    stated: dict[str, Any] = {"episode": sample.episode, "num_frames": num_frames}
    clash = [name for name in RESERVED_META if name in sample.meta and sample.meta[name] != stated[name]]
    if clash:
        raise BadSampleError(f"meta states {clash[0]} {sample.meta[clash[0]]!r}; the sample has {stated[clash[0]]!r}")
    try:
        text = json.dumps({**sample.meta, **stated}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSampleError(f"meta cannot be written as JSON: {error}") from error
    return text.encode("utf-8")
