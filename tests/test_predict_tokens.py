"""`train.py` on cached tokens and then `predict.py` from the command line, on moving squares in real shards."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from datamodules.sources.encoded import EncodedSource
from datamodules.sources.onex_format import OnexClip
from datamodules.sources.onex_writer import write_onex_v2
from datamodules.tokens import TokensDataModule
from datamodules.video import VideoDataModule
from datamodules.windows import clip_windows
from datamodules.writing.build import WriterSettings, build_dataset
from launcher import ranks
from launcher.entry import run
from launcher.stored import use_stored
from longtake.media.read import probe_video, read_video
from longtake.media.write import encode_video, save_image
from tests.block_tokens import BlockTokens
from tests.configs import EXTRA_CONF
from tests.datamodules.synthetic import Squares

Call = Callable[..., int]
FRAMES = 41
KEYS = {
    "nll_full_tf",
    "nll_parallel",
    "ce_sampled_prefix_mean",
    "ce_sampled_prefix_std",
    "ce_greedy_rollout",
    "nll_uniform",
    "nll_unigram",
    "nll_bigram",
    "nll_copy_previous",
    "nll_shuffled_actions",
    "accuracy",
    "bits_per_token",
    "ce_top500_logits",
    "ce_top500_logprobs",
    "psnr_decoded_truth_db",
    "ssim_decoded_truth",
    "psnr_raw_db",
    "ssim_raw",
    "psnr_tokenizer_ceiling_db",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a short run: 8 training clips, 2 each for validation, test and `long`."""
    folder = tmp_path_factory.mktemp("tokens")
    settings = WriterSettings(task_timeout_s=60)
    splits = ("train", "train", "train", "train", "val", "test", "long")
    source = Squares(num_tasks=7, per_task=2, num_frames=FRAMES, splits=splits)
    build_dataset(source, folder / "set", request={"a": 1}, settings=settings, num_workers=1, progress=False)
    video = {"_target_": "tests.block_tokens.BlockTokens"}
    cache = EncodedSource(input=str(folder / "set"), video=video, start_stride=4, num_frames=17)
    build_dataset(cache, folder / "cache", request={"b": 1}, settings=settings, num_workers=1, progress=False)
    words = ["experiment=ar_tokens_actions", "encoder/actions=none", "encoder/video=block_tokens", "video=tiny"]
    words += ["network=tiny_tokens", "network/actions=additive", "network.cross_attn_every=null", "video.width=24"]
    words += ["video.num_frames=17", "data=tokens", f"data.root={folder / 'cache'}", "data.action_dim=2"]
    words += ["data.num_workers=0", "data.batch_size=4", "trainer=cpu", "trainer.precision=32-true"]
    words += ["trainer.max_steps=60", "trainer.val_check_interval=60", "scheduler=warmup_constant", "optimizer=adamw"]
    words += ["optimizer.lr=0.01", f"run.root={folder}", "run.id=a", "callbacks.ema.decay=0.9"]
    patch = pytest.MonkeyPatch()
    for name in (ranks.RUN_ID, ranks.RUN_PLAN):
        patch.setenv(name, "")
        patch.delenv(name)
    patch.setattr(sys, "argv", ["train.py", "--config-dir", str(EXTRA_CONF), *words])
    assert run(train.main, "train") == 0
    patch.undo()
    return folder / "a"


