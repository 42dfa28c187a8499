"""Control videos as cached latents: encoded as the views are, from the same starts, and read back with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.latents import LatentsDataModule
from datamodules.loading.pipeline import Shard
from datamodules.loading.reading import Sample, SplitReader
from datamodules.shards import DatasetInfo
from datamodules.sources.base import RawSample, Skipped, Task
from datamodules.sources.encoded import EncodedSource
from datamodules.writing.build import WriterSettings, build_dataset
from longtake.errors import ConfigError
from longtake.media.edges import edge_video
from longtake.media.read import read_video
from tests.block_code import BlockCode
from tests.datamodules.synthetic import Squares

VIDEO = {"_target_": "tests.block_code.BlockCode"}
VIEWS = ("front", "rear")


class HalfControlled(Squares):
    """Squares whose rear view has no depth in the second clip of each task."""

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        for number, sample in enumerate(super().samples(task)):
            assert isinstance(sample, RawSample)
            if number == 1:
                del sample.control["depth"]["rear"]
            yield sample


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    source = HalfControlled(num_tasks=3, per_task=2, num_frames=17, views=VIEWS, control=("depth", "labels"))
    root = tmp_path_factory.mktemp("base") / "set"
    return build_dataset(source, root, request={}, settings=WriterSettings(), num_workers=1, progress=False)


@pytest.fixture(scope="module")
def cached(base: DatasetInfo, tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    source = EncodedSource(
        input=str(base.root), video=VIDEO, start_stride=4, num_frames=9, dtype="float32", control=["depth", "edge"]
    )
    root = tmp_path_factory.mktemp("cached") / "set"
    return build_dataset(source, root, request={}, settings=WriterSettings(), num_workers=1, progress=False)


def sample_of(base: DatasetInfo, key: str) -> Sample:
    reader = SplitReader(base, "train")
    return next(reader[index] for index in range(len(reader)) if reader[index].key == key)


def encoded(frames: np.ndarray) -> torch.Tensor:
    """Returns the latents [t c h w] of frames uint8 [t h w c]."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return BlockCode().encode(video[None, None])[0, 0]


def module(cached: DatasetInfo, **changes: Any) -> LatentsDataModule:
    made = LatentsDataModule(**({"root": cached.root, "num_frames": 9, "batch_size": 2, "num_workers": 0} | changes))
    made.setup("fit")
    return made


def test_control_is_the_encoding_of_the_same_frames(base: DatasetInfo, cached: DatasetInfo) -> None:
    loader = iter(module(cached, control=["depth", "edge"]).train_loader(Shard(0, 1)))
    seen, absent = set(), 0
    for clip in (next(loader) for _ in range(8)):
        assert clip.control is not None
        assert clip.control_mask is not None
        assert clip.latents is not None
        assert clip.actions is not None
        for row, key in enumerate(clip.key):
            sample = sample_of(base, key)
            for view, name in enumerate(VIEWS):
                frames = read_video(sample.read(f"{name}.mp4"))
                starts = [s for s in (0, 4, 8) if torch.equal(encoded(frames[s : s + 9]), clip.latents[row, view])]
                assert len(starts) == 1
                part = slice(starts[0], starts[0] + 9)
                seen.add(starts[0])
                assert torch.equal(clip.control["edge"][row, view], encoded(edge_video(frames[part])))
                if clip.control_mask["depth"][row, view]:
                    depth = read_video(sample.read(f"control.depth.{name}.mp4"))
                    assert torch.equal(clip.control["depth"][row, view], encoded(depth[part]))
                else:
                    absent += 1
                    assert (name, key[-1]) == ("rear", "1")
                    assert (clip.control["depth"][row, view] == 0).all()
    assert seen == {0, 4, 8}
    assert absent > 0


def test_what_is_cached_is_stated(cached: DatasetInfo) -> None:
    assert cached.source.latents is not None
    assert cached.source.latents["control"] == ["depth", "edge"]
    assert cached.source.view_names == VIEWS


def test_without_control_the_latents_come_alone(cached: DatasetInfo) -> None:
    clip = next(iter(module(cached).train_loader(Shard(0, 1))))
    assert clip.control is None
    assert clip.control_mask is None


def test_unknown_types_list_the_known(base: DatasetInfo, cached: DatasetInfo) -> None:
    with pytest.raises(ConfigError, match="'depht'; expected one of: depth, .*edge"):
        EncodedSource(input=str(base.root), video=VIDEO, control=["depht"]).info()
    with pytest.raises(ConfigError, match="'labels'; expected one of: .*depth"):
        module(cached, control=["labels"]).train_loader(Shard(0, 1))


def test_a_set_without_control_says_nothing_of_it(base: DatasetInfo) -> None:
    info = EncodedSource(input=str(base.root), video=VIDEO).info()
    assert info.latents is not None
    assert "control" not in info.latents
