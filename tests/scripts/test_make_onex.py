"""From a folder of the 1X challenge to batches of tokens, by the commands that a user types."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from datamodules.shards import DatasetInfo
from datamodules.sources.base import RawSample, Skipped
from datamodules.sources.onex import OnexSource
from datamodules.tokens import TokensDataModule
from launcher import entry
from scripts.make_shards import main
from tests.datamodules.sources.onex_files import clip_tokens, frame_states, write_v1, write_v2

SMALL = ["source.grid=[3,4,4]", "source.vocab_size=640", "num_workers=1", "progress=false"]


@pytest.fixture
def make(monkeypatch, capfd):
    """Runs make_shards in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["make_shards", *map(str, arguments)])
        code = entry.run(main, "make_shards")
        return (code, *capfd.readouterr())

    return run


def batches(root, split: str, num_frames: int):
    module = TokensDataModule(root=str(root), batch_size=2, num_frames=num_frames, num_workers=0, seed=0)
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    iterator = iter(loader)
    return [next(iterator) for _ in range(2)]


def test_both_splits_end_to_end(make, tmp_path):
    write_v2(tmp_path / "in" / "train_v2.0", lengths=([40, 34, 20], [51]), layout="folders")
    write_v2(tmp_path / "in" / "val_v2.0", lengths=([34, 17],))
    output = tmp_path / "set"
    code, out, err = make("source=onex_v2", f"input={tmp_path / 'in'}", f"output={output}", *SMALL)
    assert code == 0, err
    assert "skipped 3" in out
    assert "straddling: frames 34 to 50 straddle segments 0 and 1" in out
    info = DatasetInfo.load(output)
    assert {name: split.num_samples for name, split in info.splits.items()} == {"train": 6, "val": 3}
    assert info.source.tokens == {
        "vocab_size": 640,
        "grid": [3, 4, 4],
        "ratio_time": 8,
        "tokenizer": "Cosmos-0.1-Tokenizer-DV8x8x8",
    }
    assert info.source.video is not None
    assert (info.source.video.fps, info.source.video.height, info.source.video.width) == (30, 32, 32)
    assert len(info.source.action_names) == 25

    known = {("train", shard, clip): clip_tokens(shard, clip) for shard, clip in ((0, 0), (0, 1), (0, 3))}
    known |= {("train", 1, clip): clip_tokens(1, clip) for clip in range(3)}
    states = {shard: frame_states(shard, 94) for shard in (0, 1)}
    for batch in batches(output, "train", 17):
        assert batch.tokens.shape == (2, 1, 3, 4, 4)
        assert batch.actions.shape == (2, 17, 25)
        for tokens, actions in zip(batch.tokens.numpy(), batch.actions.numpy(), strict=True):
            (_, shard, clip) = next(name for name, content in known.items() if np.array_equal(content, tokens[0]))
            assert np.array_equal(actions[1:], states[shard][17 * clip + 1 : 17 * clip + 17])
            assert not actions[0].any(), "no action led to the first frame of a clip"
        assert batch.fps.tolist() == [30.0, 30.0]
    assert batches(output, "val", 9)[0].tokens.shape == (2, 1, 2, 4, 4)


def test_v1_end_to_end(make, tmp_path):
    write_v1(tmp_path / "train_v1.1", [300, 260])
    write_v1(tmp_path / "val_v1.1", [240])
    code, out, err = make("source=onex_v1", f"input={tmp_path}", f"output={tmp_path / 'set'}", *SMALL[2:])
    assert code == 0, err
    info = DatasetInfo.load(tmp_path / "set")
    assert {name: split.num_samples for name, split in info.splits.items()} == {"train": 30, "val": 15}
    assert info.source.tokens is not None
    assert info.source.tokens["ratio_time"] == 1
    batch = batches(tmp_path / "set", "train", 16)[0]
    assert batch.tokens.shape == (2, 1, 16, 4, 4)
    assert np.array_equal(batch.tokens[:, 0, 1:, 0, 0].float().numpy(), batch.actions[:, 1:, 0].numpy())
    assert batch.fps.tolist() == [2.0, 2.0]


def test_damaged_shards_are_named_and_the_rest_is_made(make, tmp_path):
    folder = write_v2(tmp_path / "train", lengths=([34], [34], [34]))
    (folder / "segment_idx_1.bin").unlink()
    np.full(4 * 48 * 2, 5, np.int32)[: 48 * 2].tofile(folder / "video_2.bin")
    numbers = np.fromfile(folder / "video_2.bin", np.int32)
    numbers[60] = 640
    numbers.tofile(folder / "video_2.bin")
    code, out, err = make("source=onex_v2", f"input={folder}", f"output={tmp_path / 'set'}", *SMALL)
    assert code == 0, err
    assert DatasetInfo.load(tmp_path / "set").splits["train"].num_samples == 3
    assert "skipped 2" in out
    assert "segment_idx_1.bin is missing" in out
    assert "to 640; expected 0 to 639" in out


def test_mistakes_are_one_message(make, tmp_path):
    folder = write_v2(tmp_path / "train")
    missing = f"input={tmp_path / 'nowhere'}"
    cases = {
        (missing,): (2, "is no folder"),
        (f"input={folder}", "source.grid=[3,8,8]"): (1, "6 clips of 3 x 4 x 4 tokens"),
        (f"input={folder}", "source.vocab_size=5"): (1, "expected 0 to 4"),
        (f"input={folder}", "source.states_as=all"): (2, "source.states_as"),
        (): (2, "`input`"),
    }
    for overrides, (expected, words) in cases.items():
        code, out, err = make("source=onex_v2", f"output={tmp_path / 'set'}", *SMALL, *overrides)
        assert code == expected, err
        assert out == ""
        assert err.count("error:") == 1
        assert "Traceback" not in err
        assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_recordings_are_held_out_whole(tmp_path):
    write_v2(tmp_path / "mine", lengths=([34] * 40, [40, 28]))
    settings = {"grid": [3, 4, 4], "vocab_size": 640}
    source = OnexSource(version="v2.0", input=str(tmp_path / "mine"), val_fraction=0.3, states_as="both", **settings)
    found: dict[str, list[RawSample]] = {"train": [], "val": []}
    dropped = []
    for task in source.tasks():
        for sample in source.samples(task):
            (dropped if isinstance(sample, Skipped) else found[task.split]).append(sample)
    episodes = {split: {sample.episode for sample in samples} for split, samples in found.items()}
    assert episodes["train"]
    assert episodes["val"]
    assert not episodes["train"] & episodes["val"]
    keys = [sample.key for samples in found.values() for sample in samples]
    assert len(keys) == len(set(keys)) == 80 + 3
    assert len(dropped) == 1
    assert found["train"][0].states is found["train"][0].actions is not None
    assert source.info().state_names == source.info().action_names
    bare = OnexSource(version="v2.0", input=str(tmp_path / "mine"), states_as="none", **settings)
    assert next(iter(bare.samples(bare.tasks()[0]))).actions is None  # type: ignore[union-attr]
    assert bare.info().action_names == ()
