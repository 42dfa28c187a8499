"""Pixels: the wanted frames of the wanted views come back, with actions aligned to the frames they caused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.base import _content
from datamodules.loading.pipeline import Shard
from datamodules.sources.base import RawSample
from datamodules.video import VideoDataModule
from datamodules.writing.shard_writer import EncodeSettings, encode_sample
from longtake.errors import ConfigError
from longtake.media.edges import edge_video
from tests.datamodules.toy_set import make_toy_set, toy_info

NUM_FRAMES = 21
VIEWS = ("left", "right")


def level(number: int, view: int, frame: int) -> int:
    """Returns the grey level that tells sample, view and frame apart: steps of 4 survive the codec."""
    return 10 + 80 * view + 4 * ((number * 3 + frame) % 20)


def raw_sample(number: int, *, control: bool = True) -> RawSample:
    """Returns a two-view sample whose grey levels name every frame, and whose left half is darker."""

    def video(view: int, offset: int = 0) -> np.ndarray:
        frames = np.zeros((NUM_FRAMES, 48, 64, 3), dtype=np.uint8)
        for frame in range(NUM_FRAMES):
            frames[frame] = level(number, view, frame) + offset
        frames[:, :, :8] = 0
        return frames

    return RawSample(
        key=f"s{number}",
        episode=f"s{number}",
        views={name: video(index) for index, name in enumerate(VIEWS)},
        control={"depth": {name: video(index, 50) for index, name in enumerate(VIEWS)}} if control else {},
        actions=np.stack([np.full(NUM_FRAMES, number), np.arange(NUM_FRAMES)], axis=1).astype(np.float32),
        states=np.arange(NUM_FRAMES, dtype=np.float32)[:, None],
        captions=["one", "two"],
        num_frames=NUM_FRAMES,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples of two views; sample 5 has no control video."""
    info = toy_info(view_names=VIEWS, control_types=("depth",), state_names=("frame",), tokens=None)
    settings = EncodeSettings()
    members = {n: encode_sample(raw_sample(n), info, settings) for n in range(12)}
    members[5] = {name: value for name, value in members[5].items() if not name.startswith("control.")}
    return make_toy_set(
        tmp_path_factory.mktemp("set") / "views", num_samples=12, lengths=[NUM_FRAMES] * 12, info=info, members=members
    )


def module(root: Path, **changes: Any) -> VideoDataModule:
    data = VideoDataModule(**{"root": root, "batch_size": 4, "num_frames": 9, "num_workers": 0, **changes})
    data.setup("fit")
    return data


def test_frames_views_actions_and_control_belong_together(root: Path) -> None:
    starts = set()
    for batch in islice(module(root, control=["depth"]).train_loader(Shard(0, 1)), 6):
        assert batch.video.shape == (4, 2, 9, 3, 48, 64)
        assert batch.video.dtype == torch.uint8
        assert batch.fps.tolist() == pytest.approx([35 / 3] * 4)
        for clip, key in enumerate(batch.key):
            number, start = int(key.removeprefix("s").removeprefix("train_")), int(batch.states[clip, 0, 0])
            starts.add(start)
            assert batch.states[clip, :, 0].tolist() == list(range(start, start + 9))
            assert batch.actions[clip, 0].tolist() == [0, 0]
            assert batch.actions[clip, 1:].tolist() == [[number, row] for row in range(start + 1, start + 9)]
            for view in range(2):
                seen = batch.video[clip, view, :, :, :, 16:].float().mean((1, 2, 3))
                assert seen.tolist() == pytest.approx([level(number, view, start + t) for t in range(9)], abs=1.5)
                has = number != 5
                assert bool(batch.control_mask["depth"][clip, view]) == has
                seen = batch.control["depth"][clip, view, :, :, :, 16:].float().mean((1, 2, 3)) * has
                wanted = [(level(number, view, start + t) + 50) * has for t in range(9)]
                assert seen.tolist() == pytest.approx(wanted, abs=1.5)
    assert len(starts) > 5


def test_a_subset_of_views_keeps_the_rig_numbers(root: Path) -> None:
    batch = next(iter(module(root, views=["right"]).train_loader(Shard(0, 1))))
    assert batch.video.shape[1] == 1
    assert batch.view_ids.tolist() == [[1]] * 4
    assert batch.control is None


def test_strided_subclips_cover_each_sample_once_an_epoch(root: Path) -> None:
    data = module(root, subclips="strided", subclip_stride=6, batch_size=6)
    batches = list(islice(data.train_loader(Shard(0, 1)), 6))
    windows = sorted(
        (key, int(start)) for batch in batches for key, start in zip(batch.key, batch.states[:, 0, 0], strict=True)
    )
    assert windows == sorted((f"train_{n}", start) for n in range(12) for start in (0, 6, 12))


