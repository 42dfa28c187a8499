"""Weights files: what comes back, and that nothing in a file is ever executed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longtake.encoders.text import WordsEncoder
from longtake.encoders.video_vae import VideoVAENetwork
from longtake.errors import ConfigError, DataError
from longtake.pretrained.weights_file import (
    build,
    check_targets,
    fingerprint,
    read_header,
    read_tensors,
    write_weights,
)

HEADER = {"kind": "toy", "network": {"_target_": "longtake.encoders.text.WordsEncoder", "max_words": 3}, "step": 7}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "w.safetensors"
    tied = torch.arange(6.0).view(2, 3)
    write_weights(path, {"a": tied, "b": tied.T, "c": torch.ones(2, dtype=torch.float16)}, HEADER)
    return path


def test_what_was_written_comes_back(file: Path) -> None:
    assert read_header(file) == HEADER
    tensors = read_tensors(file)
    assert torch.equal(tensors["b"], torch.arange(6.0).view(2, 3).T)
    assert tensors["c"].dtype == torch.float16
    assert [path.name for path in file.parent.iterdir()] == ["w.safetensors"]


def test_a_write_that_fails_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_weights(file, {"a": torch.zeros(3)}, HEADER)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 7, 40, 200, -1])
def test_a_truncated_file_is_one_clear_error(file: Path, keep: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    for read in (read_header, read_tensors):
        with pytest.raises(ConfigError, match=r"cannot be read as safetensors.*Change|or change `ckpt`"):
            read(file)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_is_never_opened(tmp_path: Path, writer: str) -> None:
    path, trap = tmp_path / "w.safetensors", tmp_path / "trap"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trap)))
    else:
        torch.save({"a": Bomb(trap)}, path)
    with pytest.raises(ConfigError, match="is a pickle"):
        read_header(path)
    assert not trap.exists()


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    lengths = set()
    for padding in range(256):
        write_weights(path, {"a": torch.zeros(1)}, {"kind": "x" * padding})
        lengths.add(path.read_bytes()[0])
        assert read_header(path) == {"kind": "x" * padding}
    assert 0x80 in lengths


def test_other_formats_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ConfigError, match=r"cannot be read.*init_from"):
        read_header(path, "init_from")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="without a header of this project"):
        read_tensors(path)
    metadata = {"format": "longtake-weights", "format_version": "2", "header": json.dumps(HEADER)}
    save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(ConfigError, match="format version '2'; this code reads version 1"):
        read_header(path)
    for header in ("{", "[1]", "[" * 100_000):
        save_file({"a": torch.zeros(1)}, path, {**metadata, "format_version": "1", "header": header})
        with pytest.raises(ConfigError, match="is damaged"):
            read_header(path)


ATTACKS = [
    "os.system",
    "torch.hub.load",
    "hydra.utils.get_method",
    "builtins.eval",
    "subprocess.Popen",
    "longtake.encoders.text.Path",  # imported there, defined elsewhere
    "longtake.encoders.text.re.compile",
    "longtake.encoders.text.words_of",  # a function
    "longtake.encoders.text.logger",
    "longtake.media.write.VideoWriter",  # building it would write a file
    "longtake.no_such_module.Thing",
    "longtake",
    "longtakes.encoders.text.WordsEncoder",
    "tests.poisoned_module.Thing",
    "longtake..text.WordsEncoder",
    "",
    None,
    7,
    ["os", "system"],
]


@pytest.mark.parametrize("target", ATTACKS)
@pytest.mark.parametrize("place", ["top", "nested"])
def test_only_classes_of_this_package_are_built(target: object, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.system", lambda _: pytest.fail("executed"))
    node: dict[str, Any] = {"_target_": target, "path": "/nowhere"}
    if place == "nested":
        node = {"_target_": HEADER["network"]["_target_"], "words": [{"inner": node}]}  # type: ignore[index]
    for read in (check_targets, build):
        with pytest.raises(ConfigError, match="nothing was executed"):
            read(node)


def test_a_module_outside_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "poisoned.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('trap').touch()\nclass Thing: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'poisoned.Thing'.*trust"):
        build({"_target_": "poisoned.Thing"})
    assert not (tmp_path / "trap").exists()
    assert type(build({"_target_": "poisoned.Thing"}, trust=["poisoned"])).__name__ == "Thing"


def test_a_trusted_package_may_not_lend_what_it_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lender.py").write_text("from subprocess import Popen\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="nothing was executed"):
        build({"_target_": "lender.Popen", "args": ["true"]}, trust=["lender"])


def test_nodes_are_built_inside_out() -> None:
    words = {"_target_": "longtake.encoders.text.WordsEncoder", "words": ["a"], "_convert_": "all"}
    made = build({"plain": [1, words], "later": {**words, "_partial_": True}})
    assert made["plain"][0] == 1
    assert isinstance(made["plain"][1], WordsEncoder)
    assert made["later"](max_words=4).max_words == 4
    raw = build({**words, "words": [], "_recursive_": False})
    assert raw.words == []


def test_arguments_that_a_class_does_not_take_are_named() -> None:
    with pytest.raises(ConfigError, match="WordsEncoder other arguments than it takes.*no_such"):
        build({"_target_": "longtake.encoders.text.WordsEncoder", "no_such": 1})


def test_fingerprints_name_config_names_shapes_and_values() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    known = fingerprint({"x": 1}, tensors)
    assert known == fingerprint({"x": 1}, {"b": torch.zeros(2), "a": torch.arange(4.0).half()})
    others = [
        fingerprint({"x": 2}, tensors),
        fingerprint({"x": 1}, {**tensors, "a": torch.arange(4.0).view(2, 2)}),
        fingerprint({"x": 1}, {**tensors, "a": torch.arange(4.0) + 1}),
        fingerprint({"x": 1}, {"a": torch.arange(4.0), "c": torch.zeros(2)}),
    ]
    assert len({known, *others}) == 5


def test_networks_are_built_from_headers() -> None:
    node = {"_target_": "longtake.encoders.video_vae.VideoVAENetwork", "encoder_widths": [8, 8, 8]}
    assert isinstance(build(node), VideoVAENetwork)
