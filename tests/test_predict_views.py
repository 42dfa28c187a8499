"""`predict.py` on weights of seven views: held-out clips under their control, folders of views, edges, masks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import predict
from datamodules.writing.build import WriterSettings, build_dataset
from launcher.entry import run
from launcher.stored import use_stored
from longtake.media.edges import edge_video
from longtake.media.read import probe_video, read_video
from longtake.media.write import encode_video
from tests.datamodules.synthetic import Squares
from tests.launcher.spec_examples import VIEWS
from tests.tiny_views import write_views

Call = Callable[..., int]
WIDTH = 24  # of the squares


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a set of seven views with depth as control: 3 clips of 30 frames each in `val` and in `long`."""
    folder = tmp_path_factory.mktemp("views")
    source = Squares(num_tasks=3, per_task=3, num_frames=30, views=VIEWS, control=("depth",))
    source.splits = ("train", "val", "long")
    settings = WriterSettings(task_timeout_s=60)
    build_dataset(source, folder / "set", request={"a": 1}, settings=settings, num_workers=1, progress=False)
    return folder / "set"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns weights by what control they know."""
    folder = tmp_path_factory.mktemp("weights")
    kinds = {"depth": ("depth",), "edge": ("edge",), "both": ("depth", "edge"), "none": ()}
    return {name: write_views(folder / f"{name}.safetensors", control=own, width=WIDTH) for name, own in kinds.items()}


@pytest.fixture
def call(weights: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs predict.py in this process into `tmp_path`/<out> and returns its exit code."""

    def call(*words: str, ckpt: str = "depth", out: str = "out") -> int:
        base = [f"ckpt={weights[ckpt]}", "trust=[tests]", f"output_dir={tmp_path / out}", "rollout.num_steps=1"]
        held_out = ["data=video", f"data.root={root}", "data.video_reader=pyav"]
        slides = ["rollout=sliding_window", "rollout.guidance=1"]
        more = [] if any(word.startswith(("spec=", "input=")) for word in words) else held_out
        monkeypatch.setattr(sys, "argv", ["predict.py", *base, *more, *slides, *words])
        return run(predict.main, "predict", use_stored)

    return call


def made(folder: Path, name: str = "output.mp4") -> np.ndarray:
    return read_video(folder / name)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# Held-out clips


def test_held_out_clips_are_continued_under_their_control(call: Call, root: Path, tmp_path: Path) -> None:
    assert call("num_frames=26", "num_clips=2", "num_conditional_frames=1") == 0
    out = tmp_path / "out"
    folder = out / "sample_001"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    grids = {"output_grid.mp4", "output_with_control_grid.mp4", "comparison.mp4"}
    views = {f"views/{name}.mp4" for name in VIEWS}
    assert files == {"output.mp4", "output.png", "metrics.json", "spec.json", *grids, *views}
    assert probe_video(folder / "output.mp4").num_frames == 26
    found = result(out)
    per_view = {f"psnr_db@{name}" for name in VIEWS}
    assert per_view | {"psnr_db", "copy_last_psnr_db", "vae_ceiling_psnr_db"} <= set(found["metrics"])
    assert found["per_chunk"]["chunk"] == [0, 1, 2, 3]
    assert len(result(folder)["per_chunk"]["resident_mib"]) == 4
    mean = np.mean([found["metrics"][name] for name in per_view])
    assert found["metrics"]["psnr_db"] == pytest.approx(mean, abs=1e-6)
    spec = json.loads((folder / "spec.json").read_text())
    assert (spec["num_conditional_frames"]["rear"], spec["control_of"]) == (1, spec["clip"])


def test_what_held_out_clips_show_is_the_truth(call: Call, root: Path, tmp_path: Path) -> None:
    """The given frames are the clip's own, and the copy of the last of them has the PSNR that one computes by hand."""
    from datamodules.held_out import held_out_clips
    from datamodules.video import VideoDataModule

    assert call("num_frames=13", "num_clips=1", "num_conditional_frames=5") == 0
    (clip,) = held_out_clips(VideoDataModule(root=root, num_frames=9, video_reader="pyav"), 13, 1)
    folder = tmp_path / "out" / "sample_000"
    rear = made(folder, "views/rear.mp4")
    assert np.abs(rear[:5].astype(int) - clip.frames[VIEWS.index("rear"), :5]).mean() < 6
    error = ((clip.frames[:, 5:13] / 255.0 - clip.frames[:, 4:5] / 255.0) ** 2).reshape(7, 2, -1)
    by_chunk = [error[:, :1], error[:, 1:]]  # frames 5..8 and 9..12
    psnrs = [float(np.mean(-10 * np.log10(part.mean(axis=(1, 2))))) for part in by_chunk]
    assert result(folder)["per_chunk"]["copy_last_psnr_db"] == pytest.approx(psnrs, abs=1e-3)


