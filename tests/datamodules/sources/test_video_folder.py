"""`source=video_folder`: what lies in a folder becomes clips, and what cannot is named."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from longtake.errors import ConfigError, DataError
from tests.datamodules.sources.numbered_clips import (
    build,
    collect,
    encode,
    numbered_frame,
    numbers,
    write_numbered,
)


def test_clips_are_cut_at_the_set_fps_size_and_stride(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 43, rate=20)
    source = build("video_folder", input=tmp_path, stride=4)
    samples, skipped, _ = collect(source)
    assert not skipped
    # 43 frames at 20 fps are 22 ticks at 10 fps; clips of 5, 4 apart; 5 of them fill 21 ticks.
    assert [numbers(sample) for sample in samples.values()] == [list(range(8 * k, 8 * k + 10, 2)) for k in range(5)]
    assert list(samples) == [f"a_{4 * k:06d}" for k in range(5)]
    last = samples["a_000016"]
    assert last.meta["dropped_frames"] == 1
    assert last.meta["start_seconds"] == 1.6
    assert {sample.views["main"].shape for sample in samples.values()} == {(5, 16, 64, 3)}
    assert source.info().video.fps == 10


def test_a_short_tail_is_kept_when_asked_for(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 13)
    samples, _, _ = collect(build("video_folder", input=tmp_path, keep_short=True))
    assert [len(numbers(sample)) for sample in samples.values()] == [5, 5, 3]
    assert numbers(samples["a_000010"]) == [10, 11, 12]


def test_a_stride_longer_than_a_clip_leaves_a_gap(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 20)
    samples, _, _ = collect(build("video_folder", input=tmp_path, stride=8))
    assert [numbers(sample) for sample in samples.values()] == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12]]


def test_every_kind_of_file_and_folder_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, container, codec in [
        ("a.mp4", "mp4", "libx264"),
        ("b.webm", "webm", "libvpx"),
        ("c.mov", "mov", "libx264"),
        ("d.avi", "avi", "mpeg4"),
        ("deep/er/e.mkv", "matroska", "libx264"),
    ]:
        write_numbered(tmp_path / name, 5, container=container, codec=codec)
    write_numbered(tmp_path / "f.GIF", 5, container="gif", codec="gif", pix_fmt="gray")
    (tmp_path / "frames").mkdir()
    for index in range(12):
        Image.fromarray(numbered_frame(index)).save(tmp_path / "frames" / f"{index}.png")
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "README").write_text("x")
    (tmp_path / "._a.mp4").write_text("x")
    with caplog.at_level(logging.INFO, "longtake"):
        samples, skipped, _ = collect(build("video_folder", input=tmp_path))
    assert not skipped
    assert {key.rsplit("_", 1)[0] for key in samples} == {"a", "b", "c", "d", "deep_er_e", "f", "frames"}
    assert all(re.fullmatch("[A-Za-z0-9_-]+", key) for key in samples)
    assert numbers(samples["frames_000005"]) == [5, 6, 7, 8, 9], "10.png comes after 9.png"
    assert "1 files ending in .pdf, 1 files without an ending" in caplog.text


def test_images_play_at_their_own_rate(tmp_path: Path) -> None:
    for index in range(20):
        Image.fromarray(numbered_frame(index)).save(tmp_path / f"{index:03d}.png")
    samples, _, _ = collect(build("video_folder", input=tmp_path, frames_fps=20))
    assert numbers(next(iter(samples.values()))) == [0, 2, 4, 6, 8]


def test_bad_files_are_named_with_their_reason_and_the_rest_is_used(tmp_path: Path) -> None:
    whole = write_numbered(tmp_path / "good.mp4", 10).read_bytes()
    mkv = encode([numbered_frame(i) for i in range(30)], container="matroska")
    for name, data in {
        "empty.mp4": b"",
        "half.mp4": whole[: len(whole) // 2],
        "text.webm": b"hello",
        "zeros.avi": bytes(5000),
        "half.mkv": mkv[: len(mkv) * 3 // 4],
    }.items():
        (tmp_path / name).write_bytes(data)
    write_numbered(tmp_path / "one.mp4", 1)
    write_numbered(tmp_path / "slow.mp4", 20, rate=5)
    (tmp_path / "locked.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    samples, skipped, _ = collect(build("video_folder", input=tmp_path))
    reasons = {item.name: item.reason for item in skipped}
    assert set(reasons) == {
        "empty.mp4",
        "half.mp4",
        "text.webm",
        "zeros.avi",
        "half.mkv",
        "one.mp4",
        "slow.mp4",
    }
    assert "5 fps" in reasons["slow.mp4"]
    assert "10" in reasons["slow.mp4"]
    assert "allow_fps_upsampling" in reasons["slow.mp4"]
    assert "1 frames" in reasons["one.mp4"]
    assert "clips are kept" in reasons["half.mkv"]
    kept = [numbers(sample) for key, sample in samples.items() if key.startswith("half")]
    assert kept
    assert kept == [list(range(5 * k, 5 * k + 5)) for k in range(len(kept))]
    assert [key for key in samples if key.startswith("good")] == ["good_000000", "good_000005"]


def test_upsampling_repeats_frames_when_allowed(tmp_path: Path) -> None:
    write_numbered(tmp_path / "slow.mp4", 4, rate=5)
    samples, _, _ = collect(build("video_folder", input=tmp_path, allow_fps_upsampling=True))
    assert numbers(samples["slow_000000"]) == [0, 0, 1, 1, 2]


def test_nothing_usable_and_no_input_say_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "clip.mpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"files ending in \.mpg"):
        build("video_folder", input=tmp_path).tasks()
    with pytest.raises(ConfigError, match="does not exist"):
        build("video_folder", input=tmp_path / "nowhere").tasks()
    with pytest.raises(ConfigError, match="no input"):
        build("video_folder").info()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"resize": "squash"}, "source.resize"),
        ({"clip_frames": 0}, "source.clip_frames"),
        ({"stride": -1}, "source.stride"),
        ({"view_pattern": "(?P<episode>.+)"}, "source.view_pattern"),
        ({"view_pattern": "("}, "source.view_pattern"),
        ({"split_by": "luck"}, "source.split_by"),
        ({"val_fraction": 1.5}, "source.val_fraction"),
        ({"actions_resample": "median"}, "source.actions_resample"),
        ({"actions_fps": 0}, "source.actions_fps"),
        ({"video": {"height": 15}}, "video.height"),
        ({"video": {"fps": "fast"}}, "video.fps"),
    ],
)
def test_a_setting_that_cannot_work_names_its_key(changes: dict, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        build("video_folder", input=tmp_path, **changes)


def test_one_named_file_is_enough(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", 10)
    write_numbered(tmp_path / "b.mp4", 10)
    (tmp_path / "a.txt").write_text("first\n")
    samples, _, _ = collect(build("video_folder", input=tmp_path / "a.mp4"))
    assert set(samples) == {"a_000000", "a_000005"}
    assert samples["a_000000"].captions == ["first"]
