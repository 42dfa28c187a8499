"""Actions for a rollout: from a file, or a named mode such as "forward" held for the whole video."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longtake.errors import ConfigError, unknown_choice
from longtake.keyed import keyed_below

MODES = ("forward", "backward", "left", "right", "random")
_HOLD = (3, 12)  # frames for which "random" keeps one choice
_MAX_BYTES = 1 << 28
_LARGEST = 1e6  # of anything that is done in a frame, in any unit; beyond it a network answers with NaN


def resolve_actions(
    given: str | np.ndarray, names: Sequence[str], typical: Sequence[float], num_frames: int, seed: int | str
) -> np.ndarray:
    """Returns actions float32 [t a]; row t is what produces frame t, and row 0 of a mode is null.

    Args:
        given: a named mode, the path of an .npy or .csv file, or an array [t a].
        names: of the columns, as in the training data.
        typical: usual magnitude of each column where it is not zero.
        num_frames: frames of the video.
        seed: of "random"; anything that tells one video from another.

    Raises:
        ConfigError: an unknown mode, a file that cannot be read, or values that do not fit.
    """
    if not names:
        raise ConfigError("actions were given, but these weights were trained without any. Leave out `actions`.")
    if isinstance(given, np.ndarray):
        return _checked(given, names, "the given actions")
    if given in MODES:
        return mode_actions(given, names, typical, num_frames, seed)
    path = Path(given)
    if path.suffix.lower() not in (".npy", ".csv"):
        choices = [*MODES, "interactive (predict.py, rollout=memory)", "<file>.npy", "<file>.csv"]
        raise unknown_choice("mode of actions", given, choices, "actions")
    return _checked(_read(path, names), names, str(path))


def mode_actions(
    mode: str, names: Sequence[str], typical: Sequence[float], num_frames: int, seed: int | str
) -> np.ndarray:
    """Returns the actions of a named mode, float32 [t a]. Raises ConfigError where no column says what moves."""
    rows = np.zeros((num_frames, len(names)), np.float32)
    if mode != "random":
        rows[1:] = held_row(mode, names, typical)
        return rows
    choices = _choices(names, typical)
    frame, span = 1, 0
    while frame < num_frames:
        choice = keyed_below(len(choices), "action", seed, span)
        length = _HOLD[0] + keyed_below(_HOLD[1] - _HOLD[0] + 1, "action hold", seed, span)
        rows[frame : frame + length] = choices[choice]
        frame, span = frame + length, span + 1
    return rows


def turn_column(names: Sequence[str]) -> tuple[int, int] | None:
    """Returns (column, sign of a turn to the right) of what turns the camera; None where no name says so."""
    for words, sign in ((("turn", "right"), 1), (("turn", "left"), -1), (("yaw",), 1), (("turn",), 1), (("steer",), 1)):
        for column, name in enumerate(names):
            if all(word in name.lower() for word in words):
                return column, sign
    return None


def held_row(mode: str, names: Sequence[str], typical: Sequence[float]) -> np.ndarray:
    """Returns the row [a] of a mode that holds one thing. Raises ConfigError where no column says what moves."""
    row = np.zeros(len(names), np.float32)
    if mode in ("forward", "backward"):
        column, sign = _column(mode, names), 1 if mode == "forward" else -1
        if column is None and mode == "backward":
            column, sign = _column("forward", names), -1
        elif mode == "backward":
            sign = 1  # a column of its own
    else:
        found = turn_column(names)
        own = _column(mode, names)
        column, sign = (found[0], found[1] if mode == "right" else -found[1]) if found else (own, 1)
    if column is None:
        raise ConfigError(
            f"actions={mode}, but no column of the actions is named so that its meaning is clear ({', '.join(names)}); "
            "expected a name with forward, turn or yaw in it. Give a file (`actions=<file>.csv`) or actions=random."
        )
    row[column] = sign * typical[column]
    return row


def _choices(names: Sequence[str], typical: Sequence[float]) -> list[np.ndarray]:
    """Returns what "random" picks from: walking and turning together, or single columns where names say nothing."""
    try:
        forward, left, right = (held_row(mode, names, typical) for mode in ("forward", "left", "right"))
    except ConfigError:
        return [np.eye(len(names), dtype=np.float32)[column] * typical[column] for column in range(len(names))]
    return [forward, forward + left, forward + right, left, right]


def _column(word: str, names: Sequence[str]) -> int | None:
    return next((column for column, name in enumerate(names) if word in name.lower()), None)


def _read(path: Path, names: Sequence[str]) -> np.ndarray:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes; expected at most {_MAX_BYTES}")
        if path.suffix.lower() == ".npy":
            return _read_npy(path)
        return _read_csv(path.read_text(encoding="utf-8-sig"), names)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"no actions can be read from {path} ({getattr(error, 'strerror', None) or error}); expected an .npy array "
            f"[frames, {len(names)}] or a .csv with the columns {', '.join(names)}. Change `actions`."
        ) from error


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":  # numpy would take it for a pickle, and advise to open it all the same
            raise ValueError("it is no .npy file")
    return np.load(path, allow_pickle=False)


def _read_csv(text: str, names: Sequence[str]) -> np.ndarray:
    """Returns the rows of a table. With a line of names columns may come in any order, and missing ones are zero."""
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    if not lines:
        raise ValueError("it is empty")
    head = [cell.strip() for cell in lines[0]]
    try:
        [float(cell) for cell in head]
    except ValueError:
        unknown = [name for name in head if name not in names]
        if unknown:
            raise ValueError(f"it has a column {unknown[0]!r}") from None
        if len(set(head)) < len(head):
            raise ValueError("a column stands there twice") from None
        rows = _numbers(lines[1:], len(head)).reshape(-1, len(head))
        table = np.zeros((len(rows), len(names)))
        table[:, [names.index(name) for name in head]] = rows
        return table
    return _numbers(lines, len(head))


def _numbers(lines: list[list[str]], columns: int) -> np.ndarray:
    short = next((number for number, line in enumerate(lines) if len(line) != columns), None)
    if short is not None:
        raise ValueError(f"row {short} has {len(lines[short])} columns, others {columns}")
    return np.array([[float(cell) for cell in line] for line in lines], np.float64)


def _checked(table: np.ndarray, names: Sequence[str], what: str) -> np.ndarray:
    fits = table.ndim == 2 and table.shape[1] == len(names) and table.dtype.kind in "fiub"
    if not fits or not (np.abs(table.astype(np.float64)) <= _LARGEST).all():
        raise ConfigError(
            f"{what}: an array of {table.dtype} {table.shape}; expected numbers [frames, {len(names)}], finite "
            f"and not above {_LARGEST:g}, with the columns {', '.join(names)}. Change `actions`."
        )
    return table.astype(np.float32)
