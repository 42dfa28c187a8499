"""A folder that is made beside its final name and put there whole, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from longtake.errors import ConfigError, DataError

try:
    import fcntl
except ImportError:  # Windows has no such lock: there, two builds of one set at once are the user's to avoid
    fcntl = None

_log = logging.getLogger("longtake")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def sibling(root: Path, suffix: str) -> Path:
    """Returns `<root>.<suffix>`. Raises ConfigError for the root of a file system."""
    if not root.name:
        raise ConfigError(f"{root} cannot be the folder of a data set; expected a folder inside another one")
    return root.with_name(f"{root.name}.{suffix}")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the lock of a folder (waits for whoever has it) and repairs what an interrupted `swap` left.

    Raises:
        DataError: the folder's parent cannot be written.
    """
    path = sibling(root, "lock")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path, root)
    try:
        with disk_errors(root):
            _recover_swap(root)
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)


def _acquire(path: Path, root: Path) -> int | None:
    if fcntl is None:
        return None
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that is building %s", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever held it has removed the file: only a lock on the file that is there now counts.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)


def swap(new: Path, root: Path) -> None:
    """Puts a whole folder in place; one that is there already goes only then."""
    old = sibling(root, "replaced")
    if root.exists():
        root.rename(old)
    new.rename(root)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    if old.exists():
        shutil.rmtree(old)


def _recover_swap(root: Path) -> None:
    old = sibling(root, "replaced")
    if not old.exists():
        return
    if root.exists():
        shutil.rmtree(old)
    else:
        old.rename(root)


@contextlib.contextmanager
def disk_errors(folder: Path, still_needed: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Turns what the disk refuses into one DataError.

    Args:
        folder: what is being written, for a message where the system names no file.
        still_needed: about how many more bytes will be written, None where nobody knows.
    """
    try:
        yield
    except OSError as error:
        text = f"{error.filename or folder} cannot be written ({error.strerror or error})"
        if error.errno in NO_SPACE:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            needed = still_needed()
            text += f"; {shutil.disk_usage(existing).free / 2**20:.0f} MiB are free"
            text += "" if needed is None else f", about {needed / 2**20:.0f} MiB are still to be written"
        raise DataError(
            f"{text}. What is done is kept in {folder}: make room, or change `output`, and run the same command."
        ) from error
