"""Reads several hundred broken videos in this process and prints a JSON line before and after each.

A process of its own (see test_fuzz.py): a crash or a hang then shows as the case that was begun and not
ended. Usage: python fuzz_cases.py SEED FOLDER
"""

from __future__ import annotations

import faulthandler
import functools
import json
import random
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from media_files import find_box, make_audio, make_video, moving_frames, patched

from longtake.errors import BadSampleError
from longtake.media.read import frame_times, iter_video, probe_video, read_video
from longtake.media.write import encode_video

NUM_FRAMES = 21
SECONDS_A_CASE = 15


@dataclass(frozen=True)
class Case:
    """Expectations: "good" all frames, "bad" an error, "exact" either, "partial" also fewer frames, never more.

    A damaged file may well be whole by its own word, only shorter: webm, avi and gif do not say how many
    frames they hold, and the edit list of an mp4 may hide some (the files that this project writes have
    none).
    """

    name: str
    source: Path | bytes
    expect: str
    num_frames: int = NUM_FRAMES
    calls: int = 1


@functools.cache
def good_files() -> dict[str, tuple[bytes, str]]:
    """Whole files by name, each with what is expected once some of its bytes are damaged."""
    frames = moving_frames(NUM_FRAMES)
    irregular = np.cumsum(np.random.default_rng(0).integers(20, 200, NUM_FRAMES)).tolist()
    no_edits = {"use_editlist": "0"}
    return {
        "own": (encode_video(frames, fps=Fraction(35, 3), gop=8), "exact"),
        "faststart": (
            make_video(frames, options={"bf": "2", "g": "8"}, container_options={"movflags": "+faststart"}),
            "edits",
        ),
        "irregular": (
            make_video(frames, times=irregular, options={"bf": "0"}, container_options=no_edits),
            "exact",
        ),
        "sound": (make_video(frames, audio=True), "edits"),
        "mov": (
            make_video(frames, container="mov", codec="mjpeg", pixels="yuvj420p", container_options=no_edits),
            "exact",
        ),
        "mpeg4": (make_video(frames, codec="mpeg4", container_options=no_edits), "exact"),
        "webm": (
            make_video(frames, container="webm", codec="libvpx-vp9", options={"cpu-used": "8"}),
            "partial",
        ),
        "vp8": (
            make_video(frames, container="webm", codec="libvpx", options={"auto-alt-ref": "1"}),
            "partial",
        ),
        "fragments": (
            make_video(frames, container_options={"movflags": "frag_keyframe+empty_moov"}),
            "partial",
        ),
        "avi": (make_video(frames, container="avi", codec="mpeg4"), "partial"),
        "gif": (make_video(frames, container="gif", codec="gif", pixels="rgb8"), "partial"),
    }


def whole_cases(folder: Path) -> Iterator[Case]:
    files = good_files()
    for name, (data, _) in files.items():
        for call in range(4):
            yield Case(f"whole {name}", data, "good", calls=call)
    for suffix in (".mov", ".avi", ".webm", ".m4v", ".gif"):
        yield Case(f"mp4 named {suffix}", stored(folder, f"wrong{suffix}", files["own"][0]), "good")
    for suffix in (".txt", "", ".pkl", ".m3u8", ".mp4.part"):
        yield Case(f"mp4 named {suffix!r}", stored(folder, f"wrong{suffix}", files["own"][0]), "bad")
    for height, width in ((48, 64), (47, 63), (2, 2), (3, 301), (16, 17)):
        frames = moving_frames(1, height, width)
        yield Case(f"one frame {width}x{height}", encode_video(frames, fps=Fraction(8)), "good", 1)
        frames = moving_frames(5, height, width)
        yield Case(f"five frames {width}x{height}", encode_video(frames, fps=Fraction(30000, 1001)), "good", 5)