@pytest.mark.parametrize(("reduce", "expected"), [("last", 2.0), ("mean", 1.5), ("sum", 3.0), ("max", 2.0)])
def test_frame_stride_joins_actions_as_told(root: Path, reduce: str, expected: float) -> None:
    data = module(root, frame_stride=2, reduce_actions=reduce, subclips="strided", subclip_stride=21)
    batch = next(iter(data.train_loader(Shard(0, 1))))
    assert batch.states[0, :, 0].tolist() == list(range(0, 18, 2))
    assert batch.fps[0] == pytest.approx(35 / 6)
    assert batch.actions[0, 1, 1] == expected  # rows 1 and 2 lead to frame 2


def test_frame_stride_with_actions_must_say_how(root: Path) -> None:
    with pytest.raises(ConfigError, match="data.reduce_actions"):
        module(root, frame_stride=2).train_loader(Shard(0, 1))


def test_captions_vary_in_training_and_stand_in_validation(root: Path) -> None:
    data = module(root, val_batch_size=4)
    seen = {caption for batch in islice(data.train_loader(Shard(0, 1)), 6) for caption in batch.captions}
    assert seen == {"one", "two"}
    assert {caption for batch in data.fixed_loader("val", Shard(0, 1)) for caption in batch.captions} == {"one"}


def test_a_flip_mirrors_pixels_only_where_nothing_knows_left_from_right(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.horizontal_flip"):
        module(root, horizontal_flip=True).train_loader(Shard(0, 1))
    info = toy_info(action_names=(), tokens=None)
    raw = raw_sample(0, control=False)
    plain = RawSample(key="s", episode="s", views={"main": raw.views["left"]}, num_frames=NUM_FRAMES)
    members = dict.fromkeys(range(8), encode_sample(plain, info, EncodeSettings()))
    single = make_toy_set(tmp_path / "one", num_samples=8, lengths=[NUM_FRAMES] * 8, info=info, members=members)
    dark = []
    for batch in islice(module(single).train_loader(Shard(0, 1)), 8):
        assert batch.actions is None
        dark += (batch.video[:, 0, 0, 0, :, :4].float().mean((1, 2)) < 5).tolist()
    assert 8 < sum(dark) < 24
    assert all((batch.video[:, 0, 0, 0, :, :4] < 5).all() for batch in module(single).fixed_loader("val", Shard(0, 1)))


def test_length_buckets_never_mix_and_nothing_long_enough_is_left_out(tmp_path: Path) -> None:
    info = toy_info(action_names=(), tokens=None)
    lengths = [5, 9, 10, 17, 21, 21, 9, 3]
    members = {}
    for number, length in enumerate(lengths):
        views = {"main": np.full((length, 48, 64, 3), 100, dtype=np.uint8)}
        members[number] = encode_sample(RawSample(key="s", episode="s", views=views), info, EncodeSettings())
    root = make_toy_set(tmp_path / "mixed", num_samples=8, lengths=lengths, info=info, members=members)
    data = module(root, num_frames=[5, 9, 17], batch_size=3, bucket_run=6, horizontal_flip=False)
    seen: dict[str, set[int]] = {}
    for batch in islice(data.train_loader(Shard(0, 1)), 60):
        for key in batch.key:
            seen.setdefault(key, set()).add(batch.video.shape[2])
    expected = {0: 5, 1: 9, 2: 9, 3: 17, 4: 17, 5: 17, 6: 9}
    assert seen == {f"train_{number}": {length} for number, length in expected.items()}


def test_no_clip_long_enough_says_the_longest(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"has the 33 frames needed \(longest: 21\)"):
        module(root, num_frames=33).train_loader(Shard(0, 1))


def test_unknown_view_and_control_list_the_known(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"'lefft'; expected one of: left, right"):
        module(root, views=["lefft"]).train_loader(Shard(0, 1))
    with pytest.raises(ConfigError, match=r"'dept'; expected one of: depth, edge"):
        module(root, control=["dept"]).train_loader(Shard(0, 1))


def test_edges_are_extracted_where_the_set_has_none(root: Path) -> None:
    batch = next(iter(module(root, control=["edge", "depth"]).train_loader(Shard(0, 1))))
    assert batch.control is not None
    assert batch.control_mask is not None
    assert batch.video is not None
    assert batch.control_mask["edge"].all()
    for clip in range(len(batch)):
        for view in range(batch.video.shape[1]):
            frames = batch.video[clip, view].permute(0, 2, 3, 1).numpy()
            edges = batch.control["edge"][clip, view].permute(0, 2, 3, 1).numpy()
            assert np.array_equal(edges, edge_video(frames))


def test_the_number_of_processes_is_no_setting_of_a_set() -> None:
    source = {"_target_": "a.B", "num_frames": 9, "make": {"source": {"_target_": "c.D"}, "num_workers": 4}}
    assert _content(source) == _content({**source, "make": {**source["make"], "num_workers": None}})
    assert _content(source) != _content({**source, "num_frames": 17})
    assert source["make"]["num_workers"] == 4
    assert _content({"_target_": "a.B"}) == {"_target_": "a.B"}
