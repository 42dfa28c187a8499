"""Broken input from end to end: commands in child processes, where a crash or a hang is a failing test.

What arrives is seeded and damaged in every way that files on a cluster get damaged. Nothing of it may crash or hang
the command, run code, or leave its folder; what cannot be used is counted and named, and what is whole comes through.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from datamodules.loading.bad_samples import BadSampleLedger
from datamodules.loading.pipeline import Shard
from datamodules.shards import DatasetInfo, iterate_entries
from datamodules.tokens import TokensDataModule
from longtake.errors import DataError
from longtake.media.write import encode_video
from tests.datamodules.toy_set import make_toy_set

ROOT = Path(__file__).parents[2]
NUM_FRAMES = 9


def run(*words: str, limit_s: float = 240) -> subprocess.CompletedProcess:
    """Runs a command of the project from its root."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s
    )


def clip(seed: int, num_frames: int = NUM_FRAMES) -> bytes:
    """Returns an mp4 of moving stripes."""
    shift = np.arange(num_frames)[:, None, None, None] * 3 + seed
    column = np.arange(64)[None, None, :, None]
    frames = np.broadcast_to((column * 5 + shift * 5) % 256, (num_frames, 48, 64, 3)).astype(np.uint8)
    return encode_video(np.ascontiguousarray(frames), fps=Fraction(35, 3))


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Returns content cut short, emptied, overwritten with noise, or with bytes flipped."""
    kind = chance.choice(["cut", "cut", "empty", "noise", "flip", "flip", "zeros", "tail"])
    if kind == "cut":
        return content[: chance.randrange(1, len(content))]
    if kind == "tail":
        return content[chance.randrange(1, len(content)) :]
    if kind == "empty":
        return b""
    if kind == "noise":
        return chance.randbytes(chance.randrange(1, 5000))
    if kind == "zeros":
        return bytes(len(content))
    flipped = bytearray(content)
    for _ in range(chance.choice([1, 5, 50])):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def test_a_folder_of_broken_videos_becomes_a_set_of_the_whole_ones(tmp_path: Path) -> None:
    chance = random.Random(1)
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(6):
        (folder / f"whole{number}.mp4").write_bytes(clip(number))
    for number in range(100):
        ending = chance.choice(["mp4", "mp4", "mp4", "webm", "gif", "avi", "mov"])
        (folder / f"broken{number}.{ending}").write_bytes(damaged(clip(number), chance))
    (folder / "short.mp4").write_bytes(clip(0, 1))
    (folder / "notes.pkl").write_bytes(b"not looked at")
    out = tmp_path / "set"
    options = [
        f"input={folder}",
        f"output={out}",
        "video.num_frames=9",
        "source.licence=CC0-1.0",
        "source.val_fraction=0",
    ]
    result = run("scripts.make_shards", "source=video_folder", *options, "progress=false")
    assert result.returncode == 0, result.stdout + result.stderr
    info = DatasetInfo.load(out)
    written = {entry.key for _, entry in iterate_entries(info, "train")}
    assert len({key for key in written if key.startswith("whole")}) == 6
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert all(row["name"] and row["reason"] for row in skipped)
    named = " ".join(row["name"] for row in skipped) + " " + " ".join(written)
    lost = [name for name in (f"broken{number}" for number in range(100)) if name not in named]
    assert not lost
    assert len(skipped) >= 60
    check = run("scripts.check_shards", f"input={out}", f"contact_sheet={tmp_path / 'sheet.png'}")
    assert check.returncode == 0, check.stdout + check.stderr


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def foreign_tar(seed: int, fuse: Path) -> bytes:
    """Returns a tar of six samples, some of them wrong in a way that only untrusted tars are."""
    chance = random.Random(seed)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:

        def add(name: str, content: bytes) -> None:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))

        for number in range(6):
            add(f"t{seed}_{number}.mp4", clip(number))
            add(f"t{seed}_{number}.txt", b"a clip")
        wrong = chance.randrange(7)
        if wrong == 0:
            add("../../escaped.mp4", clip(9))
        elif wrong == 1:
            add(f"{fuse.parent}/absolute.mp4", clip(9))
        elif wrong == 2:
            add(f"t{seed}_9.pkl", pickle.dumps(Bomb(fuse)))
            add(f"t{seed}_9.mp4.pyd", pickle.dumps(Bomb(fuse)))
        elif wrong == 3:
            add(f"t{seed}_1.mp4", clip(9))
        elif wrong == 4:
            add(f"t{seed}_9.txt", b"no video")
        elif wrong == 5:
            link = tarfile.TarInfo(f"t{seed}_9.mp4")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        else:
            add(f"t{seed}_9.actions.npy", pickle.dumps(Bomb(fuse)))
            add(f"t{seed}_9.mp4", b"")
    content = stream.getvalue()
    return content if chance.random() < 0.5 else damaged(content, chance)


def test_foreign_tars_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    fuse = tmp_path / "fuse"
    for seed in range(100):
        (tars / f"part-{seed:03d}.tar").write_bytes(foreign_tar(seed, fuse))
    out = tmp_path / "set"
    options = [f"input={tars}", f"output={out}", "video.num_frames=9", "source.licence=CC0-1.0"]
    result = run("scripts.make_shards", "source=webdataset", *options, "progress=false")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not fuse.exists()
    assert not list(tmp_path.rglob("*escaped*"))
    assert not list(tmp_path.rglob("*absolute*"))
    info = DatasetInfo.load(out)
    keys = [entry.key for split in info.splits for _, entry in iterate_entries(info, split)]
    assert len(keys) == len(set(keys)) >= 300
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert len(rows) >= 50
    assert any("pkl" in row["reason"] + row["name"] for row in rows)
    check = run("scripts.check_shards", f"input={out}", f"contact_sheet={tmp_path / 'sheet.png'}")
    assert check.returncode == 0, check.stdout + check.stderr


def test_a_pipe_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    result = run("scripts.make_shards", "source=webdataset", f"input='pipe:touch {mark}'", f"output={tmp_path / 'set'}")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "allow_remote" in result.stderr
    assert not mark.exists()
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("seed", range(40))
def test_shards_damaged_after_writing_give_good_batches_or_one_message(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    root = make_toy_set(tmp_path / "toy", num_samples=30, per_shard=6)
    for shard in chance.sample(sorted(root.glob("train-*.tar")), k=chance.choice([1, 1, 2])):
        shard.write_bytes(damaged(shard.read_bytes(), chance))
    data = TokensDataModule(root=root, batch_size=5, num_frames=9, num_workers=0, max_bad_fraction=0.25)
    data.setup("fit")
    ledger = data.ledgers.setdefault("train", BadSampleLedger("train", 30, 0.25))
    with contextlib.suppress(DataError):
        for batch in islice(data.train_loader(Shard(0, 1)), 12):
            numbers = [int(key.removeprefix("train_")) for key in batch.key]
            assert batch.tokens[:, 0, 0, 0, 0].tolist() == numbers
            assert batch.actions[:, 1, 0].tolist() == numbers
        return
    # The run ended early: only because too much was bad, and everything bad has its reason.
    assert ledger.share() > 0.25
    assert all(ledger.bad.values())
