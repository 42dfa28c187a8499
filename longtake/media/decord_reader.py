"""Reading with decord: only bytes that were checked before (see `read.check_video`). It bundles FFmpeg 4.1.

On damaged video it may crash the process (a cut fast-start mp4 opened from memory), wait for ever for a frame
that never comes, or hand out damaged or repeated frames as if they were good.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from longtake.errors import BadSampleError
from longtake.media.containers import describe

# The share of frames that decord may replace by a neighbour. 0 would mean "any number"; this rounds down to
# none.
_FAULT_TOLERANCE = 1e-9


class DecordFailedError(BadSampleError):
    """decord gave up, which says little about the video: it cannot copy frames of some widths (8, 24, 48, 72, ...)."""


@functools.cache
def load_decord() -> ModuleType | None:
    """Returns the decord module, or None where it cannot be imported (decord2 installs the same name)."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        logging.getLogger("longtake").info("decord cannot be imported (%s): PyAV reads all videos", error)
        return None
    return decord


def read(source: Path | bytes, frames: Sequence[int] | None) -> np.ndarray:
    """Returns the wanted frames, uint8 [t h w c].

    Raises:
        BadSampleError: decord reports an error, or an index is out of range.
    """
    decord = load_decord()
    assert decord is not None, "read() was called without decord"
    name = describe(source)
    try:
        with _as_path(source) as path:
            reader = decord.VideoReader(path, num_threads=1, fault_tol=_FAULT_TOLERANCE)
            count = len(reader)
            wanted = np.arange(count) if frames is None else np.asarray(frames, dtype=np.int64)
            if wanted.min() < 0 or wanted.max() >= count:
                raise BadSampleError(f"{name}: frames {wanted.min()} to {wanted.max()} were asked for, it has {count}")
            if np.all(np.diff(wanted) > 0):
                return _numpy(reader.get_batch(wanted))
            ascending, inverse = np.unique(wanted, return_inverse=True)  # decord seeks back for every step back
            return _numpy(reader.get_batch(ascending))[inverse]
    except BadSampleError:
        raise
    except (
        decord.DECORDError,
        RuntimeError,
        AssertionError,
        IndexError,
        ValueError,
        OSError,
        MemoryError,
    ) as error:
        raise DecordFailedError(f"{name}: decord: {_first_line(error)}") from error


def _numpy(batch: object) -> np.ndarray:
    """decord hands out what its bridge says, a setting of the whole process that is the user's to keep."""
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # type: ignore[attr-defined]


@contextmanager
def _as_path(source: Path | bytes) -> Iterator[str]:
    """Yields a path that decord can open: never from memory, which is where its crashes were seen."""
    if isinstance(source, Path):
        yield str(source.resolve())  # absolute, so that no name is taken for a protocol
    elif hasattr(os, "memfd_create") and _has_proc():
        descriptor = os.memfd_create("longtake", os.MFD_CLOEXEC)
        try:
            view = memoryview(source)
            while view:
                view = view[os.write(descriptor, view) :]
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="longtake-") as folder:
            path = Path(folder) / "clip.mp4"
            path.write_bytes(source)
            yield str(path)


@functools.cache
def _has_proc() -> bool:
    return Path("/proc/self/fd").is_dir()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split("] ", 1)[-1] if lines else type(error).__name__
