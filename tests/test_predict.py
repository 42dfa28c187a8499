"""`train.py` and then `predict.py` from the command line, on clips of moving squares in real shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image

import predict
import train
from datamodules.writing.build import WriterSettings, build_dataset
from launcher import ranks
from launcher.entry import run
from launcher.stored import use_stored
from longtake.media.read import probe_video, read_video
from longtake.media.write import save_image
from longtake.pretrained.weights_file import read_header, read_tensors, write_weights
from tests.configs import EXTRA_CONF, TINY
from tests.datamodules.synthetic import Squares

Call = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a short run on squares: 4 training clips, 2 for validation, 2 in the split `long`."""
    folder = tmp_path_factory.mktemp("predict")
    source = Squares(num_tasks=4, per_task=2, num_frames=37, splits=("train", "train", "val", "long"))
    settings = WriterSettings(task_timeout_s=60)
    build_dataset(source, folder / "set", request={"a": 1}, settings=settings, num_workers=1, progress=False)
    words = [
        *TINY,
        "trainer=cpu",
        "data=video",
        f"data.root={folder / 'set'}",
        "data.action_dim=2",
        "data.num_workers=0",
    ]
    words += [
        "data.batch_size=2",
        "data.video_reader=pyav",
        "video.width=24",
        f"run.root={folder}",
        "run.id=a",
        "trainer.max_steps=4",
    ]
    patch = pytest.MonkeyPatch()
    for name in (ranks.RUN_ID, ranks.RUN_PLAN):
        patch.setenv(name, "")
        patch.delenv(name)
    patch.setattr(sys, "argv", ["train.py", "--config-dir", str(EXTRA_CONF), *words, "trainer.val_check_interval=4"])
    assert run(train.main, "train") == 0
    patch.undo()
    return folder / "a"


