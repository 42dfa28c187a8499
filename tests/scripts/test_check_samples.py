"""Samples that are not what the set says: each kind of damage is named where it is."""

import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from datamodules.shards import read_index, read_member
from datamodules.writing.check import check_dataset
from datamodules.writing.check_shard import Problem
from datamodules.writing.worker_pool import WorkerPool
from launcher import entry
from longtake.errors import ConfigError
from longtake.media.write import encode_video
from scripts.check_shards import main
from tests.datamodules.synthetic import squares
from tests.scripts.damage import (
    FPS,
    ROOT,
    SHARD,
    _named,
    assert_only,
    crashing_check,
    edit_json,
    found,
    npy,
    repack,
    rewrite_tar,
    set_member,
)

pytestmark = pytest.mark.usefixtures("one_process_pool")


@pytest.mark.parametrize("name", ["../../etc/evil.json", "/abs.json", "a/b.json", ".json", "noextension", "a b.txt"])
def test_names_that_lead_elsewhere(root, name):
    rewrite_tar(root, lambda items: items.append((_named(name, b"{}"), b"{}")))
    problems = [problem for problem in found(root) if "tar holds" in problem.reason]
    assert len(problems) == 1
    assert repr(name) in problems[0].reason
    assert not (root.parent.parent / "etc").exists()


