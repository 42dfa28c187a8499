"""Weights whose header was changed or damaged: one message each, and nothing of it is executed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import longtake
from longtake.errors import ConfigError
from longtake.pretrained.weights_file import read_header, read_tensors, write_weights

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def changed(run_folder: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Writes the weights of a run again with another header."""

    def changed(change: Change) -> Path:
        header = read_header(run_folder / "weights.safetensors")
        change(header)
        write_weights(tmp_path / "w.safetensors", read_tensors(run_folder / "weights.safetensors"), header)
        return tmp_path / "w.safetensors"

    return changed


def _set(node: str, **values: Any) -> Change:
    return lambda header: header[node].update(values)


WRONG: list[tuple[Change, str]] = [
    (_set("video", fps="abc"), "abc"),
    (_set("video", fps="0"), r"video\.fps"),
    (_set("video", height="abc"), r"video\.height"),
    (_set("video", num_frames=-5), r"video\.num_frames"),
    (_set("trained_for", chunk_lat=0), r"trained_for\.chunk_lat"),
    (_set("trained_for", chunk_lat="3"), r"trained_for\.chunk_lat"),
    (_set("trained_for", ratio=0), r"trained_for\.ratio"),
    (_set("trained_for", rollouts="memory"), r"trained_for\.rollouts"),
    (_set("trained_for", starts_lat=["1"]), r"trained_for\.starts_lat"),
    (_set("data", action_names=[1, 2, 3]), r"data\.action_names"),
    (_set("data", action_typical=[1.0]), r"data\.action_typical"),
    (_set("network", dim="abc"), "VideoDiT that cannot be built"),
    (_set("encoder", video=None), r"encoder\.video"),
    (lambda header: header.update(encoder=[1]), "encoder"),
    (lambda header: header.update(solver={}), "solver"),
    (lambda header: header.update(solver=header["network"]), "as its solver a VideoDiT"),
    (lambda header: header.update(network=header["solver"]), "as its network a Euler"),
    (lambda header: header.update(num_context_frames=-3), "num_context_frames"),
    (lambda header: header.update(network={"_target_": "longtake.errors.ConfigError"}), "ConfigError"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG)
def test_a_header_with_other_values_is_one_message(
    changed: Callable[[Change], Path], change: Change, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        longtake.load(changed(change), trust=["tests"])


@pytest.mark.parametrize("place", ["video", "data", "elsewhere"])
def test_a_class_that_may_not_be_built_is_refused_wherever_it_stands(
    changed: Callable[[Change], Path], place: str
) -> None:
    path = changed(lambda header: header.setdefault(place, {}).update(a=[{"b": {"_target_": "builtins.eval"}}]))
    with pytest.raises(ConfigError, match=r"builtins\.eval"):
        longtake.load(path, trust=["tests"])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_nobody_is_advised_to_run_what_a_checkpoint_holds(tmp_path: Path, writer: Callable[..., Any]) -> None:
    writer({"state_dict": {}, "spec": Evil()}, tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match="cannot be read as a checkpoint") as caught:
        longtake.load(tmp_path / "w.ckpt")
    assert "weights_only" not in str(caught.value)
    assert "torch.save" not in str(caught.value)


@pytest.mark.parametrize("path", [5, None, ["a"]])
def test_what_is_no_path_is_said_so(path: Any) -> None:
    with pytest.raises(ConfigError, match="ckpt is"):
        longtake.load(path)
