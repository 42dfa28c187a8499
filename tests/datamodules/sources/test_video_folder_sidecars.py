"""What lies beside the videos of a folder: captions, actions, states, further views, control; and the splits."""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from datamodules.sources.naming import assign_splits, natural_key, slug, unique_slugs
from longtake.errors import ConfigError, DataError
from tests.datamodules.sources.numbered_clips import (
    build,
    collect,
    encode,
    numbers,
    read_number,
    write_numbered,
)
from tests.datamodules.sources.test_frame_stream import scene


def test_captions_come_from_text_and_tables_and_missing_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "sub/b", "sub/c", "d"):
        write_numbered(tmp_path / f"{name}.mp4", 5)
    (tmp_path / "a.txt").write_text("\ufeffa red car\n\n  turns \x0b left \n", encoding="utf-8")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "captions.csv").write_text('file,caption\nsub/b.mp4,"one, two"\nsub/b,three\n../../etc/passwd,x\n')
    with caplog.at_level(logging.INFO, "longtake"):
        samples, skipped, _ = collect(build("video_folder", input=tmp_path))
    assert samples["a_000000"].captions == ["a red car", "turns", "left"]
    assert samples["sub_b_000000"].captions == ["one, two", "three"]
    assert samples["sub_c_000000"].captions == []
    assert [item.name for item in skipped] == ["d.txt"]
    assert "d_000000" in samples
    assert "1 of 4 recordings have no caption" in caplog.text
    assert "1 names match no video" in caplog.text


def test_a_jsonl_table_with_its_own_columns(tmp_path: Path) -> None:
    write_numbered(tmp_path / "sub" / "b.mp4", 5)
    table = tmp_path / "texts.jsonl"
    table.write_text(json.dumps({"file_name": "b.mp4", "text": "by its bare name", "more": 1}) + "\n")
    columns = {"captions": "texts.jsonl", "captions_file_column": "file_name", "captions_column": "text"}
    samples, _, _ = collect(build("video_folder", input=tmp_path, **columns))
    assert samples["sub_b_000000"].captions == ["by its bare name"]
    with pytest.raises(ConfigError, match="captions_file_column"):
        build("video_folder", input=tmp_path, captions="texts.jsonl").tasks()
    table.write_text("{not json\n")
    with pytest.raises(DataError, match=r"texts\.jsonl"):
        build("video_folder", input=tmp_path, **columns).tasks()


def test_actions_and_states_keep_to_the_frame_they_belong_to(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 42, rate=20)
    rows = np.arange(42, dtype=np.float64)
    np.save(tmp_path / "a.actions.npy", np.stack([rows, rows % 2], axis=1))
    np.save(tmp_path / "a.states.npy", rows)
    source = build(
        "video_folder",
        input=tmp_path,
        action_names=["turn", "key"],
        actions_resample={"turn": "sum", "default": "max"},
    )
    info = source.info()
    assert info.action_names == ("turn", "key")
    assert info.state_names == ("state_0",)
    samples, skipped, _ = collect(source)
    assert not skipped
    assert len(samples) == 4
    for sample in samples.values():
        assert sample.actions is not None
        assert sample.states is not None
        assert sample.actions.dtype == sample.states.dtype == np.float32
        shown = numbers(sample)
        assert sample.states[:, 0].tolist() == shown, "the state is that of the frame on screen"
        for frame, row in zip(shown, sample.actions.tolist(), strict=True):
            # Two source frames led to each output frame; nothing led to the very first one.
            assert row == ([frame + frame - 1, 1] if frame else [0, 0])


def test_rows_that_do_not_fit_skip_the_file_with_both_numbers(tmp_path: Path) -> None:
    for name in "abcdef":
        write_numbered(tmp_path / f"{name}.mp4", 10)
    np.save(tmp_path / "a.actions.npy", np.zeros((10, 2)))
    np.save(tmp_path / "b.actions.npy", np.zeros((9, 2)))
    np.save(tmp_path / "c.actions.npy", np.zeros((10, 3)))
    np.save(tmp_path / "d.actions.npy", np.full((10, 2), np.nan))
    np.save(tmp_path / "e.actions.npy", np.array([{}] * 10), allow_pickle=True)
    source = build("video_folder", input=tmp_path)
    assert source.info().action_names == ("action_0", "action_1")
    samples, skipped, _ = collect(source)
    assert {key[0] for key in samples} == {"a"}
    reasons = {item.name: item.reason for item in skipped}
    assert "9 rows" in reasons["b.mp4"]
    assert "10 frames" in reasons["b.mp4"]
    assert "3 columns" in reasons["c.mp4"]
    assert "not finite" in reasons["d.mp4"]
    assert "object" in reasons["e.mp4"]
    assert "f.actions.npy" in reasons["f.mp4"]
    assert len(collect(build("video_folder", input=tmp_path, use_actions=False))[0]) == 12


