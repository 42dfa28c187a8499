"""The shipped weights: small enough for the repository, described, and of use as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import longtake
from longtake.pretrained.weights_file import read_header

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
MEGABYTE = 1_000_000
FILES = sorted(WEIGHTS.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_small_and_described(path: Path) -> None:
    kind = read_header(path)["kind"]
    assert path.stat().st_size < (16 if kind.startswith("ar_") else 8) * MEGABYTE
    assert f"## {path.name}" in (WEIGHTS / "RECIPE.md").read_text(encoding="utf-8")


def test_the_shipped_model_continues_a_video_as_it_is_told() -> None:
    model = longtake.load(WEIGHTS / "ar_chunk3f_doom.safetensors")
    model.rollout.num_steps = 4
    ramp = np.linspace(40, 120, 64, dtype=np.uint8)
    start = np.broadcast_to(ramp[None, None, :, None], (9, 48, 64, 3)).copy()
    videos = {}
    for actions in ("left", "right"):
        videos[actions] = model.generate(num_frames=33, start=start, actions=actions).video()
        assert videos[actions].shape == (1, 1, 33, 48, 64, 3)
        assert np.array_equal(videos[actions][0, 0, :9], start)
    made = videos["left"][0, 0, 9:].astype(float)
    assert 10 < made.mean() < 200  # neither black nor white
    apart = np.abs(made - videos["right"][0, 0, 9:]).mean(axis=(1, 2, 3))
    assert apart[-1] > 2, "turning left or right must not look the same"
