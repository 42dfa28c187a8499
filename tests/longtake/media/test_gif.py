"""Side-by-side pictures and GIFs that keep their time."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from longtake.errors import ConfigError
from longtake.media.gif import comparison, frame_delays, save_gif


def moving(num_frames: int, offset: int = 0) -> np.ndarray:
    frames = np.zeros((num_frames, 24, 32, 3), np.uint8)
    for t in range(num_frames):
        frames[t, 4:12, (2 * t + offset) % 24 : (2 * t + offset) % 24 + 8] = (200, 40, 90)
    return frames


def test_comparison_shows_all_three():
    generated, truth = moving(4, 3), moving(4)
    tiles = comparison(generated, truth, min_width=32)
    assert tiles.dtype == np.uint8
    assert len(tiles) == 4
    height = tiles.shape[1] - 24
    assert np.array_equal(tiles[:, height:, :32], generated)
    assert np.array_equal(tiles[:, height:, 36:68], truth)
    difference = np.abs(generated.astype(int) - truth.astype(int))
    assert np.array_equal(tiles[:, height:, 72:104], difference)
    assert difference.max() == 200
    assert not comparison(truth, truth, min_width=32)[:, height:, 72:].any()
    with pytest.raises(ValueError, match="differ in shape"):
        comparison(generated, truth[:3])


@pytest.mark.parametrize("fps", [Fraction(35, 3), Fraction(30), Fraction(2), Fraction(24000, 1001)])
def test_gif_keeps_frames_and_time(tmp_path, fps):
    frames = moving(12)
    save_gif(tmp_path / "new" / "a.gif", frames, fps=fps)
    with Image.open(tmp_path / "new" / "a.gif") as image:
        assert image.n_frames == 12
        assert image.info["loop"] == 0
        total = 0
        for index in range(12):
            image.seek(index)
            total += image.info["duration"]
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(shown - frames[index]).max() <= 8
    assert total == pytest.approx(12000 / float(fps), abs=10)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.gif"]


def test_delays():
    assert frame_delays(3, Fraction(30)) == ([0, 1, 2], [3, 4, 3])
    kept, delays = frame_delays(120, Fraction(120))
    assert sum(delays) == 100
    assert min(delays) >= 2
    assert len(kept) < 60
    assert frame_delays(1, Fraction(100)) == ([0], [2])


def test_refused(tmp_path):
    with pytest.raises(ConfigError, match="fps"):
        save_gif(tmp_path / "a.gif", moving(2), fps=Fraction(0))
    with pytest.raises(ValueError, match="uint8"):
        save_gif(tmp_path / "a.gif", moving(2).astype(np.float32), fps=Fraction(3))
