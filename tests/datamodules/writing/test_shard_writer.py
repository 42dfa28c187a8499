import io
import json
import tarfile
import zlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import webdataset
from safetensors.numpy import save

from datamodules.shards import SampleEntry, index_path, read_index, read_member
from datamodules.sources.base import RawSample, SourceInfo
from datamodules.writing.shard_writer import EncodeSettings, ShardWriter, encode_sample, pack_sample
from longtake.errors import BadSampleError, ConfigError
from longtake.media.read import read_video
from longtake.media.write import encode_video
from tests.datamodules.synthetic import Squares, squares


def sample_of(source: Squares, number: int = 0) -> RawSample:
    task = source.tasks()[number]
    sample = next(iter(source.samples(task)))
    assert isinstance(sample, RawSample)
    return sample


def encoded(sample: RawSample, info: SourceInfo) -> dict[str, bytes]:
    return encode_sample(sample, info, EncodeSettings())


def entry_of(sample: RawSample, members: dict[str, bytes]) -> tuple[SampleEntry, bytes]:
    content, spans = pack_sample(sample.key, members)
    return SampleEntry(sample.key, sample.episode, 5, 0, len(content), spans), content


def test_single_view_members():
    source = Squares()
    sample = sample_of(source)
    members = encoded(sample, source.info())
    assert list(members) == ["mp4", "actions.npy", "states.npy", "txt", "json"]
    frames = read_video(members["mp4"], backend="pyav")
    assert frames.shape == sample.views["main"].shape
    assert np.abs(frames.astype(int) - sample.views["main"]).mean() < 4
    actions = np.load(io.BytesIO(members["actions.npy"]), allow_pickle=False)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions, sample.actions)
    assert members["txt"].decode() == "a square moves\nein Quadrat läuft\n"
    assert json.loads(members["json"]) == {"ballast": "", "episode": "episode 0", "num_frames": 5, "seed": 0}


def test_several_views_and_control_are_named_after_the_view():
    source = Squares(views=("front", "left"), control=("depth",))
    members = encoded(sample_of(source), source.info())
    videos = ["front.mp4", "left.mp4", "control.depth.front.mp4", "control.depth.left.mp4"]
    assert list(members)[:4] == videos
    assert len({members[name] for name in videos}) == 4


def test_single_view_control_names_the_view_too():
    source = Squares(control=("depth",))
    assert "control.depth.main.mp4" in encoded(sample_of(source), source.info())


def test_equal_samples_give_equal_bytes():
    source = Squares(views=("front", "left"), control=("depth",))
    one = replace(sample_of(source), meta={"a": 1, "b": 2})
    two = replace(sample_of(source), meta={"b": 2, "a": 1})
    first, second = (pack_sample("k", encoded(sample, source.info()))[0] for sample in (one, two))
    assert first == second


def test_absent_views_and_control_may_be_left_out():
    source = Squares(views=("front", "left"), control=("depth",))
    sample = sample_of(source)
    part = replace(sample, views={"left": sample.views["left"]}, control={})
    assert [name for name in encoded(part, source.info()) if name.endswith("mp4")] == ["left.mp4"]


def test_encoded_video_passes_through_and_is_counted():
    source = Squares()
    sample, info = sample_of(source), source.info()
    assert info.video is not None
    video = encode_video(squares(5, 3), fps=info.video.fps)
    members = encoded(replace(sample, views={}, encoded={"mp4": video}), info)
    assert members["mp4"] == video
    assert json.loads(members["json"])["num_frames"] == 5


@pytest.mark.parametrize(
    ("fps", "num_frames", "stated", "reason"),
    [
        ("35/3", 4, None, "actions are"),
        ("35/3", 5, 6, "expected"),
        ("12", 5, 5, "runs at"),
        ("35/3", 5, 4, "expected"),
    ],
)
def test_encoded_video_that_does_not_fit_is_refused(fps, num_frames, stated, reason):
    source = Squares()
    sample = sample_of(source)
    video = encode_video(squares(num_frames, 3), fps=Fraction(fps))
    with pytest.raises(BadSampleError, match=reason):
        encoded(replace(sample, views={}, encoded={"mp4": video}, num_frames=stated), source.info())