@pytest.fixture
def call(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs predict.py on that run in this process, into `tmp_path`/out, and returns its exit code."""

    def call(*words: str, ckpt: Path | None = None) -> int:
        given = {word.partition("=")[0] for word in words}
        base = {"ckpt": str(ckpt or trained), "trust": "[tests]", "output_dir": str(tmp_path / "out"), "num_clips": "2"}
        more = [f"{key}={value}" for key, value in base.items() if key not in given]
        monkeypatch.setattr(sys, "argv", ["predict.py", *more, *words])
        return run(predict.main, "predict", use_stored)

    return call


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_held_out_clips_are_continued_and_measured(call: Call, tmp_path: Path) -> None:
    assert call("num_frames=30") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "sample_000", "sample_001", "spec.json"]
    info = probe_video(out / "sample_000" / "output.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (30, 16, 24, 10)
    assert Image.open(out / "sample_000" / "output.png").size[0] > 200
    found = result(out)
    assert set(found) == {"metrics", "per_chunk", "provenance"}
    wanted = {"psnr_db", "ssim", "copy_last_psnr_db", "copy_last_ssim", "vae_ceiling_psnr_db", "vae_ceiling_ssim"}
    assert wanted <= set(found["metrics"])
    assert found["metrics"]["num_videos"] == 2
    assert found["per_chunk"]["chunk"] == [1, 2]  # chunk 0 was given
    assert all(len(found["per_chunk"][name]) == 2 for name in wanted)
    assert found["metrics"]["psnr_db"] == pytest.approx(np.mean(found["per_chunk"]["psnr_db"]))
    assert found["provenance"]["step"] == 4
    spec = json.loads((out / "spec.json").read_text())
    assert spec["config"]["num_frames"] == 30
    assert spec["weights"]["trained_for"]["chunk_lat"] == 3
    assert set(result(out / "sample_000")) == {"metrics", "per_chunk"}
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".partial")]


def test_weights_of_chunks_can_slide_too(call: Call, tmp_path: Path) -> None:
    """Given are the 5 frames that a first chunk was trained to begin with, not the 9 of a whole one."""
    words = ["rollout=sliding_window", "rollout.num_steps=2", "rollout.guidance=1", "num_frames=26", "num_clips=1"]
    assert call(*words, "rollout.chunk_overlap=5") == 0
    out = tmp_path / "out"
    assert probe_video(out / "sample_000" / "output.mp4").num_frames == 26
    found = result(out)
    assert found["per_chunk"]["chunk"] == [0, 1, 2, 3, 4, 5]
    assert {"psnr_db", "vae_ceiling_psnr_db", "copy_last_psnr_db"} <= set(found["metrics"])


def test_figures_are_those_of_the_files(call: Call, tmp_path: Path, trained: Path) -> None:
    """What is given is the true start, and the copy of its last frame has the PSNR that one computes by hand."""
    assert call("num_frames=21", "num_clips=1") == 0
    from datamodules.held_out import held_out_clips
    from datamodules.video import VideoDataModule

    data = VideoDataModule(root=trained.parent / "set", num_frames=21, video_reader="pyav")
    (clip,) = held_out_clips(data, 21, 1)
    made = read_video(tmp_path / "out" / "sample_000" / "output.mp4")
    assert np.abs(made[:9].astype(int) - clip.frames[0, :9]).mean() < 6  # the file is compressed
    copied = clip.frames[0, 8:9].astype(float) / 255
    error = ((clip.frames[0, 9:21].astype(float) / 255 - copied) ** 2).mean()
    assert result(tmp_path / "out")["metrics"]["copy_last_psnr_db"] == pytest.approx(-10 * np.log10(error), abs=1e-3)


def test_only_eval_writes_figures_and_no_video(call: Call, tmp_path: Path) -> None:
    assert call("num_frames=21", "only_eval=true") == 0
    assert not list((tmp_path / "out").rglob("*.mp4"))
    assert "psnr_db" in result(tmp_path / "out")["metrics"]


def test_stored_settings_change_one_by_one_and_groups_replace_them(call: Call, tmp_path: Path) -> None:
    assert call("num_frames=21", "num_clips=1", "rollout.num_steps=4") == 0
    config = json.loads((tmp_path / "out" / "spec.json").read_text())["config"]
    assert config["rollout"]["num_steps"] == 4
    assert config["rollout"]["guidance"] == 1  # as trained
    assert config["data"]["root"].endswith("/set")
    words = [
        "num_frames=21",
        "num_clips=1",
        "rollout=memory",
        "rollout.guidance=1",
        "rollout.num_steps=2",
        "solver=unipc",
    ]
    assert call(*words, f"output_dir={tmp_path / 'two'}") == 0
    config = json.loads((tmp_path / "two" / "spec.json").read_text())["config"]
    assert config["rollout"]["unconditional"] == ["text"]
    assert config["solver"]["_target_"].endswith("UniPC")


def test_a_setting_that_came_after_the_weights_can_be_given(call: Call, trained: Path, tmp_path: Path) -> None:
    header = read_header(trained / "weights.safetensors")
    for name in ("guidance_interval", "context_noise"):
        del header["rollout"][name]
    older = tmp_path / "older.safetensors"
    write_weights(older, read_tensors(trained / "weights.safetensors"), header)
    words = ["data=video", f"data.root={trained.parent / 'set'}", "num_frames=21", "num_clips=1"]
    more = ["data.video_reader=pyav", "rollout.guidance=2", "rollout.unconditional=[actions]"]
    assert call(*words, *more, "rollout.guidance_interval=[0.5,1.0]", ckpt=older) == 0
    rollout = json.loads((tmp_path / "out" / "spec.json").read_text())["config"]["rollout"]
    assert rollout["guidance_interval"] == [0.5, 1.0]
    assert rollout["context_noise"] == 0  # not in the file either: what it is without it


def test_the_same_seed_makes_the_same_video(call: Call, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("num_frames=21", "num_clips=1", f"seed={seed}", f"output_dir={tmp_path / name}") == 0
    first, again, other = (read_video(tmp_path / name / "sample_000" / "output.mp4") for name in "abc")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_image_and_actions_of_a_mode(call: Call, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", np.full((32, 48, 3), 90, np.uint8))
    words = [f"input={tmp_path / 'a.png'}", "num_frames=13", "actions=random", "num_samples=2", "fps=5"]
    assert call(*words) == 0
    assert len(list((tmp_path / "out").glob("sample_*"))) == 2
    info = probe_video(tmp_path / "out" / "sample_001" / "output.mp4")
    assert (info.num_frames, info.fps) == (13, 5)
    assert "psnr_db" not in result(tmp_path / "out")["metrics"]


def test_weights_without_their_run_need_an_input(call: Call, tmp_path: Path, trained: Path, capsys: Any) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((trained / "weights.safetensors").read_bytes())
    assert call("num_frames=9", "input=nothing", ckpt=alone) == 0
    assert call("num_frames=30", f"output_dir={tmp_path / 'two'}", ckpt=alone) == 2
    assert "data.root" in capsys.readouterr().err
    words = ["data=video", f"data.root={trained.parent / 'set'}", "data.video_reader=pyav", "num_frames=21"]
    assert call(*words, f"output_dir={tmp_path / 'two'}", ckpt=alone) == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["num_frames=-5"], "num_frames is -5"),
        (["num_frames=9"], "nothing is left to predict"),
        (["num_context_frames=4", "num_frames=30"], "num_context_frames"),
        (
            ["rollout=one_shot", "rollout.num_steps=2"],
            "rollout=one_shot was chosen, but these weights were trained for",
        ),
        (["rollout.num_steps=0"], "rollout.num_steps is 0"),
        (["rollout.guidance=3", "rollout.unconditional=[text]"], "rollout.guidance"),
        (["prompt=hello"], "trained without text"),
        (["prompts_file=/nowhere.txt"], "prompts_file /nowhere.txt cannot be read"),
        (["actions=up", "num_frames=30"], "unknown mode of actions 'up'"),
        (["ckpt=/nowhere"], "no weights at /nowhere"),
        (["trust=[]"], "tests.block_code.BlockCode"),
        (["num_clip=3"], "nearest: num_clips"),
        (["rollout.steps=3"], "rollout.num_steps"),
        (["device=tpu"], "device is 'tpu'"),
        (["split=nope", "num_frames=30"], "split"),
        (["rollout=memry"], "unknown rollout 'memry'"),
        (["solver=eulr", "rollout.num_steps=2"], "unknown solver 'eulr'"),
        (["negative_prompt=5"], "negative_prompt is 5"),
        (["actions=[1,2]"], "actions is [1, 2]"),
        (["trust=tests"], "trust is 'tests'"),
        (["num_frames=99999999999999999999"], "expected at most"),
        (["num_frames=5"], "num_frames is 5, and 9 frames are given"),
        (["input_type=image", "input=a.mp4"], "input_type is image"),
        (["only_eval=true", "submission=a.zip"], "score no tokens"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    call: Call, words: list[str], reason: str, capsys: Any, tmp_path: Path
) -> None:
    assert call(*words) == 2
    written = capsys.readouterr().err
    assert written.count("error: ") == 1
    assert reason in written
    assert not (tmp_path / "out").exists()  # nothing is left behind, not even an empty folder


def test_an_empty_file_of_prompts_is_refused(call: Call, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.txt").write_text("\n  \n")
    assert call(f"prompts_file={tmp_path / 'p.txt'}") == 2
    assert "is empty" in capsys.readouterr().err


def test_without_ckpt_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", "num_frames=9"])
    assert run(predict.main, "predict", use_stored) == 2
    assert "`ckpt` must be given" in capsys.readouterr().err


def test_an_existing_prediction_is_not_overwritten(call: Call, capsys: Any) -> None:
    assert call("input=nothing", "num_frames=9") == 0
    assert call("input=nothing", "num_frames=9") == 2
    assert "holds a prediction already" in capsys.readouterr().err


def test_files_of_a_prediction_that_was_broken_off_are_not_overwritten(call: Call, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out" / "sample_000").mkdir(parents=True)
    (tmp_path / "out" / "sample_000" / "output.mp4").write_bytes(b"mine")
    assert call("input=nothing", "num_frames=9") == 2
    assert "sample_000/output.mp4" in capsys.readouterr().err
    assert (tmp_path / "out" / "sample_000" / "output.mp4").read_bytes() == b"mine"


def test_weights_that_answer_with_nan_make_no_video(call: Call, trained: Path, tmp_path: Path, capsys: Any) -> None:
    file = trained / "weights.safetensors"
    tensors = {name: torch.full_like(value, torch.nan) for name, value in read_tensors(file).items()}
    write_weights(tmp_path / "nan.safetensors", tensors, read_header(file))
    assert call("input=nothing", "num_frames=9", ckpt=tmp_path / "nan.safetensors") == 1
    assert "not finite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_full_disk_leaves_no_half_file(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from longtake.media import write

    def full(self: Any, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write._File, "write", full)
    assert call("input=nothing", "num_frames=9") == 1
    written = capsys.readouterr().err
    assert "No space left on device" in written
    assert written.count("error: ") == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_out_of_memory_names_what_to_lower(call: Call, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from longtake.generate import VideoModel

    def fail(self: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(VideoModel, "generate", fail)
    assert call("input=nothing", "num_frames=9") == 1
    written = capsys.readouterr().err
    assert "out of memory" in written
    assert "num_samples" in written


def test_help_lists_the_keys(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", "--help"])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # --help is Hydra's own run, which leaves its state behind
    assert run(predict.main, "predict", use_stored) == 0
    assert "num_context_frames" in capsys.readouterr().out


def test_the_first_chunk_is_measured_on_held_out_clips(trained: Path, tmp_path: Path, capsys: Any) -> None:
    from benchmarks.first_chunk import run as measure

    words = [
        "--ckpt",
        str(trained),
        "--trust",
        "tests",
        "--clips",
        "4",
        "--samples",
        "2",
        "--output",
        str(tmp_path / "a.json"),
    ]
    assert measure(words) == 0
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "a.json").read_text())["figures"]["table"]
    assert table["psnr, one sample"]["num_clips"] == 2  # one window of 21 frames in each of 2 clips of 37
    assert {
        "one sample - copy",
        "mean of samples - blurred copy",
        "true - shuffled actions",
        "true - absent actions",
    } <= set(table)
    assert all(row["low"] <= row["mean"] <= row["high"] for row in table.values())
    assert "psnr, ceiling of the first stage" in printed


def test_seams_and_drift_are_measured_from_one_start(trained: Path, tmp_path: Path, capsys: Any) -> None:
    from benchmarks.seams import run as measure

    words = ["--ckpt", str(trained), "--trust", "tests", "--clips", "2", "--frames", "35", "--split", "val"]
    assert measure([*words, "--output", str(tmp_path / "a.json")]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    rows = figures["rows"]
    assert len(rows) == 2 * 2 * 2 + 2 + 2
    starts = {round(row["psnr_first_chunk_db"]["mean"], 3) for name, row in rows.items() if "sliding" in name}
    assert len(starts) == 1  # hand-off, overlap and context noise begin with the second chunk
    assert rows["memory, clean"]["psnr_first_chunk_db"]["mean"] == pytest.approx(starts.pop(), abs=0.05)
    assert rows["truth of another clip"]["sharpness_ratio"]["last_81_frames"]["mean"] == pytest.approx(1, abs=1e-6)
    lengths = {name: len(row["colour_distance"]["per_chunk"]) for name, row in rows.items()}
    assert lengths["sliding, uint8, overlap 1, clean"] == 5  # 9 frames, then 8 each, the last 2 of 35
    assert lengths["memory, noise 0.1"] == 4
    assert set(figures["effects"]) >= {"uint8 - float", "overlap 5 - 1", "noise 0.1 - clean"}
    assert "first stage alone" in capsys.readouterr().out
