"""`longtake.load(path).generate(...)` on a tiny trained model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import longtake
from longtake.errors import ConfigError
from longtake.generate import VideoModel
from longtake.loading import load_spec
from longtake.media.write import encode_video, save_image
from longtake.pretrained.weights_file import read_header, read_tensors, write_weights

TRUST = ["tests"]


@pytest.fixture(scope="module")
def model(run_folder: Path) -> VideoModel:
    return longtake.load(run_folder, trust=TRUST)


def frames(count: int, height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (count, height, width, 3), np.uint8)


# Loading


def test_a_run_folder_its_weights_and_its_checkpoint_are_the_same_model(run_folder: Path) -> None:
    videos = [
        longtake.load(path, trust=TRUST).generate(num_frames=9, seed=3).video()
        for path in (run_folder, run_folder / "weights.safetensors", run_folder / "checkpoints" / "last.ckpt")
    ]
    assert np.array_equal(videos[0], videos[1])
    assert np.array_equal(videos[0], videos[2])


def test_the_file_says_all_that_is_needed_and_names_no_place_of_the_machine(run_folder: Path) -> None:
    spec = load_spec(run_folder, TRUST)
    assert spec.video == {"fps": "10", "height": 16, "width": 16, "num_frames": 21, "chunk_lat": 3}
    assert spec.action_names == ("action_0", "action_1", "action_2")
    assert (spec.step, spec.is_average, spec.num_context_frames) == (12, True, 9)
    text = json.dumps(read_header(run_folder / "weights.safetensors"))
    assert str(run_folder.parent) not in text
    assert str(Path.home()) not in text


def test_importing_longtake_loads_neither_torch_nor_lightning_nor_hydra() -> None:
    code = "import longtake, sys; print([m for m in ('torch', 'lightning', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generating_loads_neither_lightning_nor_hydra(run_folder: Path) -> None:
    code = (
        f"import longtake, sys; longtake.load({str(run_folder)!r}, trust=['tests']).generate(num_frames=9).video(); "
        "print([m for m in ('lightning', 'hydra', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def broken(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, Path], Path]:
    """Returns what writes the weights again with another header."""

    def write(run: Path, folder: Path) -> Path:
        header = read_header(run / "weights.safetensors")
        change(header)
        write_weights(folder / "w.safetensors", read_tensors(run / "weights.safetensors"), header)
        return folder / "w.safetensors"

    return write


def _cut(run: Path, folder: Path) -> Path:
    content = (run / "weights.safetensors").read_bytes()
    (folder / "w.safetensors").write_bytes(content[: len(content) // 2])
    return folder / "w.safetensors"


def _pickle(run: Path, folder: Path) -> Path:
    torch.save({"a": torch.zeros(1)}, folder / "w.safetensors")
    return folder / "w.safetensors"


def _evil_checkpoint(run: Path, folder: Path) -> Path:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(folder / "touched").touch, ())

    torch.save({"state_dict": {}, "spec": Evil()}, folder / "w.ckpt")
    return folder / "w.ckpt"


def _other_version(run: Path, folder: Path) -> Path:
    with safe_open(run / "weights.safetensors", framework="pt") as file:
        metadata = {**file.metadata(), "format_version": "99"}
    save_file(read_tensors(run / "weights.safetensors"), folder / "w.safetensors", metadata)
    return folder / "w.safetensors"


def _foreign(run: Path, folder: Path) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "w.safetensors")
    return folder / "w.safetensors"


def _cut_checkpoint(run: Path, folder: Path) -> Path:
    content = (run / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "w.ckpt").write_bytes(content[: len(content) // 2])
    return folder / "w.ckpt"


def _target(name: str) -> Callable[[Path, Path], Path]:
    return broken(lambda header: header["network"].update(_target_=name))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda run, folder: folder / "missing.safetensors", "no weights at"),
        (lambda run, folder: folder, "no run folder with weights"),
        (lambda run, folder: _named(folder / "w.pt"), "never opened"),
        (_cut, "cut off"),
        (_pickle, "is a pickle"),
        (_evil_checkpoint, "cannot be read as a checkpoint"),
        (_cut_checkpoint, "cannot be read as a checkpoint"),
        (_other_version, "format version '99'"),
        (_foreign, "without a header"),
        (_target("os.system"), r"os\.system"),
        (_target("torch.hub.load"), r"torch\.hub\.load"),
        (_target("hydra.utils.get_method"), r"hydra\.utils\.get_method"),
        (_target("longtake.loading.Path"), r"longtake\.loading\.Path"),
        (_target("longtake.loading.load"), r"longtake\.loading\.load"),
        (broken(lambda header: header["network"].update(dim=32)), "does not fit the network"),
        (broken(lambda header: header["network"].update(colour=1)), "VideoDiT"),
        (broken(lambda header: header.pop("trained_for")), "does not say what is needed"),
        (broken(lambda header: header.update(kind="ar_words")), "ar_words"),
        (broken(lambda header: header.update(precision="int8")), "precision"),
        (broken(lambda header: header.update(encoder_fingerprint="another")), "encoder another"),
    ],
)
def test_files_that_cannot_be_used_are_one_message(
    run_folder: Path, tmp_path: Path, make: Callable[[Path, Path], Path], reason: str
) -> None:
    path = make(run_folder, tmp_path)
    with pytest.raises(ConfigError, match=reason):
        longtake.load(path, trust=TRUST)
    assert not (tmp_path / "touched").exists()


def _named(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


def test_classes_of_other_packages_need_trust(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tests\.block_code\.BlockCode.*`trust`"):
        longtake.load(run_folder)


# Lengths and starts


@pytest.mark.parametrize("num_frames", [1, 9, 10, 21, 30])
def test_any_length_is_made_and_trimmed(model: VideoModel, num_frames: int) -> None:
    generation = model.generate(num_frames=num_frames, seed=1)
    chunks = list(generation)
    assert [chunk.start for chunk in chunks] == [0, 9, 21][: len(chunks)]
    assert chunks[-1].stop == generation.num_frames == num_frames
    assert all(chunk.frames.dtype == np.uint8 and chunk.num_given == 0 for chunk in chunks)
    is_off = num_frames not in (9, 21)
    assert any("rounded up" in notice for notice in generation.request.notices) == is_off


def test_the_default_length_is_that_of_training(model: VideoModel) -> None:
    assert model.generate().num_frames == 21


def test_a_longer_rollout_begins_like_a_shorter_one(model: VideoModel) -> None:
    short, long = (model.generate(num_frames=n, seed=2, actions="random").video() for n in (15, 33))
    assert np.array_equal(long[:, :, :15], short)


def test_the_seed_decides_and_the_number_of_samples_does_not(model: VideoModel) -> None:
    one = model.generate(num_frames=9, seed=7).video()
    three = model.generate(num_frames=9, seed=7, num_samples=3).video()
    other = model.generate(num_frames=9, seed=8).video()
    assert three.shape == (3, 1, 9, 16, 16, 3)
    assert np.abs(one[0].astype(int) - three[0]).max() <= 1  # a batch may round its last bit differently
    assert not np.array_equal(three[0], three[1])
    assert not np.array_equal(one, other)
    assert np.array_equal(one, model.generate(num_frames=9, seed=7).video())


def test_an_image_is_the_first_frame(model: VideoModel, tmp_path: Path) -> None:
    image = frames(1)[0]
    save_image(tmp_path / "a.png", image)
    generation = model.generate(num_frames=13, start=tmp_path / "a.png")
    first = next(generation)
    assert first.num_given == 1
    assert np.array_equal(first.frames[0, 0, 0], image)
    other = model.generate(num_frames=13, start=frames(1, seed=4)).video()
    assert not np.array_equal(other[:, :, 1:9], first.frames[:, :, 1:])


def test_a_clip_of_a_chunk_is_given_whole_and_the_rest_depends_on_it(model: VideoModel) -> None:
    start = frames(9)
    video = model.generate(num_frames=21, start=start).video()
    assert np.array_equal(video[0, 0, :9], start)
    other = model.generate(num_frames=21, start=frames(9, seed=1)).video()
    assert not np.array_equal(video[0, 0, 9:], other[0, 0, 9:])


def test_of_a_longer_clip_the_last_whole_chunks_are_taken(model: VideoModel, tmp_path: Path) -> None:
    from fractions import Fraction

    start = np.repeat(np.repeat(frames(25, 2, 2), 8, axis=1), 8, axis=2)
    (tmp_path / "a.mp4").write_bytes(encode_video(start, fps=Fraction(10), crf=0))
    generation = model.generate(num_frames=33, start=str(tmp_path / "a.mp4"))
    assert generation.request.plan.start_px == 21
    assert any("first 4 are left out" in notice for notice in generation.request.notices)
    video = generation.video()
    assert np.abs(video[0, 0, :21].astype(int) - start[4:]).mean() < 12  # colours of an mp4 are halved in size
    again = model.generate(num_frames=33, start=start, num_context_frames=9)
    assert again.request.plan.start_px == 9
    assert np.array_equal(again.request.start[0], start[-9:])


def test_an_odd_number_of_frames_is_cut_to_what_can_be_encoded(model: VideoModel) -> None:
    generation = model.generate(num_frames=21, start=frames(12))
    assert generation.request.plan.start_px == 9
    assert any("last 9 are used" in notice for notice in generation.request.notices)


def test_another_size_is_cut_and_resized_with_a_notice(model: VideoModel) -> None:
    wide = np.zeros((1, 32, 64, 3), np.uint8)
    wide[:, :, 16:48, 0] = 255  # the middle square
    generation = model.generate(num_frames=9, start=wide)
    assert any("64x32 pixels; it is resized to 16x16" in notice for notice in generation.request.notices)
    assert (generation.request.start[..., 0] == 255).all()


# Actions and text


def test_actions_change_the_video_from_where_they_differ(model: VideoModel) -> None:
    base = np.zeros((21, 3), np.float32)
    changed = base.copy()
    changed[14:] = 3
    first, second = (model.generate(num_frames=21, actions=rows).video() for rows in (base, changed))
    assert np.array_equal(first[:, :, :9], second[:, :, :9])
    assert not np.array_equal(first[:, :, 9:], second[:, :, 9:])
    absent = model.generate(num_frames=21).video()
    assert not np.array_equal(absent, first)


def test_what_the_weights_were_not_trained_for_is_refused(model: VideoModel) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_frames": -3}, "num_frames is -3"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 9, "start": frames(9)}, "nothing is left to predict"),
        ({"num_samples": 0}, "num_samples"),
        ({"prompt": "a dog"}, "trained without text"),
        ({"actions": "sideways"}, "unknown mode"),
        ({"actions": "left"}, "action_0"),
        ({"num_frames": 21, "actions": np.zeros((5, 3))}, "5 frames, but 21"),
        ({"actions": np.zeros((21, 2))}, r"\(21, 2\)"),
        ({"start": frames(9), "num_context_frames": 4}, "num_context_frames is 4"),
        ({"start": frames(9), "num_context_frames": 13}, "the start has 9 frames"),
        ({"start": np.zeros((3, 16, 16), np.uint8)}, "expected uint8"),
        ({"start": "missing.png"}, "Change `input`"),
        ({"start": "missing.mp4"}, "Change `input`"),
    ]
    for arguments, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            model.generate(**{"num_frames": 21, **arguments}).video()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_frames": "9"}, "num_frames is '9'"),
        ({"num_frames": 9.5}, "num_frames is 9.5"),
        ({"num_context_frames": 1.5}, "num_context_frames is 1.5"),
        ({"num_samples": True}, "num_samples is True"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"seed": -1}, "seed is -1"),
        ({"prompt": ["a"]}, "prompt is a list"),
        ({"negative_prompt": 5}, "negative_prompt is a int"),
        ({"actions": [1, 2]}, "actions is a list"),
        ({"start": [1, 2]}, "start is a list"),
        ({"start": np.zeros((1, 0, 16, 3), np.uint8)}, "a start of"),
    ],
)
def test_arguments_of_another_type_are_named(model: VideoModel, wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        model.generate(**{"num_frames": 9, **wrong})


def test_more_views_than_the_weights_show_are_refused(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.spec.data, "view_names", ["main"])
    with pytest.raises(ConfigError, match=r"no more views than these weights show \(1\)"):
        model.generate(num_frames=21, start=np.zeros((2, 9, 16, 16, 3), np.uint8))


def test_bfloat16_is_close_to_float32(run_folder: Path) -> None:
    plain, low = (longtake.load(run_folder, trust=TRUST) for _ in range(2))
    low.precision = "bfloat16"
    a, b = (m.generate(num_frames=9, seed=0).video().astype(int) for m in (plain, low))
    assert 0 < np.abs(a - b).mean() < 4
