"""What reaches the user, and what does not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from launcher.logs import configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, hydra = logging.getLogger(), logging.getLogger("hydra")
    before = (root.handlers.copy(), warnings.formatwarning, hydra.level)
    yield
    root.handlers[:], warnings.formatwarning = before[0], before[1]
    hydra.setLevel(before[2])
    logging.captureWarnings(False)
    logging.getLogger("longtake").setLevel(logging.NOTSET)


def test_messages_are_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging()  # twice must not say everything twice
    logging.getLogger("longtake").info("hello %d", 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" hello 3")
    assert "\x1b" not in line


def test_other_ranks_only_warn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    configure_logging()
    logging.getLogger("longtake").info("hello")
    logging.getLogger("longtake").warning("careful")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("[rank 2] careful")


def test_lightnings_tips_are_left_out_but_its_news_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").propagate = True
    for text in ("💡 Tip: buy something", "GPU available: False, used: False", "Restoring states from a.ckpt"):
        lightning.info(text)
    written = capsys.readouterr().err
    assert "Restoring" in written
    assert "Tip" not in written
    assert "GPU" not in written
