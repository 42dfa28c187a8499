"""Logging: one handler on the root logger, coloured on a terminal, plain lines in a file or a job's log."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from launcher.ranks import is_rank_zero, rank_name

# what Lightning says in every run without telling anything: tips, what is not there, banners
_NOISE = (
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "💡",
    "`Trainer.fit` stopped",
    "Initializing distributed",
    "---",
)


class _WithoutNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (record.name.startswith("lightning") and (text.startswith(_NOISE) or "Restored all states" in text))


def configure_logging() -> None:
    """Sends our and Lightning's messages to standard error; ranks other than 0 send warnings only."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "is_longtake", False):
            root.removeHandler(handler)
    handler = _handler()
    handler.is_longtake = True  # type: ignore[attr-defined]
    handler.addFilter(_WithoutNoise())
    root.addHandler(handler)
    logging.getLogger("longtake").setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # it logs what it also raises
    logging.captureWarnings(True)
    warnings.formatwarning = _format_warning


def _format_warning(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    return f"warning: {message} ({Path(filename).name}:{lineno})"


def take_over_lightning() -> None:
    """Removes the handler that Lightning installs while it is imported, so that nothing is said twice."""
    logging.getLogger("lightning").handlers.clear()
    # what is meant (a run that is continued), and what only concerns torch and Lightning
    warnings.filterwarnings("ignore", message=r".*Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")


def _handler() -> logging.Handler:
    if sys.stderr.isatty() and is_rank_zero():
        return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", markup=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {rank_name()}%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    return handler
