"""Every kind of damage is planted in a set, alone where that is possible, and must be named where it is."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from datamodules.build import WriterSettings, build_dataset
from datamodules.check import check_dataset
from datamodules.check_shard import Problem, ShardJob, ShardReport, check_shard
from datamodules.shard_writer import ShardWriter, pack_sample
from datamodules.shards import DatasetInfo, SampleEntry, SplitInfo, index_path, read_index, read_member
from datamodules.worker_pool import WorkerPool
from launcher import entry
from longtake.errors import ConfigError
from longtake.media.write import encode_video
from scripts.check_shards import main
from tests.datamodules.synthetic import Squares, squares

ROOT = Path(__file__).resolve().parents[2]
SHARD = "train-000000.tar"
Samples = list[tuple[SampleEntry, dict[str, bytes]]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clean") / "set"
    source = Squares(num_tasks=4, views=("front", "left"), control=("depth",), splits=("train", "train", "val"))
    settings = WriterSettings(max_samples_per_shard=5)
    build_dataset(source, root, request={}, settings=settings, num_workers=1, progress=False)
    return root


@pytest.fixture
def root(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "set"))


class _OneProcessPool:
    """Stands in for the pool where no crash is expected: a hundred interpreters need not be started."""

    def __init__(self, function, context, **options) -> None:
        self._function, self._context = function, context

    def run(self, items):
        for item in items:
            yield item, self._function(self._context, item, lambda note: None)


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    monkeypatch.setattr("datamodules.check.WorkerPool", _OneProcessPool)


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


@pytest.mark.parametrize("is_real", [False, True])
def test_a_clean_set_is_clean(root, is_real, monkeypatch):
    if is_real:
        monkeypatch.setattr("datamodules.check.WorkerPool", WorkerPool)
    report = check_dataset(root, num_workers=2, progress=False)
    assert report.problems == []
    assert {name: (split.num_samples, dict(split.lengths)) for name, split in report.splits.items()} == {
        "train": (9, {5: 9}),
        "val": (3, {5: 3}),
    }
    assert report.splits["train"].sizes == {"24x16 @ 11.67 fps": 18}
    assert report.splits["train"].hours == pytest.approx(45 * 3 / 35 / 3600)


def test_missing_shard(root):
    (root / SHARD).unlink()
    assert_only(root, (SHARD, "", "", "is missing"))


def test_unlisted_files(root):
    shutil.copy(root / SHARD, root / "train-000007.tar")
    (root / "train-000009.index.jsonl").write_text("")
    assert_only(
        root,
        ("train-000007.tar", "", "", "not listed"),
        ("train-000009.index.jsonl", "", "", "belongs to no shard"),
    )


def test_a_shard_listed_twice(root):
    def twice(data):
        part = data["splits"]["train"]
        part["shards"].append(part["shards"][0])
        for name in ("num_samples", "num_frames"):
            part[name] += part["shards"][0][name]

    edit_json(root, twice)
    assert_only(root, (SHARD, "", "", "listed twice"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_tar_cut_off(root, share):
    content = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(content[: int(len(content) * share)])
    problems = found(root)
    reasons = " ".join(problem.reason for problem in problems if problem.shard == SHARD)
    assert "bytes long" in reasons
    assert "differs from its checksum in dataset.json" in reasons
    assert ("reaches beyond the end" if 0 < share < 0.9 else "tar does not end as it should") in reasons
    assert {problem.shard for problem in problems} == {SHARD}


def test_garbage_behind_the_tar(root):
    with (root / SHARD).open("ab") as file:
        file.write(b"more")
    assert_only(
        root,
        (SHARD, "", "", "bytes long"),
        (SHARD, "", "", "differs from its checksum in dataset.json"),
        (SHARD, "", "", "tar does not end as it should"),
    )


def test_a_tar_of_garbage(root):
    (root / SHARD).write_bytes(np.random.default_rng(0).bytes(5000))
    assert "tar is damaged at byte 0" in " ".join(problem.reason for problem in found(root))


def test_flipped_byte_in_a_member(root):
    entry = read_index(root / SHARD)[1]
    start, size, _ = entry.members["left.mp4"]
    content = bytearray((root / SHARD).read_bytes())
    content[start + size // 2] ^= 0x55
    (root / SHARD).write_bytes(content)
    problems = found(root)
    assert Problem(SHARD, entry.key, "left.mp4", "differs from its checksum in the index") in problems
    assert Problem(SHARD, "", "", "differs from its checksum in dataset.json") in problems
    assert {problem.key for problem in problems} == {"", entry.key}


def test_missing_index(root):
    index_path(root / SHARD).unlink()
    assert_only(root, (SHARD, "", "", "its index cannot be read"))


def test_damaged_index_lines(root):
    path = index_path(root / SHARD)
    lines = path.read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    path.write_text("\n".join([lines[0], "{", lines[2], '{"key": 3}', lines[4]]))
    assert_only(
        root,
        (SHARD, "", "", "its index differs from the checksum"),
        (SHARD, "", "", "line 2 of its index"),
        (SHARD, "", "", "line 4 of its index"),
        (SHARD, "", "", "cut off in the last line"),
        (SHARD, keys[1], "", "in the tar but not in the index"),
        (SHARD, keys[3], "", "in the tar but not in the index"),
        (SHARD, keys[4], "", "in the tar but not in the index"),
    )


@pytest.mark.parametrize(
    ("change", "key", "member", "reason"),
    [
        (
            lambda row: row["members"]["json"].__setitem__(0, 512),
            "s000-0",
            "json",
            "index says (offset, bytes)",
        ),
        (lambda row: row["members"].pop("json"), "s000-0", "json", "index says (offset, bytes) None"),
        (lambda row: row["members"]["json"].__setitem__(2, 1), "s000-0", "json", "differs from its checksum"),
        (lambda row: row.update(size=512), "s000-0", "", "byte range"),
        (lambda row: row.update(num_frames=6), "s000-0", "json", "index says 'episode 0', 6 frames"),
        (lambda row: row.update(episode="other"), "s000-0", "json", "index says 'other', 5 frames"),
    ],
)
def test_an_index_that_lies(root, change, key, member, reason):
    path = index_path(root / SHARD)
    lines = path.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    change(row)
    path.write_text("".join([json.dumps(row) + "\n", *lines[1:]]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(root, lambda data: data["splits"]["train"]["shards"][0].update(index_sha256=digest))
    assert_only(root, (SHARD, key, member, reason))


def test_an_index_in_another_order(root):
    path = index_path(root / SHARD)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(root, lambda data: data["splits"]["train"]["shards"][0].update(index_sha256=digest))
    assert_only(root, (SHARD, "", "", "another order"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "longtake-shards", "format_version": 1}',
        b'{"format": "other", "format_version": 1}',
        b'{"format": "longtake-shards", "format_version": 99}',
    ],
    ids=range(9),
)
def test_garbage_dataset_json_and_still_every_shard_is_checked(root, content):
    (root / "dataset.json").write_bytes(content)
    repacked = root / SHARD
    damaged = bytearray(repacked.read_bytes())
    damaged[read_index(repacked)[0].members["front.mp4"][0] + 100] ^= 0xFF
    repacked.write_bytes(damaged)
    problems = found(root)
    assert problems[0].shard == "dataset.json"
    assert Problem(SHARD, "s000-0", "front.mp4", "differs from its checksum in the index") in problems


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.update(licence=""), "licence"),
        (lambda data: data.update(origin=None), "origin"),
        (lambda data: data.update(view_names=[1]), "view_names"),
        (lambda data: data.update(view_names=["a.b", "left"]), "view_names"),
        (lambda data: data.update(request=[]), "request"),
        (lambda data: data.update(tokens={"vocab_size": 3}), "tokens.grid"),
        (lambda data: data.update(skipped=None), "skipped"),
        (lambda data: data.pop("rig"), "rig"),
        (lambda data: data["video"].update(fps="0/0"), "cannot be read"),
        (lambda data: data["video"].update(height=1e400), "infinity"),
        (lambda data: data["splits"]["train"].update(num_samples=1), "states num_samples 1"),
        (lambda data: data["splits"]["train"].pop("num_frames"), "num_frames"),
        (lambda data: data["splits"]["train"]["shards"][0].update(bytes="many"), "makes no sense"),
        (lambda data: data["splits"]["train"]["shards"][0].update(file="../x.tar"), "outside its folder"),
        (lambda data: data["splits"].update({"a/b": data["splits"].pop("val")}), "a/b"),
    ],
)
def test_dataset_json_that_breaks_the_format(root, change, reason):
    edit_json(root, change)
    assert_only(root, ("dataset.json", "", "", reason))


def test_wrong_counts(root):
    def change(data):
        data["splits"]["train"]["shards"][0].update(num_samples=6, lengths={"5": 4, "7": 1})
        data["splits"]["train"]["num_samples"] += 1

    edit_json(root, change)
    assert_only(
        root,
        (SHARD, "", "", "holds 5 samples; dataset.json says 6"),
        (SHARD, "", "", "holds clips by frames {5: 5}"),
    )


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


FPS = Fraction(35, 3)


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


def crashing_check(source, job: ShardJob, beat) -> ShardReport:
    """Stands in for a decoder that takes the process with it."""

    def fatal(note: str) -> None:
        beat(note)
        if note in ("s000-1", "s001-0"):
            os.kill(os.getpid(), signal.SIGSEGV)

    return check_shard(source, job, fatal)


def test_a_sample_that_kills_the_checker_is_named_and_the_rest_is_checked(root, monkeypatch):
    monkeypatch.setattr("datamodules.check.WorkerPool", WorkerPool)
    monkeypatch.setattr("datamodules.check.check_shard", crashing_check)
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
    without_sheet = [[line for line in text.splitlines() if "contact sheet" not in line] for text in (process.stdout, clean)]
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


def _named(name: str, content: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info