def test_the_control_may_be_that_of_another_clip_or_of_none(call: Call, tmp_path: Path) -> None:
    words = ["num_frames=17", "num_clips=2", "num_conditional_frames=0"]
    for source in ("own", "other", "none"):
        assert call(*words, f"control_from={source}", out=source) == 0
    first = {source: made(tmp_path / source / "sample_000") for source in ("own", "other", "none")}
    assert not np.array_equal(first["own"], first["other"])
    assert not np.array_equal(first["own"], first["none"])
    shown = [made(tmp_path / source / "sample_000", "output_with_control_grid.mp4") for source in ("own", "other")]
    half = shown[0].shape[1] // 2
    assert np.abs(shown[0][:, :half].astype(int) - shown[1][:, :half]).mean() > 1
    assert not (tmp_path / "none" / "sample_000" / "output_with_control_grid.mp4").exists()
    spec = json.loads((tmp_path / "other" / "sample_000" / "spec.json").read_text())
    assert spec["control_of"] not in (None, spec["clip"])
    assert call(*words, "control_weight=0", out="zero") == 0
    assert np.array_equal(made(tmp_path / "zero" / "sample_000"), first["none"])


def test_views_can_be_fewer_and_lengths_are_checked(call: Call, tmp_path: Path, capsys: Any) -> None:
    assert call("num_frames=9", "num_clips=1", "n_views=2", "num_conditional_frames={cross_right: 0}") == 0
    folder = tmp_path / "out" / "sample_000"
    assert {path.stem for path in (folder / "views").iterdir()} == set(VIEWS[:2])
    spec = json.loads((folder / "spec.json").read_text())
    assert spec["num_conditional_frames"] == {"front_wide": 1, "cross_right": 0}
    for words, reason in (
        (["num_frames=31"], "num_frames is 31, but held-out clip .* has 30 frames"),
        (["control_from=other", "num_clips=1"], "control_from is other, and there is 1 held-out clip"),
        (["n_views=8"], "n_views is 8; expected at most 7"),
        (["num_conditional_frames=3"], "num_conditional_frames is 3"),
        (["num_conditional_frames={rare: 1}"], "unknown view 'rare'.*rear"),
        (["control_weight={dept: 1}"], "unknown control type 'dept'.*depth"),
        (["actions=interactive"], "`actions`"),
        (["control_from=mine"], "control_from is 'mine'"),
        (["num_context_frames=1", "num_conditional_frames=1"], "num_context_frames and num_conditional_frames"),
    ):
        assert call(*words, out=f"bad{len(reason)}") == 2, words
        written = capsys.readouterr().err
        assert written.count("error: ") == 1
        assert re.search(reason, written.replace("\n", " ")), written


