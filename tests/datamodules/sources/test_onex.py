"""Clips of the 1X challenge read directly: which are kept, what they hold, and the sentence for every damage."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from datamodules.sources.onex import OnexSource, read_onex_clips
from datamodules.sources.onex_v1 import V1Folder
from datamodules.sources.onex_v2 import STATE_NAMES, V2Folder
from datamodules.sources.onex_writer import write_onex_v1, write_onex_v2, write_v2_shard
from longtake.errors import ConfigError, DataError
from tests.datamodules.sources.onex_files import (
    LENGTH,
    SETTINGS,
    clip_tokens,
    frame_states,
    whole_clip,
    write_v1,
    write_v2,
)


@pytest.mark.parametrize("layout", ["flat", "folders"])
def test_v2_keeps_whole_clips_of_one_recording(tmp_path, layout):
    """Recordings of 40, 34 and 20 frames: clips 0, 1 whole, 2 and 4 straddle, 3 whole, and 9 frames are left over."""
    write_v2(tmp_path / "val_v2.0", layout=layout)
    found = read_onex_clips(tmp_path / "val_v2.0", **SETTINGS)
    assert [clip.first_frame // LENGTH for clip in found.clips] == [0, 1, 3]
    assert [clip.segment for clip in found.clips] == [0, 0, 1]
    assert found.dropped == {"straddling": 2, "partial": 1}
    states = frame_states(0, 94)
    for clip in found.clips:
        assert np.array_equal(clip.tokens, clip_tokens(0, clip.first_frame // LENGTH))
        assert clip.states is not None
        assert np.array_equal(clip.states, states[clip.first_frame : clip.first_frame + LENGTH])
    assert found.geometry.num_frames == LENGTH
    assert len(read_onex_clips(tmp_path / "val_v2.0", limit=2, **SETTINGS).clips) == 2


def test_a_recording_inside_a_clip_is_found(tmp_path):
    """First and last frame agree, the middle does not."""
    segments = np.zeros(LENGTH * 2, int)
    segments[5:8] = 1
    write_v2_shard(tmp_path, 0, np.stack([clip_tokens(0, 0), clip_tokens(0, 1)]), segments, frame_states(0, 34))
    found = read_onex_clips(tmp_path, **SETTINGS)
    assert [clip.first_frame for clip in found.clips] == [LENGTH]
    assert found.dropped == {"straddling": 1}


def test_sizes_of_the_real_shard():
    """36.4 MB of video and 5.03 MB of states are 2962 clips and 50.3 thousand frames."""
    clip_bytes = 4 * np.prod(V2Folder(Path("nowhere")).geometry.grid)
    assert clip_bytes == 12288
    assert 2962 * clip_bytes == pytest.approx(36.4e6, rel=1e-3)
    state_bytes = 25 * np.dtype(np.float32).itemsize
    assert 2962 * 17 * state_bytes == pytest.approx(5.03e6, rel=2e-3)
    assert len(STATE_NAMES) == 25
    assert (STATE_NAMES[0], STATE_NAMES[12], STATE_NAMES[13], STATE_NAMES[20], STATE_NAMES[24]) == (
        "hip_yaw",
        "left_wrist_roll",
        "right_shoulder_pitch",
        "neck_pitch",
        "angular_velocity",
    )


def grow(path: Path, change: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content + bytes(change) if change > 0 else content[:change])


def overwrite(path: Path, index: int, value: float, dtype: type) -> None:
    numbers = np.fromfile(path, dtype)
    numbers[index] = value
    numbers.tofile(path)


DAMAGE = {
    "metadata count": (
        lambda folder: (folder / "metadata_0.json").write_text('{"shard_num_frames": 111}'),
        ["video_0.bin has 1152 bytes", "6 rows", "expected 7 rows", "shard_num_frames 111", "input_tokens_dir"],
    ),
    "cut video": (
        lambda folder: grow(folder / "video_0.bin", -100),
        ["5.48 rows, not a whole number", "expected 6 rows"],
    ),
    "missing segments": (
        lambda folder: (folder / "segment_idx_0.bin").unlink(),
        ["segment_idx_0.bin is missing", "expected 376 bytes", "shard_num_frames 94"],
    ),
    "missing states": (lambda folder: (folder / "states_0.bin").unlink(), ["states_0.bin is missing"]),
    "missing video": (lambda folder: (folder / "video_0.bin").unlink(), ["video_0.bin is missing"]),
    "missing metadata": (lambda folder: (folder / "metadata_0.json").unlink(), ["metadata_0.json cannot be read"]),
    "short segments": (
        lambda folder: grow(folder / "segment_idx_0.bin", -4),
        ["segment_idx_0.bin has 372 bytes, that is 93 rows", "expected 94 rows"],
    ),
    "states of another robot": (
        lambda folder: grow(folder / "states_0.bin", 94 * 8),
        ["states_0.bin has 10152 bytes", "expected 94 rows"],
    ),
    "token too large": (
        lambda folder: overwrite(folder / "video_0.bin", 3, 640, np.int32),
        ["clip000000: tokens run from", "to 640; expected 0 to 639", "vocab_size"],
    ),
    "negative token": (
        lambda folder: overwrite(folder / "video_0.bin", 3, -1, np.int32),
        ["tokens run from -1", "expected 0 to 639"],
    ),
    "states not finite": (
        lambda folder: overwrite(folder / "states_0.bin", 25 * 2, np.nan, np.float32),
        ["NaN or infinity (frame 2)"],
    ),
    "no json": (lambda folder: (folder / "metadata_0.json").write_text("[1"), ["metadata_0.json cannot be read"]),
    "no count": (
        lambda folder: (folder / "metadata_0.json").write_text('{"shard_num_frames": "94"}'),
        ["states shard_num_frames '94'", "positive int"],
    ),
    "count of nothing": (
        lambda folder: (folder / "metadata_0.json").write_text('{"shard_num_frames": 0}'),
        ["states shard_num_frames 0"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence(tmp_path, name):
    damage, words = DAMAGE[name]
    damage(write_v2(tmp_path / "val"))
    with pytest.raises(DataError) as caught:
        read_onex_clips(tmp_path / "val", **SETTINGS)
    for word in words:
        assert word in str(caught.value)


def test_another_grid_is_named(tmp_path):
    write_v2(tmp_path / "val")
    with pytest.raises(DataError, match=r"6 clips of 3 x 4 x 4 tokens: change `source.grid`"):
        read_onex_clips(tmp_path / "val")
    with pytest.raises(ConfigError, match=r"source.grid is \[3, 4\]"):
        read_onex_clips(tmp_path / "val", grid=[3, 4])


def test_what_is_no_folder(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="input_tokens_dir") as caught:
            read_onex_clips(path)
        assert "video_0.bin" in str(caught.value)
        assert "video.bin" in str(caught.value)
    write_v2(tmp_path / "val")
    with pytest.raises(ConfigError, match="segment_ids.bin"):
        read_onex_clips(tmp_path / "val", version="v1.1")
    with pytest.raises(ConfigError, match="v3"):
        read_onex_clips(tmp_path / "val", version="v3")


def test_missing_shards_are_told(tmp_path, caplog):
    write_v2(tmp_path / "val", lengths=([34], [34]))
    for path in tmp_path.glob("val/*_0.*"):
        path.unlink()
    with caplog.at_level(logging.WARNING, logger="longtake"):
        found = read_onex_clips(tmp_path / "val", **SETTINGS)
    assert [clip.shard for clip in found.clips] == [1, 1]
    assert "states 2 shards, 1 are there" in caplog.text


@pytest.mark.parametrize("layout", ["flat", "folders"])
def test_v2_writer_and_reader(tmp_path, layout):
    clips = [whole_clip(number, segment=number // 2) for number in range(5)]
    assert write_onex_v2(tmp_path / "val", clips, layout=layout, clips_per_shard=2, hz=15) == 3
    found = read_onex_clips(tmp_path / "val", **SETTINGS)
    assert found.dropped == {}
    assert found.geometry.fps == 15
    for written, read in zip(clips, found.clips, strict=True):
        assert np.array_equal(written.tokens, read.tokens)
        assert read.states is not None
        assert np.array_equal(written.states, read.states)
        assert written.segment == read.segment
    heads = list((tmp_path / "val").rglob("metadata.json"))
    assert json.loads(heads[0].read_text()) == {"num_shards": 3, "query": "", "hz": 15, "num_images": 85}
    assert (tmp_path / "val" / "videos").is_dir() == (layout == "folders")
    with pytest.raises(ConfigError, match="not empty"):
        write_onex_v2(tmp_path / "val", clips)
    with pytest.raises(ConfigError, match="no clip"):
        write_onex_v2(tmp_path / "other", [])


def test_v1_windows(tmp_path):
    """500 and 300 frames: starts 0..14 and, a window further, 240..254; then 500..514."""
    write_v1(tmp_path / "val", [500, 300])
    found = read_onex_clips(tmp_path / "val")
    starts = [*range(0, 15), *range(240, 255), *range(500, 515)]
    assert [clip.first_frame for clip in found.clips] == starts
    assert found.dropped == {"straddling": 225}
    used = np.concatenate([np.arange(start, start + 240, 15) for start in starts])
    assert len(np.unique(used)) == len(used)
    for clip in found.clips:
        frames = np.arange(clip.first_frame, clip.first_frame + 240, 15)
        assert clip.tokens.shape == (16, 4, 4)
        assert np.array_equal(clip.tokens[:, 0, 0], frames)
        assert clip.states is not None
        assert clip.states.shape == (16, 26)
        assert np.array_equal(clip.states[:, 0], frames)
        assert np.array_equal(clip.states[:, 25], frames)
    assert found.geometry.fps == 2
    assert found.geometry.vocab_size == 2**18


def test_v1_windows_equal_the_challenge_s_loader(tmp_path):
    """The starts that 1xgpt's loader keeps, by its own quadratic rule."""
    lengths = [260, 226, 225, 700]
    write_v1(tmp_path / "val", lengths)
    segments = np.repeat(np.arange(4), lengths)
    valid = [start for start in range(len(segments) - 225) if segments[start] == segments[start + 225]]
    kept: list[int] = []
    for start in valid:
        if not {start - 15 * i for i in range(1, 16)} & set(kept):
            kept.append(start)
    assert [clip.first_frame for clip in read_onex_clips(tmp_path / "val").clips] == kept
    everything = read_onex_clips(tmp_path / "val", filter_overlaps=False)
    assert [clip.first_frame for clip in everything.clips] == valid
    assert everything.dropped["straddling"] == len(segments) - 225 - len(valid)


