"""`predict.py spec=...` from the command line: specs of Cosmos-Transfer2.5 on a tiny model of seven views."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import predict
from launcher.entry import run
from launcher.stored import use_stored
from longtake.media.read import probe_video, read_video
from longtake.media.write import encode_video
from longtake.networks.conditioning import TextEmbedding
from tests.launcher.spec_examples import EXAMPLES, VIEWS, changed, write
from tests.tiny_views import write_views

FRAMES = 26  # at 10 frames a second: three chunks of 9 with one frame of overlap, and one frame more
Call = Callable[..., int]


def moving(count: int, seed: int, fps: int = 10) -> bytes:
    """Returns a video of a square that goes its way, 16x16."""
    frames = np.full((count, 16, 16, 3), 40 + 20 * seed, np.uint8)
    for index in range(count):
        at = (index + seed) % 12
        frames[index, at : at + 4, 3:9] = (250, 30 * seed % 250, 10)
    return encode_video(frames, fps=Fraction(fps))


def video(path: Path) -> None:
    path.write_bytes(moving(FRAMES, sum(map(ord, path.stem)) % 7))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_views(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the videos that specs name."""
    folder = tmp_path_factory.mktemp("specs")
    write(folder, EXAMPLES["transfer25"], video=video)
    (folder / "controls" / "short.mp4").write_bytes(moving(10, 1))
    (folder / "controls" / "fast.mp4").write_bytes(moving(FRAMES, 1, fps=25))
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return folder