def test_a_pickle_in_an_npy_file_is_never_executed(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 5)
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):  # noqa: ANN204
            return (Path.touch, (marker,))

    (tmp_path / "a.actions.npy").write_bytes(pickle.dumps(Bomb()))
    samples, skipped, _ = collect(build("video_folder", input=tmp_path, action_names=["x"]))
    assert not samples
    assert len(skipped) == 1
    assert not marker.exists()


def test_views_by_name_in_the_order_given_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for view in ("left", "front", "right"):
        write_numbered(tmp_path / f"drive_{view}.mp4", 10)
        if view != "right":
            write_numbered(tmp_path / f"short_{view}.mp4", 10)
    (tmp_path / "drive.txt").write_text("a drive")
    np.save(tmp_path / "drive.actions.npy", np.arange(10))
    write_numbered(tmp_path / "other.mp4", 10)
    pattern = r"(?P<episode>.+)_(?P<view>front|left|right)"
    source = build("video_folder", input=tmp_path, view_pattern=pattern, views=["front", "left", "right"])
    assert source.info().view_names == ("front", "left", "right")
    samples, skipped, _ = collect(source)
    assert list(samples) == ["drive_000000", "drive_000005"]
    assert list(samples["drive_000005"].views) == ["front", "left", "right"]
    assert all(numbers(samples["drive_000005"], view) == [5, 6, 7, 8, 9] for view in ("front", "left", "right"))
    assert samples["drive_000005"].captions == ["a drive"]
    assert samples["drive_000005"].actions.tolist() == [[5], [6], [7], [8], [9]]
    assert [(item.name, "right" in item.reason) for item in skipped] == [("short", True)]


def test_views_in_folders_of_their_own_and_different_lengths(tmp_path: Path) -> None:
    write_numbered(tmp_path / "front" / "01.mp4", 16)
    write_numbered(tmp_path / "back" / "01.mp4", 11, rate=10)
    pattern = r"(?P<view>front|back)/.+"
    samples, skipped, _ = collect(build("video_folder", input=tmp_path, view_pattern=pattern))
    assert not skipped
    assert list(samples) == ["01_000000", "01_000005"], "cut to the shortest"
    assert list(samples["01_000000"].views) == ["back", "front"]
    samples, skipped, _ = collect(
        build("video_folder", input=tmp_path, view_pattern=pattern, on_length_mismatch="skip")
    )
    assert not samples
    assert "1.60" in skipped[0].reason
    assert "1.10" in skipped[0].reason


def test_control_videos_run_in_step(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 20, rate=20)
    write_numbered(tmp_path / "a.control.depth.mp4", 10)
    write_numbered(tmp_path / "control" / "labels" / "a.mp4", 10)
    write_numbered(tmp_path / "b.mp4", 10)
    source = build("video_folder", input=tmp_path)
    assert source.info().control_types == ("depth", "labels")
    samples, _, _ = collect(source)
    sample = samples["a_000005"]
    assert numbers(sample) == [10, 12, 14, 16, 18]
    for kind in ("depth", "labels"):
        assert sample.control[kind]["main"].shape == (5, 16, 64, 3)
    assert [read_number(p) for p in sample.control["depth"]["main"]] == [5, 6, 7, 8, 9]
    assert not samples["b_000000"].control


def test_no_clip_straddles_a_cut(tmp_path: Path) -> None:
    parts = [scene(11, 23, 2), scene(12, 14, 3), scene(13, 30, 1)]
    (tmp_path / "film.mp4").write_bytes(encode([frame for part in parts for frame in part], rate=20))
    samples, _, _ = collect(build("video_folder", input=tmp_path, split_scenes=True))
    borders = [1.15, 1.85]  # seconds
    spans = [(s.meta["start_seconds"], s.meta["start_seconds"] + 0.4) for s in samples.values()]
    assert len(spans) >= 4
    assert not [span for span in spans for border in borders if span[0] < border <= span[1]]
    assert any(span[0] >= 1.85 for span in spans)
    straddling, _, _ = collect(build("video_folder", input=tmp_path))
    starts = [s.meta["start_seconds"] for s in straddling.values()]
    assert any(start < border <= start + 0.4 for start in starts for border in borders)


