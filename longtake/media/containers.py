"""What kinds of video file may be opened, found from their first bytes, and whether the file is whole.

The demuxer is chosen here and never guessed by FFmpeg: a playlist that calls itself .mp4 could otherwise make
it open other files and addresses.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import BinaryIO

from longtake.errors import BadSampleError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
CODECS = frozenset(
    [
        "h264",
        "hevc",
        "av1",
        "vp8",
        "vp9",
        "mpeg1video",
        "mpeg2video",
        "mpeg4",
        "msmpeg4v2",
        "msmpeg4v3",
        "h263",
        "flv1",
        "mjpeg",
        "png",
        "gif",
        "ffv1",
        "huffyuv",
        "ffvhuff",
        "utvideo",
        "rawvideo",
        "prores",
        "dnxhd",
        "cinepak",
    ]
)
# Codecs of which a packet always gives exactly one frame (VP8 hides some, others are not sure).
ONE_FRAME_A_PACKET = frozenset(["h264", "hevc", "av1", "vp9", "mjpeg", "ffv1", "prores"])

MAX_SIDE = 8192
MAX_PIXELS = 8192 * 4320
MAX_FRAMES = 4_000_000
MAX_READ_BYTES = 4 << 30

_MOV_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"mfra")
)


def describe(source: Path | bytes) -> str:
    """Returns how a message should name this source."""
    return str(source) if isinstance(source, Path) else f"a video of {len(source)} bytes in memory"


def open_file(source: Path | bytes) -> BinaryIO:
    """Returns a readable, seekable file. FFmpeg never sees its name, so it cannot take it for a protocol.

    Raises:
        BadSampleError: the path is no regular file (missing, a pipe, a device), its ending is not a video's,
            or it is empty.
    """
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
    else:
        if source.suffix.lower() not in VIDEO_SUFFIXES:
            raise BadSampleError(f"{source}: the ending {source.suffix!r} is not one of {', '.join(VIDEO_SUFFIXES)}")
        if not source.is_file():
            raise BadSampleError(f"{source}: no such file" if not source.exists() else f"{source}: not a regular file")
        try:
            file = source.open("rb")
        except OSError as error:
            raise BadSampleError(f"{source}: cannot be opened: {error.strerror}") from error
    if file_size(file) == 0:
        file.close()
        raise BadSampleError(f"{describe(source)}: the file is empty")
    return file


def file_size(file: BinaryIO) -> int:
    """Returns the number of bytes; leaves the file at its start."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def sniff(file: BinaryIO, name: str) -> str:
    """Returns the name of FFmpeg's demuxer for the first bytes of the file; leaves the file at its start.

    Raises:
        BadSampleError: the bytes are none of the known containers, or the file is shorter than it says.
    """
    size = file_size(file)
    head = file.read(16)
    if head[4:8] in _MOV_BOXES:
        _check_boxes(file, size, name)
        kind = "mov"
    elif head[:4] == b"\x1aE\xdf\xa3":
        kind = "matroska"
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        declared = int.from_bytes(head[4:8], "little") + 8
        if declared > size:
            raise BadSampleError(f"{name}: cut off: its header says {declared} bytes, it has {size}")
        kind = "avi"
    elif head[:6] in (b"GIF87a", b"GIF89a"):
        file.seek(max(0, size - 1024))
        if file.read().rstrip(b"\x00")[-1:] != b";":
            raise BadSampleError(f"{name}: cut off: the GIF has no end mark")
        kind = "gif"
    else:
        raise BadSampleError(
            f"{name}: not a video: the first bytes are {head[:12]!r}; expected mp4/mov, webm, avi or gif"
        )
    file.seek(0)
    return kind


def _check_boxes(file: BinaryIO, size: int, name: str) -> None:
    """Raises where a top-level box of an mp4 passes the end of the file, or nothing describes the frames."""
    position, kinds = 0, set()
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # reaches to the end of the file
            length = size - position
        if kind not in _MOV_BOXES and b"moov" in kinds and b"mdat" in kinds and not 8 <= length <= size - position:
            break  # something else was appended to a whole file (some phones do)
        if length < 8:
            raise BadSampleError(f"{name}: damaged: box {kind!r} at byte {position} has a length of {length}")
        if position + length > size:
            raise BadSampleError(f"{name}: cut off: box {kind!r} ends at byte {position + length} of {size}")
        kinds.add(kind)
        position += length
    if b"moov" not in kinds:
        raise BadSampleError(f"{name}: cut off or damaged: it has no 'moov' box, which describes the frames")


def check_size(height: int, width: int, name: str) -> None:
    """Raises BadSampleError for an impossible or absurd frame size (above 8192 a side or 8192 x 4320)."""
    if min(height, width) < 1 or max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise BadSampleError(
            f"{name}: frames of {width}x{height} pixels; expected 1 to {MAX_SIDE} a side and at most "
            f"{MAX_PIXELS} pixels"
        )


def check_read(num_frames: int, height: int, width: int, name: str) -> None:
    """Raises BadSampleError before an array is made that would pass `MAX_READ_BYTES`."""
    num_bytes = num_frames * height * width * 3
    if num_frames > MAX_FRAMES or num_bytes > MAX_READ_BYTES:
        raise BadSampleError(
            f"{name}: {num_frames} frames of {width}x{height} are {num_bytes / 2**30:.1f} GiB in memory; "
            f"the limit of one read is {MAX_READ_BYTES / 2**30:.0f} GiB and {MAX_FRAMES} frames: "
            "read fewer frames at a time"
        )
