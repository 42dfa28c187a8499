"""Keys from the terminal (or a pipe), and the last frame shown there, for actions=interactive."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from longtake.generate import Generation
from longtake.streaming import VideoChunk


def read_key(prompt: str) -> str | None:
    """Returns one key from standard input, without waiting for Enter on a terminal; None where there are no more."""
    _say(prompt)
    key = _from_terminal() if sys.stdin.isatty() else _from_pipe()
    _say(f"{key or 'end'}\n")
    return key or None


def watched(generation: Generation) -> Generation:
    """Returns a generation that shows the last frame of each chunk, where keys are asked for after it."""
    if generation.request.live is None:
        return generation

    def shown() -> Iterator[VideoChunk]:
        for chunk in generation:
            if sys.stderr.isatty():
                _say(f"\n{picture(chunk.frames[0, 0, -1])}\n")
            yield chunk

    return Generation(generation.request, shown())


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _from_pipe() -> str:
    while (key := sys.stdin.read(1)) in ("\n", "\r"):
        pass
    return key


def _from_terminal() -> str:
    try:
        import termios
        import tty
    except ImportError:  # no POSIX terminal: a line a key
        line = sys.stdin.readline()
        return line[:1] if line.strip() or line == "" else " "
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle, termios.TCSADRAIN)  # keeps what was typed ahead; Ctrl-C still ends the program
        key = sys.stdin.read(1)
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
    return "" if key == "\x04" else key  # Ctrl-D


def picture(frame: np.ndarray, columns: int = 96) -> str:
    """Returns a frame, uint8 [h w c], as coloured half blocks for a terminal, at most `columns` wide."""
    step = -(-frame.shape[1] // columns)
    small = frame[::step, ::step]
    rows = small[: len(small) // 2 * 2]
    lines = []
    for upper, lower in zip(rows[::2].tolist(), rows[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\u2580"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