@pytest.mark.parametrize("member", ["evil.pkl", "evil.pyd", "pickle", "evil.pth", "sh"])
def test_pickles_are_named_and_never_opened(root, member, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    content = pickle.dumps(Evil())
    rewrite_tar(root, lambda items: items.append((_named(f"s002-0.{member}", content), content)))
    reasons = " ".join(problem.reason for problem in found(root))
    assert f"member {member!r} is not allowed" in reasons
    assert not (tmp_path / "executed").exists()


def test_a_pickled_array_is_not_executed(root, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    repack(root, set_member(0, "actions.npy", npy(np.array([Evil()], dtype=object))))
    assert_only(root, (SHARD, "s000-0", "actions.npy", "dtype object"))
    assert not (tmp_path / "executed").exists()


def test_links_and_folders_in_the_tar(root):
    link, folder = _named("s002-0.txt", b""), _named("folder", b"")
    link.type, link.linkname, folder.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.DIRTYPE
    rewrite_tar(root, lambda items: items.extend([(link, b""), (folder, b"")]))
    reasons = [problem.reason for problem in found(root)]
    assert sum("expected plain files only" in reason for reason in reasons) == 2


def test_duplicate_keys(root):
    repack(root, lambda samples: samples.append(samples[0]))
    problems = found(root)
    assert Problem(SHARD, "s000-0", "", "duplicate key: another sample of this shard has it too") in problems
    assert Problem(SHARD, "s000-0", "", "duplicate key: it is in the index twice") in problems


def test_duplicate_keys_in_two_shards(root):
    with (root / SHARD).open("rb") as file:
        entry = read_index(root / SHARD)[0]
        sample = (entry, {name: read_member(file, entry, name) for name in entry.members})
    repack(root, lambda samples: samples.append(sample), "train-000001.tar")
    assert_only(root, ("train-000001.tar", "s000-0", "", f"duplicate key: {SHARD} has it too"))


def test_split_leakage(root):
    def change(samples):
        entry, members = samples[0]
        members["json"] = members["json"].replace(b"episode 0", b"episode 2")
        samples[0] = replace(entry, episode="episode 2"), members

    repack(root, change)
    assert_only(
        root,
        (
            "val-000000.tar",
            "",
            "",
            "episode 'episode 2' is in split 'val' and, by train-000000.tar, in 'train'",
        ),
    )


@pytest.mark.parametrize(
    ("member", "content", "reason"),
    [
        ("left.mp4", encode_video(squares(4, 0), fps=FPS), "4 frames can be decoded; expected 5"),
        ("left.mp4", encode_video(squares(5, 0)[:, :8], fps=FPS), "frames are 24x8; expected 24x16"),
        ("left.mp4", encode_video(squares(5, 0), fps=Fraction(24)), "runs at 24 frames/s"),
        ("left.mp4", encode_video(squares(5, 0), fps=FPS)[:-40], ""),
        ("left.mp4", b"\0" * 100, ""),
        ("left.mp4", b"", "empty"),
        ("left.mp4", b"#EXTM3U\nhttp://example.org/a.ts\n", ""),
        (
            "control.depth.left.mp4",
            encode_video(squares(6, 0), fps=FPS),
            "6 frames can be decoded; expected 5",
        ),
        ("rear.mp4", encode_video(squares(5, 0), fps=FPS), "no view or control video"),
        ("actions.npy", npy(np.zeros((5, 3), np.float32)), "expected float32 [5, 2]"),
        ("actions.npy", npy(np.zeros((5, 2))), "expected float32 [5, 2]"),
        ("actions.npy", npy(np.full((5, 2), np.inf, np.float32)), "NaN or infinity"),
        ("actions.npy", npy(np.zeros((5, 2), np.float32))[:-1], "needs 40 bytes, 39 are there"),
        ("actions.npy", b"\x93NUMPY\x01\x00", "not an .npy file"),
        ("actions.npy", b"", "not an .npy file"),
        ("actions.npy", npy(np.zeros((5, 2), np.float32)).replace(b"(5, 2)", b"(9**9)"), "not an .npy file"),
        (
            "actions.npy",
            npy(np.zeros((5, 2), np.float32)).replace(b"(5, 2), }  ", b"(99999999,)}"),
            "needs 399999996",
        ),
        ("actions.npy", None, "is missing; expected the columns dx, dy"),
        ("states.npy", npy(np.zeros((4, 1), np.float32)), "expected float32 [5, 1]"),
        ("states.npy", None, "is missing"),
        ("tokens.npy", npy(np.zeros((2, 1, 1, 1), np.int32)), "states no tokens"),
        ("txt", b"\xff", "not utf-8"),
        ("txt", b"", "expected one line"),
        ("txt", b"one\x0btwo\n", "expected one line"),
        ("json", b"{", "cannot be read"),
        ("json", b"[]", "cannot be read"),
        ("json", b"[" * 100_000, "cannot be read"),
        ("json", b'{"episode": 3, "num_frames": 5}', "expected a name and a count"),
        ("json", None, "is missing"),
        ("latents.safetensors", b"\xff" * 32, "not a safetensors file"),
    ],
)
def test_content_that_does_not_fit(root, member, content, reason):
    repack(root, set_member(1, member, content))
    problems = found(root)
    assert [(problem.shard, problem.key, problem.member) for problem in problems] == [
        (SHARD, "s000-1", "" if reason == "no view or control video" else member)
    ] * len(problems) or reason == "no view or control video"
    assert any(reason in problem.reason and problem.key == "s000-1" for problem in problems), problems


def test_a_sample_without_video(root):
    def change(samples):
        for name in list(samples[1][1]):
            if name in ("front.mp4", "left.mp4"):
                del samples[1][1][name]

    repack(root, change)
    assert_only(root, (SHARD, "s000-1", "", "neither video nor tokens"))


def test_tokens_out_of_range(root):
    def add(samples):
        for number, (_, members) in enumerate(samples):
            value = 8 if number == 1 else -1 if number == 2 else 7
            members["tokens.npy"] = npy(np.full((2, 3, 1, 4), value, np.int32))

    for name in (SHARD, "train-000001.tar", "val-000000.tar"):
        repack(root, add, name)
    edit_json(root, lambda data: data.update(tokens={"vocab_size": 8, "grid": [3, 1, 4]}))
    assert {(problem.key, problem.reason) for problem in found(root) if problem.shard == SHARD} == {
        ("s000-1", "tokens run from 8 to 8; expected 0 to 7"),
        ("s000-2", "tokens run from -1 to -1; expected 0 to 7"),
    }
    edit_json(root, lambda data: data.update(tokens={"vocab_size": 9, "grid": [3, 4, 1]}))
    assert "expected 2 views of 4 x 1 a frame" in found(root)[0].reason


def test_tokens_and_latents_that_are_stated_may_not_be_missing(root):
    edit_json(root, lambda data: data.update(tokens={"vocab_size": 8, "grid": [3, 1, 4]}))
    assert [problem.reason for problem in found(root)] == [
        "tokens are missing; the source states them for every sample"
    ] * 12
    edit_json(root, lambda data: data.update(tokens=None, latents={"channels": 4}))
    assert [problem.reason for problem in found(root)] == [
        "latents are missing; the source states them for every sample"
    ] * 12


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_survived_and_found(root, seed):
    rng = np.random.default_rng(seed)
    path = sorted(root.glob(("*.tar", "*.index.jsonl", "*.tar", "dataset.json")[seed % 4]))[
        seed % 2 if seed % 4 < 3 else 0
    ]
    content = bytearray(path.read_bytes())
    start = int(rng.integers(len(content)))
    length = int(rng.integers(1, 2000))
    kind = rng.integers(4)
    if kind == 0:
        content = content[:start]
    elif kind == 1:
        content[start : start + length] = rng.bytes(len(content[start : start + length]))
    elif kind == 2:
        content[start : start + length] = b""
    else:
        content[start] ^= 1 << int(rng.integers(8))
    changed = bytes(content) != path.read_bytes()
    path.write_bytes(content)
    problems = found(root)
    if changed and path.name != "dataset.json":  # which says nothing of its own checksum
        assert any(problem.shard == path.name.replace(".index.jsonl", ".tar") for problem in problems)


def test_a_sample_that_kills_the_checker_is_named_and_the_rest_is_checked(root, monkeypatch):
    monkeypatch.setattr("datamodules.writing.check.WorkerPool", WorkerPool)
    monkeypatch.setattr("datamodules.writing.check.check_shard", crashing_check)
    repack(root, set_member(4, "txt", b"\xff"))
    reason = "worker process died (SIGSEGV)"
    assert_only(
        root,
        (SHARD, "s000-1", "", reason),
        (SHARD, "s001-0", "", reason),
        (SHARD, "s001-1", "txt", "not utf-8"),
    )


def test_no_set_is_a_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        check_dataset(tmp_path / "nothing", num_workers=1)
    with pytest.raises(ConfigError, match="neither dataset.json nor tars"):
        check_dataset(tmp_path, num_workers=1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set.partial").mkdir()
    with pytest.raises(ConfigError, match="half-built"):
        check_dataset(tmp_path / "set", num_workers=1)


def test_the_command(root, tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check_shards", *arguments])
        return entry.run(main, "check_shards"), *capsys.readouterr()

    command = [sys.executable, "-m", "scripts.check_shards", f"input={root}", "num_workers=1"]
    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
    code, clean, _ = run(f"input={root}", f"contact_sheet={tmp_path / 'sheet.png'}")
    assert (code, process.returncode) == (0, 0), process.stderr
    without_sheet = [
        [line for line in text.splitlines() if "contact sheet" not in line] for text in (process.stdout, clean)
    ]
    assert without_sheet[0] == without_sheet[1]
    assert (root / "contact_sheet.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    assert "no problems" in clean
    assert "24x16 @ 11.67 fps" in clean
    assert "train: 9 clips, 0.001 h" in clean
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    def change(samples):
        for _, members in samples[:3]:
            members["txt"] = b"\xff"

    repack(root, change)
    code, damaged, _ = run(f"input={root}", "max_problems=2", f"contact_sheet={tmp_path / 'damaged.png'}")
    assert code == 1
    assert "PROBLEM train-000000.tar s000-0 txt: is not utf-8" in damaged
    assert "PROBLEM ... and 1 more" in damaged
    assert damaged.endswith("3 problems\n")

    code, output, errors = run(f"input={tmp_path / 'nothing'}")
    assert (code, output) == (2, "")
    assert "Traceback" not in errors
    assert "is not a folder" in errors