def test_edges_are_extracted_where_the_set_has_none(call: Call, tmp_path: Path) -> None:
    assert call("num_frames=9", "num_clips=1", ckpt="edge") == 0
    grid = made(tmp_path / "out" / "sample_000", "output_with_control_grid.mp4")
    panel = grid[4, : grid.shape[1] // 2]
    assert (panel > 200).mean() > 0.005  # white lines
    assert call("num_frames=9", "num_clips=1", "control_from=none", ckpt="edge", out="none") == 0
    assert not np.array_equal(made(tmp_path / "out" / "sample_000"), made(tmp_path / "none" / "sample_000"))


def test_the_benchmark_compares_whose_control_it_is(
    weights: dict[str, Path], root: Path, tmp_path: Path, capsys: Any
) -> None:
    from benchmarks.control import run as measure

    words = ["--ckpt", str(weights["depth"]), "--trust", "tests", "--clips", "2", "--frames", "17", "--given", "0"]
    words += ["--splits", "val", "long", "--output", str(tmp_path / "a.json"), "--set", "data=video"]
    words += [f"data.root={root}", "data.video_reader=pyav", "rollout=sliding_window", "rollout.guidance=1"]
    assert measure([*words, "rollout.num_steps=1"]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    clips, table = figures["clips"], figures["table"]
    assert {len(clips[source]) for source in ("own", "other", "none")} == {4}
    differences = [clips["own"][name]["psnr_db"] - clips["none"][name]["psnr_db"] for name in clips["own"]]
    assert table["own - none"]["mean"] == pytest.approx(np.mean(differences))
    assert {"own - another clip's, last window", "own - none, rear", "psnr, no control"} <= set(table)
    assert "another clip's" in capsys.readouterr().out


# Folders and nothing


def moving(count: int, seed: int) -> bytes:
    frames = np.full((count, 16, WIDTH, 3), 40 + 20 * seed, np.uint8)
    for index in range(count):
        at = (index + seed) % 12
        frames[index, at : at + 4, 3:9] = (250, 30 * seed % 250, 10)
    return encode_video(frames, fps=Fraction(10))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder of two views of 20 frames."""
    (tmp_path / "clips").mkdir()
    for seed, name in enumerate(("rear", "front_wide")):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(moving(20, seed))
    return tmp_path / "clips"


def test_a_folder_of_views_is_continued(call: Call, folder: Path, tmp_path: Path) -> None:
    assert call(f"input={folder}", "num_frames=14", "num_conditional_frames=5", "prompt=a night drive") == 0
    views = tmp_path / "out" / "clips" / "views"
    assert {path.stem for path in views.iterdir()} == {"front_wide", "rear"}
    last = read_video(folder / "rear.mp4")[-5:]
    assert np.abs(read_video(views / "rear.mp4")[:5].astype(int) - last).mean() < 4


def test_a_folder_may_hold_control(call: Call, folder: Path, tmp_path: Path) -> None:
    (folder / "depth").mkdir()
    for seed, name in enumerate(("rear", "front_wide")):
        (folder / "depth" / f"{name}.mp4").write_bytes(moving(20, seed + 3))
    assert call(f"input={folder}") == 0
    out = tmp_path / "out" / "clips"
    assert probe_video(out / "output_with_control_grid.mp4").num_frames == 20  # as long as the control
    first = read_video(folder / "rear.mp4")[:1]  # both begin at the same frame
    assert np.abs(read_video(out / "views" / "rear.mp4")[:1].astype(int) - first).mean() < 4


@pytest.mark.parametrize(
    ("name", "frames", "reason"),
    [
        ("cross_left", 7, "has 7 frames and front_wide.input_path has 20; expected views of one length"),
        ("font_wide", 20, "unknown view .*'font_wide'.*front_wide"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_message(
    call: Call, folder: Path, name: str, frames: int, reason: str, capsys: Any
) -> None:
    (folder / f"{name}.mp4").write_bytes(moving(frames, 1))
    assert call(f"input={folder}") == 2
    written = capsys.readouterr().err
    assert written.count("error: ") == 1
    assert re.search(reason, written.replace("\n", " ")), written


def test_a_world_from_a_text_alone(call: Call, tmp_path: Path) -> None:
    assert call("input=nothing", "n_views=3", "prompt=rain", "num_frames=9") == 0
    assert len(list((tmp_path / "out" / "nothing" / "views").iterdir())) == 3


# Specs: edges, masks, several types


def spec(folder: Path, **more: Any) -> str:
    content = {"fps": 10, "num_conditional_frames": 0, "enable_autoregressive": True, "num_chunks": 2, **more}
    (folder / "spec.json").write_text(json.dumps(content))
    return f"spec={folder / 'spec.json'}"


def test_edges_of_a_spec_are_those_of_its_input(call: Call, folder: Path, tmp_path: Path) -> None:
    views = {"front_wide": {"input_path": "front_wide.mp4"}}
    assert call(spec(folder, name="own", **views), ckpt="edge", out="a") == 0
    frames = edge_video(read_video(folder / "front_wide.mp4"))
    (folder / "edges.mkv").write_bytes(b"")
    (folder / "edges.mp4").write_bytes(encode_video(frames, fps=Fraction(10)))
    given = {"front_wide": {"control_path": "edges.mp4"}}
    assert call(spec(folder, name="own", **given), ckpt="edge", out="b") == 0
    found, wanted = (made(tmp_path / out / "own") for out in ("a", "b"))
    assert np.abs(found.astype(int) - wanted).mean() < 3  # the file is compressed
    for preset, out in (("none", "c"), ("very_high", "d")):
        assert call(spec(folder, name="own", preset_edge_threshold=preset, **views), ckpt="edge", out=out) == 0
    has_grid = [(tmp_path / out / "own" / "output_with_control_grid.mp4").exists() for out in "acd"]
    assert has_grid == [True, False, True]
    resolved = json.loads((tmp_path / "a" / "own" / "spec.json").read_text())["spec"]["front_wide"]
    assert resolved["control_path"] == {"edge": None}


def test_several_types_have_weights_of_their_own(call: Call, folder: Path, tmp_path: Path) -> None:
    both = {"front_wide": {"input_path": "front_wide.mp4", "control_path": {"depth": "rear.mp4", "edge": None}}}
    variants: dict[str, Any] = {
        "all": 1,
        "depth": {"edge": 0},
        "edge": {"depth": 0},
        "half": {"depth": 0.5, "edge": 0.5},
        "none": 0,
    }
    for name, weight in variants.items():
        assert call(spec(folder, name=name, control_weight=weight, **both), ckpt="both", out=name) == 0
    videos = {name: made(tmp_path / name / name) for name in variants}
    names = list(variants)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            equal = np.array_equal(videos[name], videos[other])
            assert equal == ({name, other} == {"all", "half"}), (name, other)  # weights above a sum of 1 are capped
    words = spec(folder, name="line", control_weight=1, **both)
    assert call(words, "control_weight={edge: 0}", ckpt="both", out="line") == 0
    assert np.array_equal(made(tmp_path / "line" / "line"), videos["depth"])


def test_a_mask_says_where_control_counts(call: Call, folder: Path, tmp_path: Path) -> None:
    for name, value in (("black", 0), ("white", 255)):
        frames = np.full((1, 16, WIDTH, 3), value, np.uint8)
        (folder / f"{name}.mov").write_bytes(encode_video(frames, fps=Fraction(10)))
    (folder / "half").mkdir()
    half = np.zeros((1, 16, WIDTH, 3), np.uint8)
    half[:, :, WIDTH // 2 :] = 255
    (folder / "half" / "half.mp4").write_bytes(encode_video(half, fps=Fraction(10)))
    videos = {}
    for name, view in {
        "plain": {},
        "white": {"mask_path": "white.mov"},
        "black": {"mask_path": {"depth": "black.mov"}},
        "half": {"mask_path": "half/half.mp4"},
        "none": {},
    }.items():
        views = {"rear": {"control_path": "rear.mp4", **view}}
        weight = 0 if name == "none" else 1
        assert call(spec(folder, name=name, control_weight=weight, **views), out=name) == 0
        videos[name] = made(tmp_path / name / name).astype(int)
    assert np.array_equal(videos["plain"], videos["white"])
    assert np.abs(videos["none"] - videos["black"]).mean() < 0.5
    assert np.abs(videos["half"] - videos["none"]).mean() > 1
    assert np.abs(videos["half"] - videos["plain"]).mean() > 1


def test_any_value_of_a_spec_can_be_set_on_the_command_line(
    call: Call, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    words = spec(folder, name="a", rear={"control_path": "rear.mp4"})
    assert call(words, "spec_set={minimum_start_index: 9, save_view_grid: false}") == 0
    assert made(tmp_path / "out" / "a").shape[0] == 9  # 11 frames are left: one chunk of the two that were wanted
    assert not (tmp_path / "out" / "a" / "output_with_control_grid.mp4").exists()
    assert call(words, "spec_set=5", out="three") == 2
    assert "spec_set is 5; expected keys of specs" in capsys.readouterr().err
    assert call(words, "spec_set={minimum_start_indx: 9}", out="two") == 2
    assert "unknown key `minimum_start_indx`; nearest: minimum_start_index" in capsys.readouterr().err
