"""The files of several views: what stands where, and that no half file stays."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from longtake.media.grid import GAP, TILE_WIDTH, line_height
from longtake.media.read import probe_video, read_video
from longtake.media.view_files import ViewFiles, ViewLayout, grid_of

RIG = yaml.safe_load((Path(__file__).parents[3] / "conf" / "rig" / "doom7.yaml").read_text())
NAMES = tuple(RIG["views"])
HEIGHT, WIDTH = 48, 64
TILE = (HEIGHT * 3 + line_height() + 4, WIDTH * 3)  # enlarged by the least whole factor, under a bar with its name


def coloured(views: int, frames: int = 3) -> np.ndarray:
    """Returns a flat colour a view, uint8 [v t h w c]."""
    levels = np.arange(1, views + 1, dtype=np.uint8) * 30
    return np.broadcast_to(levels[:, None, None, None, None], (views, frames, HEIGHT, WIDTH, 3)).copy()


def write(folder: Path, views: int, control: bool = False, parts: int = 2, **choices: bool) -> ViewLayout:
    layout = ViewLayout(NAMES[:views], ViewLayout.of_rig(NAMES, RIG).places, **choices)
    with ViewFiles(folder, fps=Fraction(10), layout=layout) as files:
        for _ in range(parts):
            frames = coloured(views)
            files.write(frames, {"depth": frames // 2, "labels": frames // 3} if control else None)
    return layout


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("views", range(1, 8))
@pytest.mark.parametrize("control", [False, True])
def test_sizes_and_places_of_the_grid(views: int, control: bool) -> None:
    layout = ViewLayout(NAMES[:views], ViewLayout.of_rig(NAMES, RIG).places)
    frames = coloured(views)
    grid = grid_of(frames, layout)
    rows, columns = (1 + max(layout.placement[name][axis] for name in layout.names) for axis in (0, 1))
    assert TILE[1] >= TILE_WIDTH
    assert grid.shape == (3, rows * TILE[0] + GAP * (rows - 1), columns * TILE[1] + GAP * (columns - 1), 3)
    for view, name in enumerate(layout.names):
        assert tuple(RIG["views"][name]["place"]) == layout.placement[name]
        row, column = layout.placement[name]
        middle = grid[:, row * (TILE[0] + GAP) + TILE[0] - HEIGHT, column * (TILE[1] + GAP) + TILE[1] // 2]
        assert (middle == 30 * (view + 1)).all()
    taken = set(layout.placement.values())
    for row in range(rows):
        for column in range(columns):
            cell = grid[0, row * (TILE[0] + GAP) :, column * (TILE[1] + GAP) :][: TILE[0], : TILE[1]]
            assert cell.any() == ((row, column) in taken)  # black where there is no camera


def test_all_files_of_several_views(tmp_path: Path) -> None:
    write(tmp_path, 3, control=True)
    per_view = {f"views/{name}.mp4" for name in NAMES[:3]}
    assert names(tmp_path) == {"output.mp4", "output_grid.mp4", "output_with_control_grid.mp4"} | per_view
    side = read_video(tmp_path / "output.mp4")
    assert side.shape == (6, HEIGHT, 3 * WIDTH + 2 * GAP, 3)
    for view in range(3):  # in the order of the view axis
        assert abs(int(side[5, 20, view * (WIDTH + GAP) + 30, 0]) - 30 * (view + 1)) <= 3
        own = read_video(tmp_path / "views" / f"{NAMES[view]}.mp4")
        assert own.shape == (6, HEIGHT, WIDTH, 3)
        assert abs(int(own[0, 20, 30, 0]) - 30 * (view + 1)) <= 3
    grid, both = (probe_video(tmp_path / name) for name in ("output_grid.mp4", "output_with_control_grid.mp4"))
    assert (both.num_frames, both.fps) == (6, 10)
    assert abs(both.height - (3 * grid.height + 2 * GAP)) <= 2  # two control types above, generated below
    last = read_video(tmp_path / "output_with_control_grid.mp4")[0]
    front = ViewLayout.of_rig(NAMES, RIG).placement["front_wide"]
    place = front[0] * (TILE[0] + GAP) + TILE[0] - HEIGHT, front[1] * (TILE[1] + GAP) + TILE[1] // 2
    height = grid_of(coloured(3), ViewLayout(NAMES[:3], ViewLayout.of_rig(NAMES, RIG).places)).shape[1]
    shown = [int(last[place[0] + panel * (height + GAP), place[1], 0]) for panel in range(3)]
    assert np.abs(np.array(shown) - [15, 10, 30]).max() <= 4  # depth, labels, generated


def test_one_view_is_one_file(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert names(tmp_path) == {"output.mp4"}
    write(tmp_path / "control", 1, control=True)
    assert names(tmp_path / "control") == {"output.mp4", "output_with_control_grid.mp4"}


def test_what_is_not_wanted_is_not_written(tmp_path: Path) -> None:
    write(tmp_path / "a", 2, combined=False)
    assert names(tmp_path / "a") == {f"views/{name}.mp4" for name in NAMES[:2]} | {"output_grid.mp4"}
    write(tmp_path / "b", 2, individual=False, grid=False)
    assert names(tmp_path / "b") == {"output.mp4"}


def test_views_without_a_rig_stand_row_by_row() -> None:
    layout = ViewLayout.of_rig(("a", "b", "c", "d", "e"), None)
    assert layout.placement == {"a": (0, 0), "b": (0, 1), "c": (0, 2), "d": (1, 0), "e": (1, 1)}
    assert ViewLayout.of_rig(("a",), {"views": {"b": {"place": [0, 0]}}}).placement == {"a": (0, 0)}


def test_an_error_leaves_no_half_file(tmp_path: Path) -> None:
    files = ViewFiles(tmp_path, fps=Fraction(10), layout=ViewLayout(("a", "b")))

    def fail() -> None:
        with files:
            files.write(coloured(2))
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == set()
