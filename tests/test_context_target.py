"""`experiment=ar_context9` from the command line: cached blocks, curriculum, resume, rollouts, keys, short clips."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import longtake
import predict
import train
from datamodules.held_out import held_out_clips
from datamodules.latents import LatentsDataModule
from datamodules.loading.pipeline import Shard
from datamodules.loading.reading import SplitReader
from datamodules.shards import DatasetInfo
from datamodules.sources.base import RawSample, Skipped, SourceInfo, Task
from datamodules.sources.encoded import EncodedSource
from datamodules.video import VideoDataModule
from datamodules.writing.build import WriterSettings, build_dataset
from launcher import ranks
from launcher.entry import run
from launcher.stored import use_stored
from longtake.errors import ConfigError
from longtake.media.read import probe_video, read_video
from longtake.rollout.chunks import MemoryRollout
from longtake.rollout.conditions import clip_conditions, of_chunks
from longtake.rollout.denoise import noise_of_chunk
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import plan_rollout
from longtake.types import Clip
from tests.block_code import BlockCode
from tests.configs import EXTRA_CONF
from tests.datamodules.synthetic import Squares

BLOCK = 9
TINY = [
    "experiment=ar_context9",
    "network.dim=16",
    "network.ffn_dim=32",
    "network.num_heads=2",
    "network.num_layers=2",
    "network.in_channels=4",
    "network.patch_size=[1,1,1]",
    "network.freq_dim=32",
    "network.text=null",
    "encoder/video=block_code",
    "encoder/text=none",
    "optimizer=adamw",
    "optimizer.lr=0.01",
    "video.height=16",
    "video.width=24",
    "video.fps=10",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.action_dim=2",
    "trainer.precision=32-true",
    "trainer=cpu",
    "trainer.val_check_interval=6",
    "rollout.num_steps=3",
    "callbacks.checkpoint.every_n_train_steps=4",
    "callbacks.video_grid.num_samples=1",
    "objective.own_steps=2",
]
STAGES = (
    "callbacks.curriculum.enabled=true",
    "callbacks.curriculum.schedules=["
    "{key:objective.context.noised,points:[[0,0.0],[2,1.0]]},{key:objective.context.recoded,points:[[0,0.0],[3,1.0]]},"
    "{key:objective.context.own,points:[[0,0.0],[5,4.0]]},{key:objective.own_depth,points:[[0,1],[8,3]]}]",
)


class Walks(Squares):
    """Squares whose actions have names that keys can be given a meaning by."""

    def info(self) -> SourceInfo:
        return dataclasses.replace(super().info(), action_names=("move_forward", "turn_right"))


@dataclasses.dataclass
class Uneven(Walks):
    """Clips of another length in every task, the last of them again in the last task."""

    lengths: tuple[int, ...] = ()

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        self.num_frames = [*self.lengths, self.lengths[-1]][task.payload["number"]]
        yield from super().samples(task)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `pixels` and `blocks`, the same clips of 49 frames."""
    folder = tmp_path_factory.mktemp("sets")
    settings = WriterSettings(task_timeout_s=60)
    source = Walks(num_tasks=4, per_task=2, num_frames=49, splits=("train", "train", "val", "long"))
    build_dataset(source, folder / "pixels", request={"a": 1}, settings=settings, num_workers=1, progress=False)
    cache = EncodedSource(
        input=str(folder / "pixels"),
        video={"_target_": "tests.block_code.BlockCode"},
        start_stride=3,
        num_frames=BLOCK,
        dtype="float32",
    )
    build_dataset(cache, folder / "blocks", request={"b": 1}, settings=settings, num_workers=1, progress=False)
    return folder


