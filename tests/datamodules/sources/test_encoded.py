"""A set of pixels as cached latents and word ids: what is written, and what training reads back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.latents import LatentsDataModule
from datamodules.loading.pipeline import Shard
from datamodules.loading.reading import SplitReader
from datamodules.shards import DatasetInfo
from datamodules.sources.encoded import EncodedSource
from datamodules.writing.build import WriterSettings, build_dataset, ensure_dataset
from longtake.encoders.text import WordsEncoder
from longtake.encoders.video_vae import VideoVAE
from longtake.errors import ConfigError
from longtake.media.read import read_video
from longtake.types import Clip
from tests.first_stage import NoisyClips, random_weights

FRAMES = 18
TEXT = {"_target_": "longtake.encoders.text.WordsEncoder", "max_words": 4, "vocab_size": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    root = tmp_path_factory.mktemp("base") / "set"
    clips = NoisyClips(num_frames=FRAMES)
    return build_dataset(clips, root, request={}, settings=WriterSettings(), num_workers=1, progress=False)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    weights = random_weights(tmp_path_factory.mktemp("weights"))
    return {"_target_": "longtake.encoders.video_vae.VideoVAE", "weights": weights}


def source(base: DatasetInfo, node: dict[str, Any], **changes: Any) -> EncodedSource:
    settings: dict[str, Any] = {"video": node, "text": TEXT, "start_stride": 4, "num_frames": 9, "dtype": "float32"}
    return EncodedSource(input=str(base.root), **{**settings, **changes})


@pytest.fixture(scope="module")
def cached(base: DatasetInfo, node: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    root = tmp_path_factory.mktemp("cached") / "set"
    made = source(base, node)
    return build_dataset(made, root, request={}, settings=WriterSettings(), num_workers=2, progress=False)


def pixels(base: DatasetInfo, key: str) -> torch.Tensor:
    """Returns the clip of a sample, [1 v t c h w] in [-1, 1], as the encoder gets it."""
    readers = [SplitReader(base, split) for split in base.splits]
    sample = next(reader[i] for reader in readers for i in range(len(reader)) if reader[i].key == key)
    views = [torch.from_numpy(read_video(sample.read(f"{view}.mp4"))) for view in ("front", "rear")]
    return torch.stack(views).permute(0, 1, 4, 2, 3)[None].float() / 127.5 - 1


def batches(module: LatentsDataModule, count: int) -> list[Clip]:
    module.setup("fit")
    loader = iter(module.train_loader(Shard(0, 1)))
    return [next(loader) for _ in range(count)]


def test_it_states_its_encoders_and_keeps_the_rest(
    base: DatasetInfo, cached: DatasetInfo, node: dict[str, Any]
) -> None:
    stated = cached.source.latents
    assert stated is not None
    assert stated["encoder_fingerprint"] == VideoVAE(node["weights"]).fingerprint
    assert (stated["channels"], stated["ratio_time"], stated["ratio_space"]) == (4, 4, 8)
    assert stated["text"]["words"] == ["a", "ein", "läuft", "moves", "quadrat", "square"]
    assert cached.source.view_names == base.source.view_names
    assert cached.source.action_names == base.source.action_names
    assert {name: split.lengths for name, split in cached.splits.items()} == {"train": {18: 4}, "val": {18: 2}}
    assert "video" not in str(SplitReader(cached, "train")[0]._entry.members)


def test_latents_of_a_start_are_the_encoding_of_the_frames_from_there(
    base: DatasetInfo, cached: DatasetInfo, node: dict[str, Any]
) -> None:
    encoder = VideoVAE(node["weights"])
    module = LatentsDataModule(root=cached.root, num_frames=9, batch_size=2, num_workers=0, seed=3)
    seen = set()
    for clip in batches(module, 12):
        assert clip.latents is not None
        assert clip.latents.shape == (2, 2, 3, 4, 2, 4)
        assert clip.latents.dtype == torch.float32
        for row, key in enumerate(clip.key):
            video = pixels(base, key)
            errors = {
                start: (encoder.encode(video[:, :, start : start + 9])[0] - clip.latents[row]).abs().max().item()
                for start in range(FRAMES - 8)
            }
            start = min(errors, key=errors.__getitem__)
            assert errors[start] < 1e-4
            seen.add(start)
            assert clip.actions is not None
            assert clip.actions[row, 1:].tolist() == [[int(key[1:]), t] for t in range(start + 1, start + 9)]
    assert seen == {0, 4, 8}


def test_the_whole_clip_is_one_of_the_encodings(base: DatasetInfo, cached: DatasetInfo, node: dict[str, Any]) -> None:
    module = LatentsDataModule(root=cached.root, num_frames=17, batch_size=1, num_workers=0)
    clip = batches(module, 1)[0]
    expected = VideoVAE(node["weights"]).encode(pixels(base, clip.key[0])[:, :, :17])
    torch.testing.assert_close(clip.latents, expected, rtol=0, atol=1e-4)


def test_the_text_is_that_of_the_caption_that_was_drawn(cached: DatasetInfo) -> None:
    assert cached.source.latents is not None
    words = WordsEncoder(**{k: v for k, v in cached.source.latents["text"].items() if k != "_target_"})
    module = LatentsDataModule(root=cached.root, num_frames=9, batch_size=4, num_workers=0)
    drawn: set[str] = set()
    for clip in batches(module, 4):
        assert clip.captions is not None
        assert clip.text_ids is not None
        assert clip.text_mask is not None
        expected = words(clip.captions)
        assert torch.equal(clip.text_ids, expected["text_ids"])
        assert torch.equal(clip.text_mask, expected["text_mask"])
        drawn |= set(clip.captions)
    assert drawn == {"a square moves", "ein Quadrat läuft"}


def test_latents_of_another_encoder_are_refused(cached: DatasetInfo) -> None:
    module = LatentsDataModule(root=cached.root, num_frames=9, encoder_fingerprint="0" * 32)
    with pytest.raises(ConfigError, match=r"the model's encoder is 0{32}; expected the same.*encoder/video"):
        batches(module, 1)


def test_unknown_words_of_other_splits_are_named(
    base: DatasetInfo, node: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    few = {**TEXT, "vocab_size": 5}
    with caplog.at_level(logging.WARNING, "longtake"):
        info = source(base, node, text=few).info()
    assert info.latents is not None
    assert info.latents["text"]["words"] == ["a", "ein", "läuft"]
    assert "val: 3 words are not in the vocabulary: square, moves, quadrat" in caplog.text


def test_settings_that_cannot_work_are_refused(base: DatasetInfo, node: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source.num_frames is 10; expected 1 \+ k\*4"):
        source(base, node, num_frames=10).info()
    with pytest.raises(ConfigError, match="source.dtype"):
        source(base, node, dtype="int8")
    with pytest.raises(ConfigError, match="source.start_stride is 0"):
        source(base, node, start_stride=0)
    with pytest.raises(ConfigError, match="no set to encode"):
        EncodedSource(input=None, video=node)


def test_first_use_makes_both_sets_and_other_weights_make_the_cache_stale(node: dict[str, Any], tmp_path: Path) -> None:
    make = {"source": {"_target_": "tests.first_stage.NoisyClips", "num_frames": 9}}
    request = {"source": "noisy"}

    def made(video: dict[str, Any]) -> EncodedSource:
        return EncodedSource(input=str(tmp_path / "base"), video=video, make=make)

    first = ensure_dataset(made(node), tmp_path / "cache", request, progress=False)
    assert DatasetInfo.load(tmp_path / "base").splits["train"].num_samples == 4
    assert first.source.latents is not None
    assert first.source.latents["text"] is None
    again = ensure_dataset(made(node), tmp_path / "cache", request, progress=False)
    assert again.fingerprint == first.fingerprint
    other = {**node, "weights": random_weights(tmp_path, seed=1)}
    with pytest.raises(ConfigError, match=r"source_version.encoder \(there: .*data.rebuild=true"):
        ensure_dataset(made(other), tmp_path / "cache", request, progress=False)
    rebuilt = ensure_dataset(made(other), tmp_path / "cache", request, rebuild=True, progress=False)
    assert rebuilt.fingerprint != first.fingerprint
