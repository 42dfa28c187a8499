"""Keys from a pipe and from a terminal, and the picture there."""

from __future__ import annotations

import io
import os
import sys
import threading

import numpy as np
import pytest

from launcher.keyboard import picture, read_key


def test_keys_of_a_pipe_come_one_by_one_and_lines_do_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w\r\n d"))
    assert [read_key("> ") for _ in range(4)] == ["w", " ", "d", None]
    assert capsys.readouterr().err.endswith("> d\n> end\n")


def test_a_terminal_gives_a_key_without_enter_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as terminal, os.fdopen(ours, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(terminal)
        threading.Timer(0.2, keyboard.write, [b"a"]).start()
        assert read_key("") == "a"
        assert termios.tcgetattr(terminal) == before


def test_a_picture_has_two_rows_a_line_and_fits() -> None:
    frame = np.zeros((48, 200, 3), np.uint8)
    frame[0, 0] = (1, 2, 3)
    frame[3, 0] = (4, 5, 6)  # the second row of every third one
    lines = picture(frame).split("\n")
    assert len(lines) == 8
    assert lines[0].count("\u2580") == 67
    assert lines[0].startswith("\x1b[38;2;1;2;3;48;2;4;5;6m")