@pytest.fixture(autouse=True)
def no_run_id(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (ranks.RUN_ID, ranks.RUN_PLAN):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    logging.getLogger("longtake").handlers.clear()


def start(*words: str) -> int:
    """Runs train.py on the tiny experiment in this process and returns its exit code."""
    patch = pytest.MonkeyPatch()
    for name in (ranks.RUN_ID, ranks.RUN_PLAN):
        patch.setenv(name, "")
        patch.delenv(name)
    given = {word.partition("=")[0] for word in words}
    tiny = [word for word in TINY if word.partition("=")[0] not in given]
    patch.setattr(sys, "argv", ["train.py", "--config-dir", str(EXTRA_CONF), *tiny, *words])
    try:
        return run(train.main, "train")
    finally:
        patch.undo()


def on_blocks(sets: Path) -> list[str]:
    return ["data=latents", f"data.root={sets / 'blocks'}", "data.block_frames=9"]


@pytest.fixture(scope="module")
def trained(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run through all stages of a short curriculum."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*on_blocks(sets), f"run.root={folder}", "run.id=a", "trainer.max_steps=12", *STAGES]
    assert start(*words) == 0
    return folder / "a"


@pytest.fixture
def call(trained: Path, sets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs predict.py on that run into `tmp_path`/out and returns its exit code."""

    def call(*words: str) -> int:
        base = [f"ckpt={trained}", "trust=[tests]", "data=video", f"data.root={sets / 'pixels'}"]
        base += ["data.video_reader=pyav", "num_clips=1", f"output_dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", ["predict.py", *base, *words])
        return run(predict.main, "predict", use_stored)

    return call


# Data


def test_a_clip_is_made_of_blocks_that_are_encoded_by_themselves(sets: Path) -> None:
    info, encoder = DatasetInfo.load(sets / "pixels"), BlockCode()
    reader = SplitReader(info, "train")
    samples = [reader[number] for number in range(len(reader))]
    videos = {sample.key: torch.from_numpy(read_video(sample.read("mp4"))) for sample in samples}
    module = LatentsDataModule(root=sets / "blocks", num_frames=27, block_frames=9, batch_size=4, num_workers=0)
    module.setup("fit")
    loader, starts = iter(module.train_loader(Shard(0, 1))), set()
    for _ in range(10):
        clip = next(loader)
        assert clip.latents is not None
        assert clip.latents.shape[2] == 9
        for row, key in enumerate(clip.key):
            pixels = videos[key].permute(0, 3, 1, 2)[None, None].float() / 127.5 - 1
            errors = {
                begin: (encoder.encode_blocks(pixels[:, :, begin : begin + 27], 3)[0] - clip.latents[row]).abs().max()
                for begin in range(23)
            }
            best = min(errors, key=errors.__getitem__)
            assert errors[best] < 1e-5
            starts.add(best)
    assert starts <= set(range(0, 23, 3))
    assert len(starts) > 4


def test_blocks_are_a_condition_of_the_data() -> None:
    with pytest.raises(ConfigError, match=r"data\.block_frames is 0"):
        LatentsDataModule(root="nowhere", block_frames=0)


def short(folder: Path, lengths: tuple[int, ...]) -> Path:
    """Returns a set with clips of these lengths in `train`, and of the last of them in `val`."""
    source = Uneven(lengths=lengths, num_tasks=len(lengths) + 1, per_task=2)
    source.splits = (*["train"] * len(lengths), "val")
    settings = WriterSettings(task_timeout_s=60)
    build_dataset(source, folder, request={"a": lengths}, settings=settings, num_workers=1, progress=False)
    return folder


def test_no_clip_with_18_frames_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = short(tmp_path / "set", (12, 17))
    words = ["data=video", f"data.root={root}", "data.video_reader=pyav", f"run.root={tmp_path}", "run.id=b"]
    assert start(*words, "trainer.max_steps=2") == 2
    assert "no clip has the 18 frames needed (longest: 17)" in capsys.readouterr().err


def test_clips_that_are_too_short_are_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clips of 2 blocks train too, though own rollouts find no block after them there."""
    root = short(tmp_path / "set", (12, 20))
    words = ["data=video", f"data.root={root}", "data.video_reader=pyav", f"run.root={tmp_path}", "run.id=b"]
    assert start(*words, "trainer.max_steps=7", *STAGES) == 0
    shown = capsys.readouterr()
    assert "2 of 4 clips of split 'train'" in shown.out + shown.err
    assert "shorter than the 18 frames needed and are left out" in shown.out + shown.err


def test_blocks_are_refused_where_the_objective_has_none(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*on_blocks(sets)[:2], "data.block_frames=null") == 2
    assert "data.block_frames is None, and the objective needs 9" in capsys.readouterr().err


# Training


def figures(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_a_resumed_run_goes_through_the_same_stages(trained: Path, sets: Path, tmp_path: Path) -> None:
    words = [*on_blocks(sets), f"run.root={tmp_path}", "run.id=cut", *STAGES]
    assert start(*words, "trainer.max_steps=8") == 0
    assert start(*words, "trainer.max_steps=12") == 0
    assert figures(tmp_path / "cut") == figures(trained)
    ours, whole = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path / "cut", trained)
    )
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_stage_that_cannot_be_is_found_at_the_start(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*on_blocks(sets), "video.num_frames=36", *STAGES) == 2
    shown = capsys.readouterr().err
    assert "own rollouts of 3 blocks" in shown
    assert "need clips of 45 frames, and video.num_frames is 36" in shown


# Rollouts


def test_a_chain_is_one_block_after_the_other(trained: Path) -> None:
    """27 frames are three generations of one block, each from the block before as its only context."""
    model: Any = longtake.load(trained, trust=["tests"])
    given = np.random.default_rng(0).integers(0, 255, (9, 16, 24, 3), np.uint8)
    table = np.random.default_rng(1).normal(size=(36, 2)).astype(np.float32)
    whole = model.generate(num_frames=36, start=given, actions=table, name="x").video()
    assert whole.shape == (1, 1, 36, 16, 24, 3)
    assert np.array_equal(whole[0, 0, :9], given)
    context, key = model.encode(given[None, None]), NoiseKey(0, ("x#0",))
    clip = Clip(actions=torch.from_numpy(table)[None], fps=torch.tensor([10.0]))
    told = clip_conditions(clip, chunk_lat=3, num_chunks=4, ratio=4, own_starts=True)
    plan = plan_rollout("memory", num_frames_px=18, context_px=9, trained=model.spec.trained_for)
    for block in range(1, 4):
        own = of_chunks(told, [block - 1, block])
        with pytest.MonkeyPatch.context() as patch:  # the noise of a block is that of its place in the video
            patch.setattr(
                "longtake.rollout.chunks.noise_of_chunk",
                lambda key, purpose, _, like, block=block: noise_of_chunk(key, purpose, block, like),
            )
            rollout = MemoryRollout(num_steps=3, guidance=1.0)
            *_, made = rollout(model.network, context, own, plan, model.solver, key)
        context = made.latents
        frames = ((model.video_encoder.decode(context).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        wanted = frames[0, 0].permute(0, 2, 3, 1).numpy()
        assert np.abs(wanted.astype(int) - whole[0, 0, 9 * block : 9 * block + 9]).max() <= 1


@pytest.mark.parametrize(("context", "given"), [(9, 1), (1, 0)])
def test_81_frames_from_a_clip_and_from_an_image(
    call: Callable[..., int], tmp_path: Path, context: int, given: int
) -> None:
    assert call("num_frames=81", f"num_context_frames={context}", "actions=right") == 0
    out = tmp_path / "out"
    assert probe_video(out / "sample_000" / "output.mp4").num_frames == 81
    found = json.loads((out / "metrics.json").read_text())
    assert found["per_chunk"]["chunk"] == list(range(given, 9))  # 8 generations after a clip, 9 after an image


def test_figures_beside_the_truth_are_those_of_blocks(call: Callable[..., int], tmp_path: Path, sets: Path) -> None:
    assert call("num_frames=45") == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["per_chunk"]
    assert found["chunk"] == [1, 2, 3, 4]
    clip = next(held_out_clips(VideoDataModule(root=sets / "pixels", video_reader="pyav", num_workers=0), 45, 1))
    video, encoder = torch.from_numpy(clip.frames).permute(0, 1, 4, 2, 3)[None].float() / 127.5 - 1, BlockCode()
    recoded = encoder.decode_blocks(encoder.encode_blocks(video, 3), 3)
    psnrs = [
        10 * math.log10(4 / (a - b).square().mean())
        for a, b in zip(recoded.split(9, 2), video.split(9, 2), strict=True)
    ]
    assert found["vae_ceiling_psnr_db"] == pytest.approx(psnrs[1:], abs=0.2)


def test_a_start_that_was_not_trained_names_those_that_were(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("num_frames=81", "num_context_frames=5") == 2
    assert "trained to start from 1 or 9 frames" in capsys.readouterr().err
    assert call("num_frames=81", "num_context_frames=12") == 2
    assert "blocks of 9 frames" in capsys.readouterr().err


def test_of_a_longer_start_the_last_whole_blocks_are_used(trained: Path) -> None:
    model = longtake.load(trained, trust=["tests"])
    frames = np.random.default_rng(0).integers(0, 255, (25, 16, 24, 3), np.uint8)
    generation = model.generate(num_frames=40, start=frames)
    plan: Any = generation.request.plan
    assert (plan.given_chunks, plan.start_px, plan.num_chunks) == (2, 18, 5)
    video = generation.video()
    assert np.array_equal(video[0, 0, :18], frames[-18:])
    assert video.shape[2] == 40


def test_keys_from_a_pipe_make_the_video_until_q(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w\nd q"))
    assert call("num_frames=243", "actions=interactive") == 0
    assert probe_video(tmp_path / "out" / "sample_000" / "output.mp4").num_frames == 36  # 9 given, w, d, still
    assert "frames 9 to 17: w s a d, space = stand still, q = end > w" in capsys.readouterr().err


def test_a_video_that_ends_before_its_first_frame_is_said(
    call: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("q"))
    assert call("num_frames=81", "num_context_frames=1", "actions=interactive") == 1
    assert "ended before its first chunk" in capsys.readouterr().err
