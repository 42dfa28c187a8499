"""`source=webdataset`: foreign tars and Longtake sets become clips; the hostile and broken is named."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.sources.base import RawSample
from datamodules.writing.build import WriterSettings, build_dataset
from datamodules.writing.shard_writer import EncodeSettings, encode_sample
from longtake.errors import BadSampleError, ConfigError, DataError
from tests.datamodules.sources.numbered_clips import build, collect, encode, numbered_frame, numbers

Member = tuple[str, bytes]


def video(count: int = 5, start: int = 0, **settings: Any) -> bytes:
    return encode([numbered_frame(number) for number in range(start, start + count)], **settings)


def npy(rows: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(rows))
    return buffer.getvalue()


def write_tar(path: Path, members: list[Member | tarfile.TarInfo], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_samples_are_cut_resampled_and_captioned(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "part-0.tar",
        [
            ("clips/01.mp4", video(24, rate=20)),
            ("clips/01.json", json.dumps({"caption": ["a", "b"], "camera": 3}).encode()),
            ("clips/01.actions.npy", npy(np.arange(24.0))),
            ("clips/02.actions.npy", npy(np.arange(6.0))),
            ("clips/02.webm", video(6, container="webm", codec="libvpx")),
            ("clips/02.txt", b"from text\n"),
            ("clips/02.other.bin", b"ignored"),
        ],
    )
    source = build("webdataset", input=tmp_path, val_fraction=0)
    assert source.info().action_names == ("action_0",)
    samples, skipped, _ = collect(source)
    assert not skipped
    by_start = {(s.captions[0], s.meta["first_frame"]): s for s in samples.values()}
    assert set(by_start) == {("a", 0), ("a", 5), ("from text", 0)}
    assert numbers(by_start["a", 5]) == [10, 12, 14, 16, 18]
    assert by_start["a", 5].actions[:, 0].tolist() == [10, 12, 14, 16, 18]
    assert by_start["a", 5].captions == ["a", "b"]
    assert by_start["a", 5].meta["camera"] == 3
    assert by_start["a", 0].episode == by_start["a", 5].episode


def test_fields_can_be_mapped_with_several_views_and_control(tmp_path: Path) -> None:
    members = [
        (f"k.{name}.mp4", video(5, start)) for name, start in (("cam1", 0), ("cam2", 10), ("d1", 20), ("d2", 30))
    ]
    members += [("k.meta.json", json.dumps({"text": {"en": "a street"}, "video": "v7"}).encode())]
    tar = write_tar(tmp_path / "a.tar", members)
    fields = {
        "video": {"front": "cam1.mp4", "left": "cam2.mp4"},
        "control": {"depth": {"front": "d1.mp4", "left": "d2.mp4"}},
        "caption": "meta.json.text.en",
        "episode": "meta.json.video",
    }
    source = build("webdataset", input=tar, fields=fields, val_fraction=0)
    info = source.info()
    assert (info.view_names, info.control_types) == (("front", "left"), ("depth",))
    sample = next(iter(collect(source)[0].values()))
    assert numbers(sample, "left") == [10, 11, 12, 13, 14]
    assert sample.control["depth"]["left"].shape == (5, 16, 64, 3)
    assert (sample.captions, sample.episode) == (["a street"], "v7")


def test_hostile_and_broken_members_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):  # noqa: ANN204
            return (Path.touch, (marker,))

    bomb = pickle.dumps(Bomb())
    write_tar(
        tmp_path / "a.tar",
        [
            ("good.mp4", video()),
            ("good.meta.pkl", bomb),
            ("../escape.mp4", video()),
            ("/absolute.mp4", video()),
            ("x/../../y.mp4", video()),
            special("link.mp4", tarfile.SYMTYPE, "/etc/passwd"),
            special("hard.mp4", tarfile.LNKTYPE, "good.mp4"),
            special("dev.mp4", tarfile.CHRTYPE),
            special("pipe.mp4", tarfile.FIFOTYPE),
            ("twice.mp4", video()),
            ("twice.mp4", video(5, 50)),
            ("nothing.txt", b"a caption without a video"),
            ("damaged.mp4", video()[:500]),
            ("rows.mp4", video()),
            ("rows.actions.npy", bomb),
            ("code.pth", bomb),
            ("good2.mp4", video()),
            ("good2.json", b"{not json"),
            ("good.mp4", video(5, 100)),
            ("._good3.mp4", b"mac"),
            ("no_dot", b"x"),
        ],
    )
    samples, skipped, _ = collect(build("webdataset", input=tmp_path, val_fraction=0, action_names=None))
    reasons = {item.name: item.reason for item in skipped}
    assert set(samples) == {"good_000000", "twice_000000", "rows_000000"}
    assert numbers(samples["good_000000"]) == numbers(samples["twice_000000"]) == [0, 1, 2, 3, 4]
    assert samples["rows_000000"].actions is None
    for name, word in {
        "a.tar/good.meta.pkl": "code",
        "a.tar/code.pth": "code",
        "a.tar/../escape.mp4": "leads out",
        "a.tar//absolute.mp4": "absolute",
        "a.tar/x/../../y.mp4": "leads out",
        "a.tar/link.mp4": "link",
        "a.tar/hard.mp4": "link",
        "a.tar/dev.mp4": "device",
        "a.tar/pipe.mp4": "device",
        "a.tar/twice.mp4": "came before",
        "a.tar/nothing": "video is missing",
        "a.tar/damaged": "decoded",
        "a.tar/good2": "json",
        "a.tar/good": "came before",
    }.items():
        assert word in reasons.pop(name), name
    assert not reasons
    assert not marker.exists()


def test_a_missing_actions_member_is_named(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            ("a.mp4", video()),
            ("a.actions.npy", npy(np.zeros((5, 2)))),
            ("b.mp4", video()),
            ("c.mp4", video()),
            ("c.actions.npy", npy(np.zeros((4, 2)))),
        ],
    )
    samples, skipped, _ = collect(build("webdataset", input=tmp_path, val_fraction=0))
    assert list(samples) == ["a_000000"]
    reasons = {item.name: item.reason for item in skipped}
    assert "actions is missing" in reasons["a.tar/b"]
    assert "4 rows" in reasons["a.tar/c"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_cut_anywhere_gives_its_whole_samples_and_says_so(tmp_path: Path, mode: str) -> None:
    members = [(f"k{i}.{ext}", data) for i in range(6) for ext, data in (("mp4", video(5, i)), ("txt", b"x"))]
    whole = write_tar(tmp_path / "a.tar", members, mode).read_bytes()
    source = build("webdataset", input=tmp_path, val_fraction=0)
    assert len(collect(source)[0]) == 6
    rng = np.random.default_rng(0)
    for cut in [0, 100, 512, 700, len(whole) // 2, *rng.integers(0, len(whole) * 8 // 10, 8)]:
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        samples, skipped, _ = collect(source)
        found = [numbers(sample)[0] for sample in samples.values()]
        assert found == list(range(len(found)))
        assert any(item.name == "a.tar" for item in skipped)


def test_a_damaged_header_is_not_the_end_in_silence(tmp_path: Path) -> None:
    members = [(f"k{i}.mp4", video(5, i)) for i in range(4)]
    path = write_tar(tmp_path / "a.tar", members)
    data = bytearray(path.read_bytes())
    at = data.index(b"k2.mp4")
    data[at : at + 3] = b"\xff\xff\xff"
    path.write_bytes(bytes(data))
    samples, skipped, _ = collect(build("webdataset", input=tmp_path, val_fraction=0))
    assert [numbers(sample)[0] for sample in samples.values()] == [0]
    assert {"a.tar", "a.tar/k1"} == {item.name for item in skipped}
    path.write_bytes(b"this is no tar at all" * 100)
    samples, skipped, _ = collect(build("webdataset", input=tmp_path, val_fraction=0))
    assert not samples
    assert [item.name for item in skipped] == ["a.tar"]


def test_urls_are_refused_without_consent_and_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for url in (f"pipe:touch {marker}", "https://example.org/a.tar", "s3://bucket/a.tar"):
        with pytest.raises(ConfigError, match=r"source\.allow_remote"):
            build("webdataset", input=url).tasks()
        with pytest.raises(ConfigError, match=r"source\.allow_remote"):
            build("webdataset", input=[str(tmp_path), url]).info()
    assert not marker.exists()


def test_a_pipe_is_read_with_consent(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("k.mp4", video())])
    code = f"import sys; sys.stdout.buffer.write(open({str(tar)!r}, 'rb').read())"
    source = build("webdataset", input=f'pipe:{sys.executable} -c "{code}"', allow_remote=True, val_fraction=0)
    samples, skipped, _ = collect(source)
    assert not skipped
    assert [numbers(sample) for sample in samples.values()] == [[0, 1, 2, 3, 4]]


def test_patterns_lists_and_missing_files(tmp_path: Path) -> None:
    for index in range(4):
        write_tar(tmp_path / f"part-{index:03d}.tar", [("same_key.mp4", video(5, index))])
    for given in (
        f"{tmp_path}/part-{{000..003}}.tar",
        f"{tmp_path}/part-00?.tar",
        [f"{tmp_path}/part-000.tar", f"{tmp_path}/part-{{001,002,003}}.tar"],
        str(tmp_path),
    ):
        samples, skipped, _ = collect(build("webdataset", input=given))
        assert not skipped
        assert sorted(numbers(sample)[0] for sample in samples.values()) == [0, 1, 2, 3]
        assert "part-002_same_key_000000" in samples
    with pytest.raises(ConfigError, match=r"part-004\.tar"):
        build("webdataset", input=f"{tmp_path}/part-{{003..004}}.tar").tasks()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tar"):
        build("webdataset", input=tmp_path / "empty").tasks()
    with pytest.raises(ConfigError, match="no input"):
        build("webdataset").tasks()


def test_splits_by_name_by_tar_and_by_episode(tmp_path: Path) -> None:
    write_tar(tmp_path / "named" / "train-0.tar", [("a.mp4", video())])
    write_tar(tmp_path / "named" / "val-0.tar", [("b.mp4", video())])
    splits = collect(build("webdataset", input=tmp_path / "named"))[2]
    assert sorted(splits.values()) == ["train", "val"]
    assert next(key for key, split in splits.items() if split == "val").startswith("val-0_b")
    members = [(f"film{film}_{part:02d}.mp4", video()) for film in range(6) for part in range(3)]
    write_tar(tmp_path / "one" / "all.tar", members)
    source = build("webdataset", input=tmp_path / "one", episode_pattern="(.+)_[0-9]+", val_fraction=0.01)
    samples, skipped, splits = collect(source)
    assert not skipped
    assert len(samples) == 18
    found: dict[str, set[str]] = {}
    for key, sample in samples.items():
        found.setdefault(sample.episode, set()).add(splits[key])
    assert set(found) == {f"film{film}" for film in range(6)}
    assert sorted(len(where) for where in found.values()) == [1] * 6
    assert list(splits.values()).count("val") == 3, "one film, although its share is small"
    for index in range(5):
        write_tar(tmp_path / "many" / f"{index}.tar", [(f"{part}.mp4", video()) for part in range(2)])
    samples, _, splits = collect(build("webdataset", input=tmp_path / "many", val_fraction=0.2))
    by_tar = {(key.split("_")[0], split) for key, split in splits.items()}
    assert len(by_tar) == 5
    assert {split for _, split in by_tar} == {"train", "val"}


def test_a_longtake_set_keeps_its_splits_columns_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for name in ("train/a", "train/b", "val/c"):
        for view in ("front", "left"):
            path = folder / f"{name}_{view}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(video(10))
        np.save(folder / f"{name}.actions.npy", np.arange(10.0)[:, None].repeat(2, 1))
        (folder / f"{name}.txt").write_text("a caption\n")
    first = build(
        "video_folder",
        input=folder,
        view_pattern="(?P<episode>.+)_(?P<view>front|left)",
        action_names=["turn", "move"],
        licence="CC0-1.0",
        origin="made by a test",
    )
    made = make(first, tmp_path / "set")
    source = build("webdataset", input=tmp_path / "set", copy=True)
    info = source.info()
    assert (info.licence, info.origin, info.view_names) == ("CC0-1.0", "made by a test", ("front", "left"))
    assert info.action_names == ("turn", "move")
    samples, skipped, splits = collect(source)
    assert not skipped
    assert {split: list(splits.values()).count(split) for split in ("train", "val")} == {"train": 4, "val": 2}
    again = make(source, tmp_path / "again")
    for split in ("train", "val"):
        assert [s.sha256 for s in again.splits[split].shards] == [s.sha256 for s in made.splits[split].shards]
    recut = build("webdataset", input=tmp_path / "set", clip_frames=2, video={"height": 8, "width": 32})
    samples, skipped, splits = collect(recut)
    assert not skipped
    assert len(samples) == 12
    sample = samples["train_a_000005_000002"]
    assert sample.views["left"].shape == (2, 8, 32, 3)
    assert numbers(sample, "left") == [7, 8]
    assert sample.captions == ["a caption"]
    assert sample.episode == "train_a"
    assert sample.actions is not None
    assert sample.actions[1].tolist() == [8, 8]


def make(source: Any, root: Path) -> Any:
    return build_dataset(
        source, root, request={}, settings=WriterSettings(), num_workers=1, overwrite=False, progress=False
    )


def test_copies_of_another_size_are_refused_by_the_writer_not_taken(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.mp4", video())])
    source = build("webdataset", input=tmp_path, copy=True, val_fraction=0)
    sample = next(iter(collect(source)[0].values()))
    assert isinstance(sample, RawSample)
    assert set(sample.encoded) == {"mp4"}
    with pytest.raises(BadSampleError, match="128x32"):
        encode_sample(sample, source.info(), EncodeSettings())


def test_tokens_pass_through_when_described(tmp_path: Path) -> None:
    tokens = np.arange(12).reshape(1, 3, 2, 2)
    write_tar(
        tmp_path / "a.tar",
        [("k.tokens.npy", npy(tokens)), ("k.json", json.dumps({"num_frames": 9}).encode())],
    )
    fields = {"video": None, "tokens": "tokens.npy"}
    with pytest.raises(ConfigError, match=r"source\.tokens_info"):
        build("webdataset", input=tmp_path, copy=True, fields=fields, required=["tokens"]).info()
    description = {"vocab_size": 64, "grid": [3, 2, 2], "tokenizer": "test"}
    source = build(
        "webdataset",
        input=tmp_path,
        copy=True,
        fields=fields,
        required=["tokens"],
        tokens_info=description,
        val_fraction=0,
    )
    assert source.info().tokens == description
    sample = next(iter(collect(source)[0].values()))
    assert np.array_equal(sample.tokens, tokens)
    assert sample.num_frames == 9
    with pytest.raises(ConfigError, match=r"source\.copy"):
        build("webdataset", input=tmp_path, fields=fields, required=["tokens"]).info()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fields": {"video": {"a.b": "mp4"}}}, "source.fields"),
        ({"required": ["sound"]}, "source.required"),
        ({"required": ["tokens"]}, "source.fields.tokens"),
        ({"split_by": "luck"}, "source.split_by"),
        ({"split_by": "set"}, "source.split_by"),
        ({"split_by": "name"}, "source.split_by"),
        ({"episode_pattern": "("}, "source.episode_pattern"),
    ],
)
def test_a_setting_that_cannot_work_names_its_key(changes: dict, key: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("k.mp4", video())])
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        build("webdataset", input=tar, **changes).tasks()