@pytest.fixture
def call(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs predict.py on that run in this process, into `tmp_path`/out, and returns its exit code."""

    def call(*words: str) -> int:
        given = {word.partition("=")[0] for word in words}
        pixels = {"data": "video", "data.root": str(trained.parent / "set"), "data.video_reader": "pyav"}
        base = {"ckpt": str(trained), "trust": "[tests]", "output_dir": str(tmp_path / "out"), "num_clips": "2"}
        base |= {} if given & {"data", "input", "input_type"} else pixels
        more = [f"{key}={value}" for key, value in base.items() if key not in given]
        monkeypatch.setattr(sys, "argv", ["predict.py", *more, *words])
        return run(predict.main, "predict", use_stored)

    return call


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def truth(trained: Path, split: str = "long") -> np.ndarray:
    """Returns the frames of the first clip of a split, [t h w c]."""
    data = VideoDataModule(root=trained.parent / "set", num_frames=FRAMES, video_reader="pyav")
    (window,) = clip_windows(data, FRAMES, 1, split=split)
    assert window.frames is not None
    return window.frames[0]


def onex_folder(trained: Path, path: Path, **changes: Any) -> Path:
    """Writes windows of the test split as a v2.0 folder."""
    data = TokensDataModule(root=trained.parent / "cache", num_frames=17)
    clips = [
        OnexClip(tokens=w.tokens[0].astype(np.int32), states=w.actions, segment=number, name=str(number))
        for number, w in enumerate(clip_windows(data, 17, None, split=changes.get("split", "test")))
        if w.tokens is not None
    ]
    assert len(clips) == 4
    write_onex_v2(path, clips)
    return path


# The data


def test_cached_tokens_of_a_start_are_the_encoding_of_the_frames_from_there(trained: Path) -> None:
    data = TokensDataModule(root=trained.parent / "cache", num_frames=17)
    windows = list(clip_windows(data, 17, None, split="long"))
    assert [window.key.rpartition("-")[2] for window in windows] == ["0", "20"] * 2
    frames = torch.from_numpy(truth(trained)).permute(0, 3, 1, 2)[None, None].float() / 127.5 - 1
    for window, start in zip(windows, (0, 20), strict=False):
        assert window.tokens is not None
        assert window.actions is not None
        assert np.array_equal(window.tokens, BlockTokens().encode(frames[:, :, start : start + 17])[0].numpy())
        assert not window.actions[0].any()
        assert window.actions.shape == (17, 2)
    assert data.infos[0].source.tokens == {
        "vocab_size": 64,
        "grid": [6, 2, 3],
        "ratio_time": 8,
        "ratio_space": 8,
        "tokenizer": "block-tokens-1",
        "encoder_fingerprint": "block-tokens-1",
        "start_frames": 17,
    }


def test_training_draws_windows_from_all_starts(trained: Path) -> None:
    from datamodules.loading.pipeline import Shard

    data = TokensDataModule(root=trained.parent / "cache", num_frames=17, num_workers=0, batch_size=8)
    data.setup("fit")
    batches = iter(data.train_loader(Shard(0, 1)))
    tokens = [clip.tokens for clip in (next(batches) for _ in range(6)) if clip.tokens is not None]
    seen = {tuple(row.flatten().tolist()) for rows in tokens for row in rows}
    assert len(seen) > 20  # 8 clips have 7 starts each


# Videos


def test_held_out_clips_are_continued_as_long_as_one_likes(call: Call, tmp_path: Path, trained: Path) -> None:
    assert call("num_frames=38", "num_clips=1") == 0
    folder = tmp_path / "out" / "sample_000"
    names = {path.name for path in folder.iterdir()}
    videos = {"output.mp4", "output_actions.mp4", "comparison.mp4", "comparison.gif"}
    assert names == {*videos, "output.png", "metrics.json"}
    info = probe_video(folder / "output.mp4")
    assert (info.num_frames, info.height, info.width) == (38, 16, 24)
    assert probe_video(folder / "comparison.mp4").num_frames == 38
    assert Image.open(folder / "comparison.gif").n_frames > 3  # type: ignore[attr-defined]
    made = read_video(folder / "output.mp4")
    assert np.abs(made[:9].astype(int) - truth(trained)[:9]).mean() < 6
    found = result(tmp_path / "out")
    assert {"psnr_db", "vae_ceiling_psnr_db", "psnr_to_recoded_db", "ssim_to_recoded"} <= set(found["metrics"])
    assert found["per_chunk"]["chunk"] == [2, 3, 4, 5]


def test_jacobi_and_greedy_decoding_agree(call: Call, tmp_path: Path) -> None:
    videos = []
    for name in ("tokens", "tokens_jacobi"):
        words = [f"rollout={name}", "rollout.temperature=0", f"output_dir={tmp_path / name}", "num_frames=25"]
        assert call(*words) == 0
        videos.append((tmp_path / name / "sample_000" / "output.mp4").read_bytes())
    assert videos[0] == videos[1]


def test_samples_differ_and_a_seed_repeats(call: Call, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["num_samples=2", "num_clips=1", "rollout.top_p=1.0", f"seed={seed}", f"output_dir={tmp_path / name}"]
        assert call(*words) == 0
    a, b, c = (read_video(tmp_path / name / "sample_001" / "output.mp4") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a, read_video(tmp_path / "a" / "sample_000" / "output.mp4"))


def test_a_video_file_is_a_start_or_recorded_truth(call: Call, tmp_path: Path, trained: Path) -> None:
    clip = tmp_path / "clips" / "one.mp4"
    clip.parent.mkdir()
    clip.write_bytes(encode_video(truth(trained), fps=Fraction(10)))
    assert call(f"input={clip}", "actions=forward", "num_frames=25", f"output_dir={tmp_path / 'start'}") == 2
    np.save(tmp_path / "actions.npy", np.ones((25, 2), np.float32))
    words = [f"input={clip}", f"actions={tmp_path / 'actions.npy'}", "num_frames=25", f"output_dir={tmp_path / 'b'}"]
    assert call(*words) == 0
    assert not (tmp_path / "b" / "sample_000" / "comparison.mp4").exists()
    assert call("input_type=video", f"input={clip.parent}", f"output_dir={tmp_path / 'c'}") == 0
    assert (tmp_path / "c" / "sample_000" / "comparison.mp4").is_file()
    assert "psnr_db" in result(tmp_path / "c")["metrics"]
    scored = ["input_type=video", f"input={clip}", "only_eval=true", f"output_dir={tmp_path / 'd'}"]
    assert call(*scored) == 0
    assert result(tmp_path / "d")["metrics"]["num_clips"] == 2


def test_1x_tokens_are_continued(call: Call, tmp_path: Path, trained: Path) -> None:
    folder = onex_folder(trained, tmp_path / "test_v2.0")
    assert call("input_type=tokens", f"input_tokens_dir={folder}", "num_clips=3") == 0
    out = tmp_path / "out"
    assert len(list(out.glob("sample_*"))) == 3
    assert probe_video(out / "sample_002" / "comparison.mp4").num_frames == 17
    assert result(out)["metrics"]["vae_ceiling_psnr_db"] == pytest.approx(100.0)  # the truth is what tokens decode to


# Figures


def test_only_eval_scores_tokens_beside_baselines(call: Call, tmp_path: Path) -> None:
    assert call("only_eval=true", "eval_batch_size=3", "eval_clips=null") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "spec.json"]
    found = result(out)
    metrics = found["metrics"]
    assert set(metrics) >= KEYS
    assert metrics["num_clips"] == 4
    assert metrics["nll_parallel"] is None
    assert metrics["nll_uniform"] == pytest.approx(math.log(64))
    assert metrics["nll_full_tf"] < metrics["nll_uniform"]
    assert metrics["bits_per_token"] == pytest.approx(metrics["nll_full_tf"] / math.log(2))
    assert metrics["ce_top500_logits"] == pytest.approx(metrics["nll_full_tf"], abs=1e-4)  # all 64 tokens are given
    assert metrics["top500_hit_share"] == 1
    assert 0 <= metrics["accuracy"] <= 1
    curves = found["curves"]
    assert list(curves["nll_full_tf"]["per_latent"]) == ["2"]
    assert len(curves["ce_sampled_prefix"]["per_position"]) == 6
    assert np.mean(curves["nll_full_tf"]["per_position"]) == pytest.approx(metrics["nll_full_tf"])
    first = {
        name: curves[name]["per_position"][0] for name in ("nll_full_tf", "ce_sampled_prefix", "ce_greedy_rollout")
    }
    assert list(first.values()) == pytest.approx([first["nll_full_tf"]] * 3, abs=1e-4)  # the prefix is the true one


def test_figures_depend_on_neither_batch_nor_decoding_nor_cache(call: Call, tmp_path: Path, trained: Path) -> None:
    found = []
    tokens = ["data=tokens", f"data.root={trained.parent / 'cache'}", "eval_batch_size=2"]
    for name, words in (("a", ["eval_batch_size=1"]), ("b", ["rollout=tokens_jacobi"]), ("c", tokens)):
        assert call("only_eval=true", "eval_clips=2", f"output_dir={tmp_path / name}", *words) == 0
        found.append(result(tmp_path / name)["metrics"])
    assert "psnr_raw_db" not in found[2]  # there are no pixels
    for key in ("nll_full_tf", "ce_greedy_rollout", "nll_bigram", "accuracy"):
        assert [one[key] for one in found] == pytest.approx([found[0][key]] * 3, abs=1e-4)


def test_1x_tokens_are_scored_and_handed_in(call: Call, tmp_path: Path, trained: Path) -> None:
    folder, zipped = onex_folder(trained, tmp_path / "test_v2.0"), tmp_path / "mine.zip"
    readme = "{method: m, team: t, authors: a, e-mail: e, institution: i, country: c}"
    words = ["input_type=tokens", f"input_tokens_dir={folder}", "only_eval=true", f"submission={zipped}"]
    assert call(*words, f"submission_readme={readme}") == 0
    metrics = result(tmp_path / "out")["metrics"]
    assert metrics["nll_bigram"] is not None  # fitted on the tokens that the run was trained on
    assert "psnr_raw_db" not in metrics
    with zipfile.ZipFile(zipped) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npz")]
        assert len(names) == 4
        with archive.open(names[0]) as file:
            arrays = np.load(file)
            indices, values = arrays["indices"], arrays["values"]
    assert indices.shape == values.shape == (3, 2, 3, 64)
    assert np.allclose(np.exp(values[2]).sum(-1), 1, atol=1e-3)
    assert (values[:2, ..., 0] == 0).all()  # given latents are given


# What is wrong is said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.top_p=1.5"], "rollout.top_p is 1.5; expected more than 0 and at most 1"),
        (["rollout.top_p=0"], "rollout.top_p is 0"),
        (["rollout.temperature=-1"], "rollout.temperature is -1"),
        (["rollout=memory"], "these weights were trained for rollout=tokens"),
        (["num_context_frames=1"], "a start of 1 frames was chosen, but these weights were trained to start from 9"),
        (["num_context_frames=8"], "num_context_frames is 8; expected 1 + k*8"),
        (["num_frames=9"], "nothing is left to predict"),
        (["input_type=nonsense"], "input_type is 'nonsense'"),
        (["input_type=tokens"], "Give `input_tokens_dir`"),
        (["input_type=video"], "Give `input`"),
        (["input_tokens_dir=somewhere"], "Set input_type=tokens"),
        (["submission=a.zip"], "Set only_eval=true"),
        (["only_eval=true", "eval_seeds=[0,1]"], "expected 3 different ones"),
        (["only_eval=true", "num_context_frames=0"], "expected 1 to 2"),
        (["input_type=tokens", "input_tokens_dir=nowhere"], "nowhere is no folder"),
        (["prompt=a", "input=nothing"], "these weights were trained to start from 9"),
    ],
)
def test_one_message_says_what_to_change(
    words: list[str], message: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("error: ") == 1


def test_an_image_is_refused_by_weights_that_never_saw_one(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "a.png", np.zeros((16, 24, 3), np.uint8))
    assert call("input_type=image", f"input={tmp_path / 'a.png'}") == 2
    assert "trained to start from 9 frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda tokens: tokens + 60, 1, "0 to 63"),
        (lambda tokens: np.concatenate([tokens, tokens]).tobytes()[:-4], 1, "test_v2.0"),
    ],
)
def test_damaged_1x_folders_are_one_message(
    spoil: Any, code: int, message: str, call: Call, tmp_path: Path, trained: Path, capsys: Any
) -> None:
    folder = onex_folder(trained, tmp_path / "test_v2.0")
    file = folder / "video_0.bin"
    spoiled = spoil(np.fromfile(file, np.int32))
    file.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.astype(np.int32).tobytes())
    assert call("input_type=tokens", f"input_tokens_dir={folder}") == code
    written = capsys.readouterr().err
    assert message in written
    assert written.count("error: ") == 1


def test_a_missing_segment_file_is_named(call: Call, tmp_path: Path, trained: Path, capsys: Any) -> None:
    folder = onex_folder(trained, tmp_path / "test_v2.0")
    (folder / "segment_idx_0.bin").unlink()
    assert call("input_type=tokens", f"input_tokens_dir={folder}", "only_eval=true") in (1, 2)
    assert "segment_idx_0.bin" in capsys.readouterr().err


def test_data_of_another_vocabulary_is_refused_before_training(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["experiment=ar_tokens", "encoder/video=none", "video=tiny", "network=tiny_tokens", "network.actions=null"]
    words += ["video.width=24", "video.num_frames=17", "data=tokens", f"data.root={trained.parent / 'cache'}"]
    words += ["network.vocab_size=65", "data.action_dim=null", f"run.root={tmp_path}", "run.id=b", "trainer=cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", str(EXTRA_CONF), *words, "trainer.precision=32-true"])
    assert run(train.main, "train") == 2
    written = capsys.readouterr().err
    assert "built for 65 tokens in the vocabulary" in written
    assert "has 64" in written
