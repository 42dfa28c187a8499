"""Spec files: every example parses, every mistake is one message that names the key."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from launcher.spec_file import read_specs
from longtake.errors import ConfigError
from tests.launcher.spec_examples import EXAMPLES, NAMES, VIEWS, changed, views, write


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_parses(example: str, tmp_path: Path) -> None:
    (spec,) = read_specs([write(tmp_path, EXAMPLES[example])], NAMES[example])
    content = EXAMPLES[example]
    assert spec.name == content.get("name", "spec")
    assert [view.name for view in spec.views] == [name for name in NAMES[example] if name in content]  # rig order
    plain = {key: value for key, value in content.items() if key not in NAMES[example]}
    assert set(spec.values) == set(plain)
    for key in ("seed", "guidance", "num_steps", "chunk_overlap", "num_chunks", "control_weight"):
        assert spec.get(key) == content.get(key)
    if "fps" in content:
        assert spec.get("fps") == Fraction(str(content["fps"]))


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "deep", EXAMPLES["transfer25"])
    monkeypatch.chdir(tmp_path)
    (spec,) = read_specs(["deep/spec.json"], VIEWS)
    assert spec.views[0].input_path == tmp_path / "deep" / "input_videos" / "front_wide.mp4"
    assert spec.views[0].control_path == {"": tmp_path / "deep" / "controls" / "front_wide.mp4"}
    assert spec.get("prompt_path") == tmp_path / "deep" / "prompt.txt"


def test_controls_prompts_and_counts_of_a_view(tmp_path: Path) -> None:
    (spec,) = read_specs([write(tmp_path, EXAMPLES["several_controls"])], VIEWS)
    front, rear = spec.views
    assert list(front.control_path) == ["depth", "labels"]
    assert spec.get("prompt") == ("A night drive.", "It begins to rain.")
    assert (front.prompt, rear.prompt) == (None, ("A lorry follows.",))
    (spec,) = read_specs([write(tmp_path, EXAMPLES["transfer25_autoregressive"])], VIEWS)
    assert {view.given_px for view in spec.views} == {1}


def test_many_samples_in_one_file_or_in_several(tmp_path: Path) -> None:
    one, two = EXAMPLES["transfer25"], {**EXAMPLES["transfer25"], "name": "second"}
    lines = write(tmp_path, [one, two], "many.jsonl")
    assert [spec.name for spec in read_specs([lines], VIEWS)] == ["auto_multiview", "second"]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([one, two]))
    assert [spec.name for spec in read_specs([listed], VIEWS)] == ["auto_multiview", "second"]
    nameless = write(tmp_path, [views(), views()], "nameless.jsonl")
    assert [spec.name for spec in read_specs([nameless], VIEWS)] == ["nameless-000", "nameless-001"]
    with pytest.raises(ConfigError, match=r"many.jsonl, line 1: name is 'auto_multiview', and so is.*`name`"):
        read_specs([write(tmp_path, one), lines], VIEWS)


BAD = [
    ("guidance", "strong", "guidance is 'strong'; expected a whole number 0 to 7"),
    ("guidance", 3.5, "guidance is 3.5"),
    ("guidance", 8, "guidance is 8"),
    ("guidance", True, "guidance is True"),
    ("num_conditional_frames", 3, "num_conditional_frames is 3; expected 0, 1, 5"),
    ("num_conditional_frames", 2, "num_conditional_frames is 2; .*their 2 is 5 here"),
    ("num_conditional_frames", "1", "num_conditional_frames is '1'"),
    ("front_wide.num_conditional_frames_per_view", 4, "front_wide.num_conditional_frames_per_view is 4"),
    (
        "num_conditional_frames_per_view",
        {"front": 1},
        "unknown key `num_conditional_frames_per_view.front`; nearest: num_",
    ),
    ("num_conditional_frames_per_view", {"rear": 3}, "num_conditional_frames_per_view is"),
    ("front_wide.input_path", "nowhere.mp4", "front_wide.input_path is 'nowhere.mp4', and there is no file"),
    ("rear.control_path", "nowhere.mp4", "rear.control_path is 'nowhere.mp4'"),
    ("rear.control_path", {"depth": 3}, "rear.control_path.depth is 3"),
    ("front_wide", "a.mp4", "front_wide is 'a.mp4'; expected an object"),
    ("front_wide.controlpath", "a", "unknown key `front_wide.controlpath`; nearest: front_wide.control_path"),
    ("front_wid", {}, "unknown key `front_wid`; nearest: front_wide"),
    ("guidence", 3, "unknown key `guidence`; nearest: guidance"),
    ("zzz", 3, "unknown key `zzz`; nearest: "),
    ("prompt_path", "nowhere.txt", "prompt_path is 'nowhere.txt', and there is no file"),
    ("prompt", "both", "prompt and prompt_path are both given.*`prompt`"),
    ("prompt", [], "prompt is \\[\\]; expected a text"),
    ("prompt", 3, "prompt is 3"),
    ("control_weight", 1.5, "control_weight is 1.5; expected a number from 0 to 1"),
    ("control_weight", "high", "control_weight is 'high'"),
    ("seed", -1, "seed is -1"),
    ("fps", 0, "fps is 0; expected a number above 0"),
    ("fps", "fast", "fps is 'fast'"),
    ("num_steps", 0, "num_steps is 0"),
    ("num_chunks", 0, "num_chunks is 0"),
    ("chunk_overlap", -1, "chunk_overlap is -1"),
    ("enable_autoregressive", 1, "enable_autoregressive is 1; expected true or false"),
    ("num_video_frames_per_view", 29, "num_video_frames_loaded_per_view is missing"),
    ("name", "../up", "name is '../up'"),
    ("add_camera_prefix", True, "add_camera_prefix is True"),
    ("preset_edge_threshold", "huge", "preset_edge_threshold is 'huge'; expected one of: none, very_low"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_a_mistake_is_one_message_with_its_key(key: str, value: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, changed("transfer25", key, value))
    with pytest.raises(ConfigError, match=message) as caught:
        read_specs([path], VIEWS)
    text = str(caught.value)
    assert str(path) in text
    assert text.count("expected") + text.count("there is no file") + text.count("unknown key") == 1


def test_the_subsampling_of_the_fork_must_come_out_even(tmp_path: Path) -> None:
    content = {**EXAMPLES["fork_30fps"], "num_video_frames_loaded_per_view": 86, "num_video_frames_per_view": 29}
    with pytest.raises(ConfigError, match=r"num_video_frames_loaded_per_view is 86; expected 1 \+ a multiple of 28"):
        read_specs([write(tmp_path, content)], VIEWS)
    content["num_video_frames_loaded_per_view"] = 85
    (spec,) = read_specs([write(tmp_path, content)], VIEWS)
    assert spec.get("num_video_frames_loaded_per_view") == 85
    with pytest.raises(ConfigError, match="num_chunks and num_video_frames_per_view both"):
        read_specs([write(tmp_path, {**content, "num_chunks": 2})], VIEWS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "{}", "ends in '.yaml'; expected .json or .jsonl.*`spec`"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.json", '{"seed": NaN}', "NaN is no JSON number"),
        ("a.json", '{"seed": 1, "seed": 2}', "`seed` stands there twice"),
        ("a.json", "3", "holds a number; expected an object"),
        ("a.json", "[]", "holds no sample"),
        ("a.jsonl", "\n\n", "holds no sample"),
        ("a.jsonl", "{}\n[1]\n", "line 2 holds a list"),
    ],
)
def test_files_that_are_none(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_specs([tmp_path / name], VIEWS)
    with pytest.raises(ConfigError, match=r"the spec .*nowhere.json cannot be read \(No such file"):
        read_specs([tmp_path / "nowhere.json"], VIEWS)


def test_weights_by_type_masks_and_edges(tmp_path: Path) -> None:
    front = {"control_path": {"edge": None, "depth": "controls/rear.mp4"}, "mask_path": "controls/rear.mp4"}
    content = {"prompt": "x", "control_weight": {"edge": 1, "depth": 0.5}, "front_wide": front}
    (spec,) = read_specs([write(tmp_path, content)], VIEWS, {"seed": 7})
    assert spec.get("control_weight") == {"edge": 1.0, "depth": 0.5}
    assert spec.get("seed") == 7
    (view,) = spec.views
    assert view.control_path == {"edge": None, "depth": tmp_path / "controls" / "rear.mp4"}
    assert view.mask_path == {"": tmp_path / "controls" / "rear.mp4"}
    for weight in ({"edge": 1.5}, {"edge": "strong"}, {"edge": True}, -0.1, "all"):
        with pytest.raises(ConfigError, match="control_weight is .*`control_weight`"):
            read_specs([write(tmp_path, {**content, "control_weight": weight})], VIEWS)
    with pytest.raises(ConfigError, match="`front_wide.mask_path.edge`"):
        read_specs([write(tmp_path, {**content, "front_wide": {**front, "mask_path": {"edge": "no.mp4"}}})], VIEWS)
    with pytest.raises(ConfigError, match="unknown key `sed`; nearest: seed"):
        read_specs([write(tmp_path, content)], VIEWS, {"sed": 7})
