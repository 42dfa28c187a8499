"""Rollouts of several views under control: what is held does not grow with the length."""

from __future__ import annotations

import gc
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from longtake.generate_diffusion import DiffusionModel
from longtake.generate_windows import WindowInputs
from longtake.loading import load
from longtake.media.view_files import ViewLayout
from longtake.rollout.sliding_window import SlidingWindowRollout
from longtake.rollout_report import write_rollout
from longtake.truth import TrueVideo, truth_of
from tests.tiny_views import RIG, write_views

NAMES = tuple(RIG["views"])[:3]


class Endless:
    """Frames of any length, as they are asked for: control, or truth."""

    types = ("depth",)

    def there(self, kind: str) -> list[bool]:
        return [True] * len(NAMES)

    def frames(self, start: int, stop: int) -> np.ndarray:
        rng = np.random.default_rng(start)
        return rng.integers(0, 256, (len(NAMES), stop - start, 16, 16, 3), np.uint8)

    def window(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"depth": self.frames(start, stop)}

    def where(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"depth": np.ones((len(NAMES), stop - start, 16, 16), np.float32)}


class EndlessTruth(Endless):
    def window(self, start: int, stop: int) -> np.ndarray:  # type: ignore[override]
        return self.frames(start, stop)


def test_what_is_held_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Tensors alive between two windows, and all that Python and NumPy hold at the peak: of 5 and of 15 windows."""
    model = load(write_views(tmp_path / "w.safetensors"), ["tests"])
    assert isinstance(model, DiffusionModel)
    model.use(rollout=SlidingWindowRollout(num_steps=1, guidance=1.0))

    def most(frames: int, folder: Path) -> tuple[int, int]:
        gc.collect()
        start = np.zeros((len(NAMES), 1, 16, 16, 3), np.uint8)
        inputs = WindowInputs(start=start, view_ids=tuple(range(len(NAMES))), control=Endless())
        generation = model.generate_views(inputs, (1,) * len(NAMES), num_frames=frames, seed=0, num_samples=1, name="")
        truth = truth_of(TrueVideo(EndlessTruth(), frames), model.video_encoder, generation.request.plan, model.device)
        counts: list[int] = []
        chunks = generation._chunks

        def watched():  # noqa: ANN202
            for chunk in chunks:
                counts.append(tensor_bytes() if chunk.index % 5 == 4 else 0)
                yield chunk

        generation._chunks = watched()
        tracemalloc.start()
        write_rollout(generation, [folder], fps=Fraction(10), truth=truth, layout=ViewLayout(NAMES))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return max(counts), peak

    most(9, tmp_path / "first")  # what is made once
    short, long = most(41, tmp_path / "short"), most(121, tmp_path / "long")
    assert long[0] <= short[0] * 1.02
    assert long[1] < short[1] * 1.15  # what is held of a window once more would be over it


def tensor_bytes() -> int:
    """Returns the bytes of all tensors that are alive."""
    alive: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            alive[storage.data_ptr()] = storage.nbytes()
    return sum(alive.values())