def hopeless_cases(folder: Path, chance: random.Random) -> Iterator[Case]:
    own = good_files()["own"][0]
    (folder / "empty folder.mp4").mkdir()
    (folder / "broken images").mkdir()
    stored(folder / "broken images", "a.png", b"\x89PNG\r\n\x1a\n garbage")
    (folder / "link.mp4").symlink_to(folder / "nowhere.mp4")
    for name, source in {
        "no bytes": b"",
        "empty file": stored(folder, "empty.mp4", b""),
        "missing file": folder / "missing.mp4",
        "link to nothing": folder / "link.mp4",
        "device": Path("/dev/zero"),
        "folder without images": folder / "empty folder.mp4",
        "folder of broken images": folder / "broken images",
        "sound only": make_audio(),
        "playlist": stored(folder, "list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n"),
        "concat script": stored(folder, "concat.mp4", b"ffconcat version 1.0\nfile /etc/hostname\n"),
        "protocol as a name": Path("pipe:0.mp4"),
        "address as a name": Path("http:/localhost:9/video.mp4"),
        "null in the name": Path("a\0b.mp4"),
        "pickle": stored(folder, "pickle.mp4", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."),
        "zeros": bytes(50_000),
        "only a header": own[: find_box(own, "ftyp")[1]],
        "random boxes": b"".join(b"\0\0\1\0" + bytes([chance.randrange(65, 90)] * 4) + bytes(248) for _ in range(40)),
    }.items():
        yield Case(name, source, "bad")
    for index in range(20):
        yield Case(f"garbage {index}", chance.randbytes(chance.randrange(1, 60_000)), "bad")
        head = chance.choice([own[:32], b"\x1aE\xdf\xa3", b"GIF89a", b"RIFF\x10\0\0\0AVI LIST"])
        yield Case(f"garbage after a good start {index}", head + chance.randbytes(chance.randrange(1, 20_000)), "bad")


def damaged_cases(chance: random.Random) -> Iterator[Case]:
    for name, (data, after_damage) in good_files().items():
        # Cut anywhere, an mp4 is always found out.
        after_cut = "partial" if after_damage == "partial" else "bad"
        for cut in [1, 8, len(data) // 2, len(data) - 1, *(chance.randrange(len(data)) for _ in range(8))]:
            yield Case(f"{name} cut at {cut}", data[:cut], after_cut, calls=chance.randrange(5))
        for index in range(24):
            in_frames = index % 2 == 0 and after_damage != "partial"
            start, end = find_box(data, "mdat") if in_frames else (0, len(data))
            damaged = bytearray(data)
            for _ in range(chance.choice((1, 1, 4, 40))):
                damaged[chance.randrange(start, end)] = chance.randrange(256)
            expect = "exact" if in_frames or after_damage == "exact" else "partial"
            yield Case(f"{name} damaged {index}", bytes(damaged), expect, calls=chance.randrange(5))
        hole = chance.randrange(len(data) - 400)
        expect = "exact" if after_damage == "exact" else "partial"
        yield Case(f"{name} with a hole", patched(data, hole, bytes(400)), expect, calls=chance.randrange(5))


def header_cases(chance: random.Random) -> Iterator[Case]:
    """Damage to the header of an mp4, where a byte can announce any size, length, rate or number of frames."""
    for name in ("own", "faststart", "irregular", "mpeg4"):
        data, after_damage = good_files()[name]
        expect = "exact" if after_damage == "exact" else "partial"
        start, end = find_box(data, "moov")
        for index in range(25):
            damaged = bytearray(data)
            for _ in range(chance.choice((1, 1, 3))):
                damaged[chance.randrange(start, end)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            yield Case(f"{name} header damaged {index}", bytes(damaged), expect, calls=chance.randrange(5))
        table = find_box(data, "moov/trak/mdia/minf/stbl/stts")[0]
        scale = find_box(data, "moov/trak/mdia/mdhd")[0] + 12
        for value in (0, 1, 1000, 0x7FFFFFFF, 0xFFFFFFFF):
            number = value.to_bytes(4, "big")
            yield Case(f"{name} time scale {value}", patched(data, scale, number), expect, calls=chance.randrange(4))
            yield Case(f"{name} frame duration {value}", patched(data, table + 12, number), expect, calls=1)
            yield Case(f"{name} frame count {value}", patched(data, table + 8, number), expect, calls=1)
        sizes = find_box(data, "moov/trak/mdia/minf/stbl/stsd")[0] + 8 + 32
        for value in (0, 1, 30000, 65535):
            number = value.to_bytes(2, "big")
            yield Case(f"{name} says {value} pixels a side", patched(data, sizes, number * 2), expect, calls=1)


def stored(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def run(case: Case) -> tuple[str, int]:
    """Reads the case in one of five ways; returns what happened and the number of frames."""
    some = [0, case.num_frames - 1, case.num_frames // 2]
    try:
        if case.calls == 0:
            count = probe_video(case.source).num_frames
        elif case.calls == 1:
            count = len(checked(read_video(case.source)))
        elif case.calls == 2:
            count = len(frame_times(case.source))
        elif case.calls == 3:
            count = sum(1 for _ in iter_video(case.source))
        else:
            count = case.num_frames if len(checked(read_video(case.source, frames=some))) == 3 else -1
        # Where PyAV found nothing wrong, decord behind its guard must neither crash nor find another number.
        if isinstance(case.source, bytes) and case.calls == 1:
            try:
                other = len(read_video(case.source, backend="decord"))
            except BadSampleError:
                other = count
            count = count if other == count else -1
    except BadSampleError as error:
        return f"bad: {error}", 0
    return "good", count


def checked(video: np.ndarray) -> np.ndarray:
    assert video.dtype == np.uint8, video.dtype
    assert video.ndim == 4, video.shape
    assert video.shape[3] == 3, video.shape
    return video


def say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    seed, folder = int(sys.argv[1]), Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    chance = random.Random(seed)
    cases = [
        *whole_cases(folder),
        *hopeless_cases(folder, chance),
        *damaged_cases(chance),
        *header_cases(chance),
    ]
    for index, case in enumerate(cases):
        say(case=index, name=case.name)
        faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
        outcome, count = run(case)
        faulthandler.cancel_dump_traceback_later()
        say(case=index, expect=case.expect, outcome=outcome, count=count, right=case.num_frames)
    say(cases=len(cases), peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main()