@pytest.fixture
def call(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs predict.py in this process into `tmp_path`/out and returns its exit code."""

    def call(spec: Path, *words: str, ckpt: Path | None = None) -> int:
        base = {"trust": "[tests]", "output_dir": str(tmp_path / "out"), "rollout.num_steps": "1"}
        given = {word.partition("=")[0] for word in words}
        more = [f"{key}={value}" for key, value in base.items() if key not in given]
        argv = [
            "predict.py",
            f"ckpt={ckpt or weights}",
            f"spec={spec}",
            *more,
            *(word for word in words if word[-1:] != "="),
        ]
        monkeypatch.setattr(sys, "argv", argv)
        return run(predict.main, "predict", use_stored)

    return call


def two_views(**more: Any) -> dict[str, Any]:
    content = {key: value for key, value in EXAMPLES["transfer25_autoregressive"].items() if key not in VIEWS[2:]}
    return {**content, **more}


def resolved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "spec.json").read_text())


def test_seven_views_under_control(call: Call, specs: Path, tmp_path: Path) -> None:
    assert call(write(specs, EXAMPLES["transfer25_autoregressive"])) == 0
    folder = tmp_path / "out" / "auto_multiview_autoregressive"
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    grids = {"output_grid.mp4", "output_with_control_grid.mp4"}
    assert made == {"output.mp4", "output.png", "metrics.json", "spec.json", *grids} | {
        f"views/{name}.mp4" for name in VIEWS
    }
    side = probe_video(folder / "output.mp4")
    assert (side.num_frames, side.fps, side.height, side.width) == (25, 10, 16, 7 * 16 + 6 * 4)
    front, first = (
        read_video(path) for path in (folder / "views/front_wide.mp4", specs / "input_videos/front_wide.mp4")
    )
    assert front.shape == (25, 16, 16, 3)
    assert np.abs(front[0].astype(int) - first[0]).mean() < 3  # the frame that was given, through a file
    assert np.abs(front[1].astype(int) - first[1]).mean() > 3
    grid, both = (probe_video(folder / name) for name in sorted(grids))
    assert (both.num_frames, both.width) == (25, grid.width)
    assert both.height > 2 * grid.height
    found = resolved(folder)
    assert (found["num_frames"], found["spec"]["chunk_overlap"], found["spec"]["fps"]) == (25, 1, "10")
    assert found["spec"]["rear"]["input_path"] == str((specs / "input_videos" / "rear.mp4").resolve())
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert summary["metrics"]["num_videos"] == 1
    assert summary["per_chunk"]["chunk"] == [0, 1, 2]


def test_the_command_line_wins_over_the_spec(call: Call, specs: Path, tmp_path: Path) -> None:
    path = write(specs, two_views(seed=5, guidance=3, num_steps=35))
    words = ["seed=7", "num_chunks=2", "rollout.chunk_overlap=5", "rollout.guidance=1", "control_weight=0.5"]
    words += [
        "num_conditional_frames=5",
        "negative_prompt=blurred",
        "save_combined_views=false",
        "fps=5",
        "prompt=rain",
    ]
    assert call(path, *words) == 0
    folder = tmp_path / "out" / "auto_multiview_autoregressive"
    found = resolved(folder)
    spec = found["spec"]
    assert (spec["seed"], spec["chunk_overlap"], spec["num_steps"], spec["control_weight"]) == (7, 5, 1, 0.5)
    assert (spec["prompt"], spec["negative_prompt"], found["rollout.guidance"]) == ("rain", "blurred", 1)
    assert spec["front_wide"]["num_conditional_frames_per_view"] == 5
    assert found["num_frames"] == 13  # 9 + 4: two chunks of every second frame
    assert not (folder / "output.mp4").exists()
    assert probe_video(folder / "output_grid.mp4").fps == 5


def test_the_spec_wins_over_defaults_and_is_converted(call: Call, specs: Path, tmp_path: Path) -> None:
    path = write(specs, two_views(seed=5, guidance=3, num_steps=2, num_chunks=1))
    assert call(path, "rollout.num_steps=") == 0
    found = resolved(tmp_path / "out" / "auto_multiview_autoregressive")
    assert (found["spec"]["seed"], found["spec"]["num_steps"], found["rollout.guidance"]) == (5, 2, 4)


def made(folder: Path) -> np.ndarray:
    return read_video(folder / "output.mp4")


def test_what_is_told_changes_what_is_made(call: Call, specs: Path, tmp_path: Path) -> None:
    """Prompt, prompt of a view, later prompt, negative prompt, control and its weight, given frames."""
    base = two_views(num_chunks=2, guidance=1, num_conditional_frames=0, negative_prompt="blurred")
    for view in VIEWS[:2]:
        base[view] = {"control_path": f"controls/{view}.mp4"}
    variants: dict[str, dict[str, Any]] = {
        "base": {},
        "again": {},
        "prompt": {"prompt": "rain"},
        "later": {"prompt": ["A night drive.", "rain"]},
        "view": {"cross_right": {**base["cross_right"], "prompt": "lorry"}},
        "negative": {"negative_prompt": "rain"},
        "weight": {"control_weight": 0.0},
        "control": {"front_wide": {"control_path": "controls/rear.mp4"}},
        "given": {"front_wide": {**EXAMPLES["transfer25"]["front_wide"], "num_conditional_frames_per_view": 1}},
    }
    rows = [{**base, **change, "name": name} for name, change in variants.items()]
    assert call(write(specs, rows, "many.jsonl")) == 0
    out = tmp_path / "out"
    first = made(out / "base")
    assert np.array_equal(first, made(out / "again"))
    for name in variants:
        if name not in ("base", "again"):
            assert not np.array_equal(first, made(out / name)), name
    assert np.array_equal(first[:8], made(out / "later")[:8])  # the second text is that of the second chunk
    assert not resolved(out / "given")["spec"]["cross_right"]["num_conditional_frames_per_view"]


def test_prompts_come_from_files_too(call: Call, specs: Path, tmp_path: Path) -> None:
    (specs / "two.txt").write_text("a night drive\nit begins to rain\n")
    base = {**two_views(num_chunks=1), "name": "lines", "prompt_path": "two.txt"}
    base.pop("prompt")
    assert call(write(specs, base)) == 0
    same = two_views(num_chunks=1, name="texts", prompt="a night drive")
    same["cross_right"] = {**same["cross_right"], "prompt": "it begins to rain"}
    assert call(write(specs, same), f"output_dir={tmp_path / 'two'}") == 0
    assert np.array_equal(made(tmp_path / "out" / "lines"), made(tmp_path / "two" / "texts"))


def test_more_chunks_than_the_control_has_room_for_are_not_made(
    call: Call, specs: Path, tmp_path: Path, capsys: Any
) -> None:
    assert call(write(specs, two_views(num_chunks=9))) == 0
    assert "num_chunks is 9, and the control videos have room for 3 of them" in capsys.readouterr().err
    assert resolved(tmp_path / "out" / "auto_multiview_autoregressive")["num_frames"] == 25
    assert call(write(specs, two_views(num_chunks=9)), "num_frames=20", f"output_dir={tmp_path / 'two'}") == 0
    assert made(tmp_path / "two" / "auto_multiview_autoregressive").shape[0] == 20


def test_a_batch_goes_on_after_a_sample_that_cannot_be(call: Call, specs: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [
        two_views(num_chunks=1, name="good"),
        two_views(chunk_overlap=3, name="bad"),
        two_views(num_chunks=1, name="c"),
    ]
    path = write(specs, rows, "batch.jsonl")
    assert call(path) == 2  # found before anything is made
    assert not (tmp_path / "out" / "good").exists()
    assert call(path, "keep_going=true", f"output_dir={tmp_path / 'two'}") == 1
    assert "bad failed: rollout.chunk_overlap is 3" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == ["c", "good"]


MISTAKES: list[tuple[dict[str, Any] | None, list[str], str]] = [
    (
        None,
        ["rollout.chunk_overlap=3"],
        "rollout.chunk_overlap is 3; expected 0 or 1 + k*4 frames below the chunk of 9, for example 1 or 5",
    ),
    ({"chunk_overlap": 29}, [], "rollout.chunk_overlap is 29"),
    ({"fps": 7}, [], "fps is 7, and front_wide.input_path has 10 frames a second"),
    ({"fps": 20}, [], "fps is 20"),
    (
        {"front_wide.control_path": "controls/short.mp4"},
        [],
        "cross_right.control_path has 26 frames and front_wide.control_path has 10",
    ),
    ({"cross_right.control_path": "controls/fast.mp4"}, [], "cross_right.control_path has 25 frames a second"),
    ({"cross_right.control_path": "controls/nowhere.mp4"}, [], "cross_right.control_path is 'controls/nowhere.mp4'"),
    ({"cross_right.control_path": "broken.mp4"}, [], "`cross_right.control_path`"),
    ({"cross_right.input_path": None}, [], "num_conditional_frames of cross_right is 1, and it has no input_path"),
    ({"guidance": "strong"}, [], "guidance is 'strong'"),
    ({"num_conditional_frames": 3}, [], "num_conditional_frames is 3"),
    (None, ["num_conditional_frames=3"], "num_conditional_frames is 3"),
    ({"front_wide.control_path": {"depht": "controls/rear.mp4"}}, [], "front_wide.control_path is of type 'depht'"),
    ({"n_views": 3}, [], "n_views is 3; expected 2"),
    ({"num_video_frames_per_chunk": 93}, [], "num_video_frames_per_chunk is 93; expected 9"),
    ({"enable_autoregressive": False}, ["num_frames=20"], "enable_autoregressive is false"),
    (None, ["num_frames=27"], "num_frames is 27, but the control videos have 26 frames"),
    (None, ["rollout=one_shot"], "a spec is rolled out by sliding windows"),
    (None, ["input=nothing"], "input and spec are both given"),
    (None, ["control_weight=2"], "control_weight is 2"),
    (None, ["num_chunks=0"], "num_chunks is 0"),
    (None, ["prompt=nowhere.txt"], "prompt nowhere.txt cannot be read"),
    (None, ["prompt=embeddings.pkl"], "can run code when they are opened"),
    (None, ["num_chunk=2"], "nearest: num_chunks"),
]


@pytest.mark.parametrize(("changes", "words", "reason"), MISTAKES)
def test_mistakes_are_one_message_and_exit_code_2(
    call: Call, specs: Path, changes: dict[str, Any] | None, words: list[str], reason: str, capsys: Any
) -> None:
    content = two_views(num_chunks=1)
    for key, value in (changes or {}).items():
        view, _, last = key.rpartition(".")
        place = content if not view else content.setdefault(view, {})
        if view:
            place = content[view] = dict(place)
        place.pop(last, None)
        place.update({} if value is None else {last: value})
    assert call(write(specs, content), *words) == 2
    written = capsys.readouterr().err
    assert written.count("error: ") == 1
    assert reason in written


def test_keys_of_specs_need_one(weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", f"ckpt={weights}", "trust=[tests]", "num_chunks=2"])
    assert run(predict.main, "predict", use_stored) == 2
    assert "num_chunks is given without spec" in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "axis"), [("time", 0), ("vertical", 1), ("horizontal", 2)])
def test_one_video_may_hold_all_views(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, axis: int
) -> None:
    views = [np.full((7, 16, 16, 3), 60 * (index + 1), np.uint8) for index in range(3)]
    (tmp_path / "all.mp4").write_bytes(encode_video(np.concatenate(views, axis=axis), fps=Fraction(10)))
    (tmp_path / "captions.txt").write_text("a night drive\nrain\nlorry\n")
    argv = ["predict.py", f"ckpt={weights}", "trust=[tests]", f"output_dir={tmp_path / 'out'}", "rollout.num_steps=1"]
    argv += [f"input={tmp_path / 'all.mp4'}", "n_views=3", f"input_layout={layout}", "num_conditional_frames=5"]
    monkeypatch.setattr(sys, "argv", [*argv, f"prompt={tmp_path / 'captions.txt'}", "num_frames=14"])
    assert run(predict.main, "predict", use_stored) == 0
    for index in range(3):
        frames = read_video(tmp_path / "out" / "all" / "views" / f"{VIEWS[index]}.mp4")
        assert len(frames) == 14
        assert np.abs(frames[:5].astype(int) - 60 * (index + 1)).mean() < 4


def test_weights_without_control_or_text_say_so(call: Call, specs: Path, tmp_path: Path, capsys: Any) -> None:
    plain = write_views(tmp_path / "plain.safetensors", control=(), text=False)
    path = write(specs, two_views(num_chunks=1))
    assert call(path, ckpt=plain) == 2
    assert "front_wide.control_path is given, but these weights were trained without control" in capsys.readouterr().err
    content = changed("transfer25_autoregressive", "prompt", None)
    for view in VIEWS:
        content[view] = {"input_path": content[view]["input_path"]}
    assert call(write(specs, content), ckpt=plain) == 0
    assert not (tmp_path / "out" / content["name"] / "output_with_control_grid.mp4").exists()


def test_embeddings_are_read_as_numbers_only(specs: Path, tmp_path: Path) -> None:
    from launcher.view_inputs import read_prompt_embeddings
    from longtake.errors import ConfigError

    given, text = torch.randn(1, 7 * 4, 8), TextEmbedding(16, text_dim=8, text_len=5)
    save_file({"text": given}, tmp_path / "a.safetensors")
    torch.save(given, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        found = read_prompt_embeddings(tmp_path / name, 7, "prompt", text)
        assert torch.equal(found, given[0].unflatten(0, (7, 4)))

    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "touched").touch, ())

    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save(torch.randn(1, 27, 8), tmp_path / "odd.pt")
    torch.save({"a": given, "b": given}, tmp_path / "two.pt")
    torch.save(torch.randn(1, 28, 9), tmp_path / "wide.pt")
    torch.save(torch.randn(1, 42, 8), tmp_path / "long.pt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:50])
    for name, reason in (
        ("evil.pt", "cannot be read"),
        ("odd.pt", r"expected floating point \[1, 7\*l, d\]"),
        ("two.pt", "holds 2 entries"),
        ("wide.pt", "holds embeddings of 9 numbers a row; these weights take 8.*`prompt`"),
        ("long.pt", "holds 6 rows a view; these weights take at most 5.*`prompt`"),
        ("cut.safetensors", "cannot be read"),
        ("a.pkl", r"can run code.*torch.save\(torch.as_tensor"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_prompt_embeddings(tmp_path / name, 7, "prompt", text)
    assert not (tmp_path / "touched").exists()
    for takes, reason in ((None, "take no text"), (TextEmbedding(16, text_dim=8, vocab_size=9), "take words")):
        with pytest.raises(ConfigError, match=f"{reason}.*`prompt`"):
            read_prompt_embeddings(tmp_path / "a.pt", 7, "prompt", takes)