def test_v1_damage(tmp_path):
    folder = write_v1(tmp_path / "val", [300])
    overwrite(folder / "video.bin", 0, 2**18, np.uint32)
    with pytest.raises(DataError, match="to 262144; expected 0 to 262143"):
        read_onex_clips(folder)
    overwrite(folder / "video.bin", 0, 2**32 - 1, np.uint32)
    with pytest.raises(DataError, match="tokens run from -1"):
        read_onex_clips(folder)
    grow(folder / "video.bin", -64)
    with pytest.raises(DataError, match=r"299 rows of uint32 \[4, 4\]; expected 300 rows"):
        read_onex_clips(folder)
    (folder / "actions" / "neck_desired.bin").unlink()
    grow(folder / "video.bin", 64)
    with pytest.raises(DataError, match=r"neck_desired.bin is missing"):
        read_onex_clips(folder)
    (folder / "segment_ids.bin").unlink()
    with pytest.raises(DataError, match=r"segment_ids.bin is missing"):
        read_onex_clips(folder)
    (folder / "metadata.json").write_text('{"num_images": 300, "s": 4, "token_dtype": "object"}')
    with pytest.raises(DataError, match="token_dtype 'object'"):
        read_onex_clips(folder)
    (folder / "metadata.json").write_text('{"s": 4}')
    with pytest.raises(DataError, match="num_images None"):
        read_onex_clips(folder)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="`source.version`"):
        OnexSource(version="v2", input="x")
    with pytest.raises(ConfigError, match="`input`"):
        OnexSource(version="v2.0", input=None)
    with pytest.raises(ConfigError, match="`source.split`"):
        OnexSource(version="v2.0", input="x", split="validation")
    with pytest.raises(ConfigError, match="`source.states_as`"):
        OnexSource(version="v2.0", input="x", states_as="state")
    with pytest.raises(ConfigError, match="`source.val_fraction`"):
        OnexSource(version="v2.0", input="x", val_fraction=2.0)
    with pytest.raises(ConfigError, match="`source.stride`"):
        V1Folder(Path("x"), stride=0)


def test_writer_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="differ"):
        write_v2_shard(tmp_path, 0, np.zeros((1, 3, 4, 4)), np.zeros(18), np.zeros((18, 25)))
    with pytest.raises(ValueError, match="joint_pos"):
        write_onex_v1(tmp_path, np.zeros((4, 2, 2)), np.zeros(4), {})