def test_splits_by_folder_and_by_hash(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "validation/a"):
        write_numbered(tmp_path / f"{name}.mp4", 5)
    _, _, splits = collect(build("video_folder", input=tmp_path))
    assert splits == {"train_a_000000": "train", "train_b_000000": "train", "validation_a_000000": "val"}
    _, _, splits = collect(build("video_folder", input=tmp_path, split_by="hash", val_fraction=0.01))
    assert sorted(splits.values()) == ["train", "train", "val"], "at least one for validation"
    write_numbered(tmp_path / "c.mp4", 5)
    with pytest.raises(ConfigError, match=r"c\.mp4"):
        build("video_folder", input=tmp_path, split_by="folder").tasks()


def test_a_split_is_stable_and_never_empty() -> None:
    names = [f"clip{i}" for i in range(400)]
    one = assign_splits(names, val_fraction=0.1, test_fraction=0.05, seed=0)
    more = assign_splits([*names, "new"], val_fraction=0.1, test_fraction=0.05, seed=0)
    assert all(more[name] == one[name] for name in names)
    assert 20 <= list(one.values()).count("val") <= 65
    assert one != assign_splits(names, val_fraction=0.1, test_fraction=0.05, seed=1)
    assert {assign_splits(["one"], val_fraction=0.9, test_fraction=0, seed=s)["one"] for s in range(9)} == {"train"}
    for count in range(2, 8):
        for seed in range(30):
            few = assign_splits(names[:count], val_fraction=0.5, test_fraction=0.3 if count > 2 else 0, seed=seed)
            assert {"train", "val"} <= set(few.values())
            assert count == 2 or "test" in few.values()


def test_names_become_keys_that_stay_apart(tmp_path: Path) -> None:
    for name in ("a b.mp4", "a_b.mp4", "A_b.mkv", "é.mp4", "x" * 120 + ".mp4", "clip.v1.mp4"):
        write_numbered(tmp_path / name, 5, container="matroska" if name.endswith("mkv") else "mp4")
    samples, skipped, _ = collect(build("video_folder", input=tmp_path))
    assert not skipped
    assert len({key.lower() for key in samples}) == 6
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,60}", key) for key in samples)
    assert slug("../../x") == "x"
    assert unique_slugs({"1": "a b", "2": "a_b"})["1"] != unique_slugs({"1": "a b", "2": "a_b"})["2"]
    assert sorted(["c10", "c9", "c09"], key=natural_key) == ["c09", "c9", "c10"]


def test_links_are_followed_only_when_asked(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_numbered(outside / "b.mp4", 5)
    inside = tmp_path / "inside"
    write_numbered(inside / "a.mp4", 5)
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "c.mp4").symlink_to(outside / "b.mp4")
    assert set(collect(build("video_folder", input=inside))[0]) == {"a_000000"}
    followed = collect(build("video_folder", input=inside, follow_symlinks=True))[0]
    assert set(followed) == {"a_000000", "c_000000", "link_b_000000"}


def test_tasks_are_the_same_each_time_and_travel_to_workers(tmp_path: Path) -> None:
    for index in range(12):
        write_numbered(tmp_path / f"c{index}.mp4", 5)
    source = build("video_folder", input=tmp_path)
    tasks = source.tasks()
    assert [task.id for task in tasks] == [f"c{index}" for index in range(12)]
    assert tasks == pickle.loads(pickle.dumps(source)).tasks()
    assert json.loads(json.dumps(tasks[3].payload)) == tasks[3].payload
    first, again = list(source.samples(tasks[3])), list(pickle.loads(pickle.dumps(source)).samples(tasks[3]))
    assert np.array_equal(first[0].views["main"], again[0].views["main"])


def test_a_long_video_is_never_held_whole(tmp_path: Path) -> None:
    import tracemalloc

    picture = np.random.default_rng(0).integers(0, 255, (240, 320, 3)).astype(np.uint8)
    frames = [np.roll(picture, i, axis=1) for i in range(120)]
    (tmp_path / "long.mp4").write_bytes(encode(frames, rate=10))
    del frames
    source = build("video_folder", input=tmp_path, video={"height": 240, "width": 320})
    task = source.tasks()[0]
    tracemalloc.start()
    count = sum(1 for _ in source.samples(task))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 24
    clip = 5 * 240 * 320 * 3
    assert peak < 6 * clip, f"{peak / clip:.1f} clips"