def test_truncated_encoded_video_is_refused():
    source = Squares()
    video = encoded(sample_of(source), source.info())["mp4"]
    for size in range(0, len(video), len(video) // 20):
        bad = replace(sample_of(source), views={}, encoded={"mp4": video[:size]}, num_frames=5)
        with pytest.raises(BadSampleError):
            encoded(bad, source.info())


def test_a_lost_frame_is_noticed(monkeypatch):
    source = Squares()
    monkeypatch.setattr(
        "datamodules.writing.shard_writer.encode_video",
        lambda frames, **settings: encode_video(frames[:-1], **settings),
    )
    with pytest.raises(BadSampleError, match="member 'mp4': 4 frames can be decoded; expected 5"):
        encoded(sample_of(source), source.info())


TOKENS = {"vocab_size": 64, "grid": [2, 3, 4], "tokenizer": "none"}


def test_tokens_become_int32():
    info = replace(Squares().info(), video=None, tokens=TOKENS, action_names=(), state_names=())
    tokens = np.arange(24).reshape(1, 2, 3, 4)
    members = encoded(RawSample("k", "e", tokens=tokens, num_frames=9), info)
    stored = np.load(io.BytesIO(members["tokens.npy"]), allow_pickle=False)
    assert stored.dtype == np.int32
    np.testing.assert_array_equal(stored, tokens)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.full((1, 2, 3, 4), 64), "expected 0 to 63"),
        (np.full((1, 2, 3, 4), -1), "expected 0 to 63"),
        (np.zeros((2, 2, 3, 4), int), "1 views"),
        (np.zeros((1, 2, 4, 3), int), "3 x 4"),
        (np.zeros((1, 2, 3, 4)), "integers"),
    ],
)
def test_bad_tokens_are_refused(tokens, reason):
    info = replace(Squares().info(), video=None, tokens=TOKENS, action_names=(), state_names=())
    with pytest.raises(BadSampleError, match=reason):
        encoded(RawSample("k", "e", tokens=tokens, num_frames=9), info)


def test_tokens_that_the_set_states_may_not_be_missing():
    info = replace(Squares().info(), tokens=TOKENS)
    with pytest.raises(BadSampleError, match="tokens are missing"):
        encoded(sample_of(Squares()), info)


def test_latents_must_be_whole_safetensors():
    info = replace(Squares().info(), latents={"channels": 4}, action_names=(), state_names=())
    content = save({"latents": np.ones((1, 4, 2, 2), np.float32)})
    sample = RawSample("k", "e", num_frames=5, encoded={"latents.safetensors": content})
    assert encoded(sample, info)["latents.safetensors"] == content
    for bad in (content[:-1], content[:20], b"", b"\xff" * 64, content + b"x"):
        with pytest.raises(BadSampleError, match="not a safetensors file"):
            encoded(replace(sample, encoded={"latents.safetensors": bad}), info)


def test_a_shard_is_read_by_index_by_tarfile_and_by_webdataset(tmp_path):
    source = Squares(views=("front", "left"), per_task=3)
    path = tmp_path / "train-000000.tar"
    writer = ShardWriter(path)
    written: dict[str, dict[str, bytes]] = {}
    for sample in source.samples(source.tasks()[0]):
        assert isinstance(sample, RawSample)
        written[sample.key] = encoded(sample, source.info())
        writer.add(*entry_of(sample, written[sample.key]))
    info = writer.close()
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "train-000000.index.jsonl",
        "train-000000.tar",
    ]
    assert (info.num_samples, info.num_frames, info.lengths) == (3, 15, {5: 3})
    assert info.bytes == path.stat().st_size

    with path.open("rb") as file:
        entries = read_index(path, info)
        by_index = {entry.key: {name: read_member(file, entry, name) for name in entry.members} for entry in entries}
        for entry in entries:  # the byte range of a sample is a tar by itself
            file.seek(entry.offset)
            with tarfile.open(fileobj=io.BytesIO(file.read(entry.size) + bytes(1024))) as alone:
                assert alone.getnames() == [f"{entry.key}.{name}" for name in entry.members]
    assert by_index == written

    with tarfile.open(path) as tar:
        assert all((item.mtime, item.uid, item.gid, item.mode) == (0, 0, 0, 0o644) for item in tar)
    streamed = {
        sample["__key__"]: {name: content for name, content in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert streamed == written


def test_pack_sample_states_offsets_and_checksums():
    content, spans = pack_sample("k", {"txt": b"hello", "json": b"{}"})
    assert len(content) == 4 * 512
    assert spans == {"txt": (512, 5, zlib.crc32(b"hello")), "json": (1536, 2, zlib.crc32(b"{}"))}


def test_an_aborted_shard_leaves_nothing(tmp_path):
    source = Squares()
    sample = sample_of(source)
    writer = ShardWriter(tmp_path / "train-000000.tar")
    writer.add(*entry_of(sample, encoded(sample, source.info())))
    assert not (tmp_path / "train-000000.tar").exists()
    writer.abort()
    assert not list(tmp_path.iterdir())
    assert not index_path(tmp_path / "train-000000.tar").exists()


@pytest.mark.parametrize("settings", [{"crf": 52}, {"crf": -1}, {"crf": "high"}, {"gop": 0}])
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match="writer.encode"):
        EncodeSettings(**settings)
