"""Cached latents and texts: encode once, train on them, and make videos from prompts with nothing but the weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import longtake
import predict
import train
from datamodules.sources.encoded import EncodedSource
from datamodules.writing.build import WriterSettings, build_dataset
from launcher import ranks
from launcher.entry import run
from launcher.stored import use_stored
from longtake.errors import ConfigError
from longtake.pretrained.weights_file import read_header
from tests.block_code import BlockCode
from tests.configs import EXTRA_CONF, TINY
from tests.datamodules.synthetic import Squares

WORDS = {"_target_": "longtake.encoders.text.WordsEncoder", "words": None, "vocab_size": 32, "max_words": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a short run on cached clips."""
    folder = tmp_path_factory.mktemp("cached")
    settings = WriterSettings(task_timeout_s=60)
    source = Squares(num_tasks=4, per_task=2, num_frames=25, splits=("train", "train", "val", "long"))
    build_dataset(source, folder / "set", request={"a": 1}, settings=settings, num_workers=1, progress=False)
    video = {"_target_": "tests.block_code.BlockCode"}
    cache = EncodedSource(input=str(folder / "set"), video=video, text=WORDS, start_stride=4, num_frames=21)
    build_dataset(cache, folder / "cache", request={"b": 1}, settings=settings, num_workers=1, progress=False)
    base = [word for word in TINY if not word.startswith(("network=", "encoder/text="))]
    words = [*base, "network=tiny_text", "encoder/text=words", "encoder.text.vocab_size=32", "encoder.text.max_words=8"]
    words += ["trainer=cpu", "data=latents", f"data.root={folder / 'cache'}", "data.action_dim=2", "data.num_workers=0"]
    words += ["data.batch_size=2", "video.width=24", f"run.root={folder}", "run.id=a", "trainer.max_steps=8"]
    patch = pytest.MonkeyPatch()
    for name in (ranks.RUN_ID, ranks.RUN_PLAN):
        patch.setenv(name, "")
        patch.delenv(name)
    words += ["trainer.val_check_interval=8", "optimizer=adamw", "optimizer.lr=0.01"]
    patch.setattr(sys, "argv", ["train.py", "--config-dir", str(EXTRA_CONF), *words])
    assert run(train.main, "train") == 0
    patch.undo()
    return folder / "a"


@pytest.fixture
def call(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs predict.py on that run into `tmp_path`/out and returns its exit code."""

    def call(*words: str) -> int:
        base = [f"ckpt={trained}", "trust=[tests]", f"output_dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", ["predict.py", *base, *words])
        return run(predict.main, "predict", use_stored)

    return call


def generate(trained: Path, prompt: str | None, **changes: Any) -> np.ndarray:
    model = longtake.load(trained, trust=["tests"])
    return model.generate(num_frames=9, prompt=prompt, seed=0, **changes).video()


def test_the_vocabulary_travels_with_the_weights(trained: Path) -> None:
    header = read_header(trained / "weights.safetensors")
    assert {"square", "moves", "quadrat"} <= set(header["encoder"]["text"]["words"])
    assert header["encoder_fingerprint"] == "block-code-1"
    assert header["data"]["action_names"] == ["dx", "dy"]
    assert str(trained.parent) not in json.dumps(header)


def test_another_caption_changes_the_video_and_so_does_none(trained: Path) -> None:
    first, again, other, none = (
        generate(trained, prompt) for prompt in ("a square moves", "A square, moves!", "ein Quadrat läuft", None)
    )
    assert np.array_equal(first, again)  # case and punctuation are no words
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, none)


def test_unknown_words_are_named(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    generate(trained, "a purple square")
    assert "'purple'" in caplog.text


def test_a_file_of_prompts_makes_a_video_a_line(call: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a square moves\n\nein Quadrat läuft\n")
    assert call(f"prompts_file={tmp_path / 'prompts.txt'}", "num_frames=9", "num_samples=2") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("sample_*")) == [f"sample_00{n}" for n in range(4)]
    assert json.loads((out / "metrics.json").read_text())["metrics"]["num_videos"] == 4


def test_guidance_leads_away_from_a_negative_prompt(trained: Path, call: Callable[..., int], tmp_path: Path) -> None:
    words = ["prompt=a square moves", "num_frames=9", "rollout.guidance=2"]
    for name, more in (("a", []), ("b", ["negative_prompt=ein Quadrat"]), ("c", ["rollout.guidance=1"])):
        assert call(*words, *more, f"output_dir={tmp_path / name}") == 0
    sizes = [(tmp_path / name / "sample_000" / "output.mp4").read_bytes() for name in "abc"]
    assert len(set(sizes)) == 3


def test_latents_alone_cannot_be_started_from(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("num_frames=21") == 2  # data=latents has no pixels and names no data that has
    assert "input" in capsys.readouterr().err


def test_held_out_pixels_can_be_named(trained: Path, call: Callable[..., int], tmp_path: Path) -> None:
    words = ["data=video", f"data.root={trained.parent / 'set'}", "data.video_reader=pyav", "num_frames=21"]
    assert call(*words, "num_clips=1") == 0
    assert "psnr_db" in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]


def test_another_first_stage_is_refused(trained: Path) -> None:
    other = {"video": {"_target_": "tests.test_cached.OtherCode"}, "text": WORDS}
    with pytest.raises(ConfigError, match="encoder block-code-1, here is encoder another"):
        longtake.load(trained, trust=["tests"], encoder=other)


class OtherCode(BlockCode):
    """The same code under another name."""

    fingerprint = "another"
