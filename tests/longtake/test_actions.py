"""Actions of a rollout from modes, arrays and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longtake.actions import mode_actions, resolve_actions, turn_column
from longtake.errors import ConfigError

DOOM = ("move_forward", "move_right", "turn_right_degrees", "attack", "use")
TYPICAL = (1.0, 1.0, 4.0, 1.0, 1.0)


def resolve(given: object, names: tuple[str, ...] = DOOM, num_frames: int = 6) -> np.ndarray:
    typical = TYPICAL if names == DOOM else [1.0] * len(names)
    return resolve_actions(given, names, typical, num_frames, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "column", "value"), [("forward", 0, 1), ("backward", 0, -1), ("right", 2, 4), ("left", 2, -4)]
)
def test_a_mode_holds_one_column_from_the_first_step_on(mode: str, column: int, value: float) -> None:
    rows = resolve(mode)
    wanted = np.zeros((6, 5))
    wanted[1:, column] = value
    assert rows.dtype == np.float32
    assert np.array_equal(rows, wanted)


def test_modes_take_columns_of_their_own_where_there_are_some() -> None:
    names = ("left", "right", "forward", "backward")
    for column, mode in enumerate(names):
        assert resolve(mode, names)[1].tolist() == np.eye(4)[column].tolist()
    assert turn_column(("steer_left", "turn_left")) == (1, -1)
    assert turn_column(("a", "b")) is None


def test_random_is_seeded_held_and_uses_typical_sizes() -> None:
    first, again = (mode_actions("random", DOOM, TYPICAL, 200, 3) for _ in range(2))
    other = mode_actions("random", DOOM, TYPICAL, 200, 4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert set(np.unique(first[:, 2])) == {-4.0, 0.0, 4.0}
    assert not first[0].any()
    changes = int((np.abs(np.diff(first[1:], axis=0)).sum(1) > 0).sum())
    assert 8 <= changes <= 70  # choices are held for several frames


def test_random_without_meaningful_names_picks_single_columns() -> None:
    rows = resolve("random", ("action_0", "action_1", "action_2"), 100)
    assert set(rows[1:].sum(1)) == {1.0}
    assert (rows.sum(0) > 0).all()


def test_a_mode_that_the_names_do_not_explain_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"actions=left, but no column.*action_0.*actions=random"):
        resolve("left", ("action_0", "action_1"))


def test_unknown_modes_list_the_valid_ones_nearest_first() -> None:
    with pytest.raises(ConfigError, match=r"'forwards'; expected one of: forward,"):
        resolve("forwards")
    with pytest.raises(ConfigError, match="trained without any"):
        resolve("forward", ())


def test_files_and_arrays(tmp_path: Path) -> None:
    table = np.arange(30, dtype=np.float64).reshape(6, 5)
    np.save(tmp_path / "a.npy", table)
    np.savetxt(tmp_path / "a.csv", table, delimiter=",")
    (tmp_path / "named.csv").write_text("turn_right_degrees, move_forward\n2,1\n3,0\n")
    for given in (table, str(tmp_path / "a.npy"), str(tmp_path / "a.csv")):
        assert np.array_equal(resolve(given), table)
    assert resolve(str(tmp_path / "named.csv")).tolist() == [[1, 0, 2, 0, 0], [0, 0, 3, 0, 0]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("twice.csv", b"attack,attack\n1,0\n", "twice"),
        ("ragged.csv", b"attack,use\n1,0\n1\n", "row 1 has 1 columns, others 2"),
        ("huge.csv", b"attack\n1e300\n", "not above"),
        ("pickle.npy", b"\x80\x04.", "no .npy file"),
    ],
)
def test_broken_tables_say_where(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        resolve(str(tmp_path / name))


def test_the_mark_that_spreadsheets_put_first_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfattack\r\n1\r\n")
    assert resolve(str(tmp_path / "a.csv")).tolist() == [[0, 0, 0, 1, 0]]


def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((4, 7)))
    np.save(tmp_path / "nan.npy", np.full((4, 5), np.nan))
    np.save(tmp_path / "object.npy", np.array([object()]), allow_pickle=True)
    (tmp_path / "words.csv").write_text("jump\n1\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "wide.npy").read_bytes()[:100])
    for name, reason in (
        ("wide.npy", r"\(4, 7\)"),
        ("nan.npy", "finite"),
        ("object.npy", "cannot be loaded|allow_pickle"),
        ("words.csv", "'jump'"),
        ("empty.csv", "empty"),
        ("cut.npy", "no actions can be read"),
        ("missing.npy", "No such file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            resolve(str(tmp_path / name))
