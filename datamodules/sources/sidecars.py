"""What lies beside a recording: rows of numbers (.npy), captions (.txt), tables of captions (.csv, .jsonl).

All of it comes from strangers: arrays are read without pickle, and only when their size is the one they
state.
"""

from __future__ import annotations

import csv
import io
import json
import tokenize
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datamodules.sources.frame_stream import reason_of
from datamodules.writing.sample_rules import load_npy
from longtake.errors import BadSampleError, ConfigError, DataError

_LONGEST_TEXT = 2**20


def npy_columns(path: Path) -> int | None:
    """Returns the number of columns of an array file (1 for a plain list), None if it is no such file."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape = read(file)[0]
    except (OSError, ValueError, LookupError, TypeError, SyntaxError, tokenize.TokenError, RecursionError):
        return None  # what is wrong with it is said when its recording is read
    return shape[1] if len(shape) == 2 else 1 if len(shape) == 1 else None


def load_rows(source: Path | bytes, what: str) -> np.ndarray:
    """Returns an array file as float32 [n columns]; a list of numbers is one column.

    Args:
        source: the file or its bytes.
        what: its name, for messages.

    Raises:
        BadSampleError: it is no such array, is damaged, needs pickle, or holds something that is not finite.
    """
    try:
        array = load_array(source if isinstance(source, bytes) else source.read_bytes(), what)
    except (OSError, MemoryError) as error:
        raise BadSampleError(f"{what} cannot be read ({reason_of(error)})") from error
    if array.ndim not in (1, 2) or not array.size:
        raise BadSampleError(f"{what} holds {array.dtype} {list(array.shape)}; expected numbers [rows, columns]")
    with np.errstate(over="ignore"):
        rows = array.reshape(len(array), -1).astype(np.float32)
    if not np.isfinite(rows).all():
        raise BadSampleError(f"{what} holds numbers that are not finite")
    return rows


def load_array(data: bytes, what: str) -> np.ndarray:
    """Returns any array of numbers from the bytes of an .npy file. Raises BadSampleError."""
    try:
        return load_npy(data)
    except BadSampleError as error:
        raise BadSampleError(f"{what}: {error}") from error


def load_captions(source: Path | bytes, what: str) -> list[str]:
    """Returns the captions of a text file, one a line. Raises BadSampleError when it is not readable text."""
    try:
        if isinstance(source, Path) and source.stat().st_size > _LONGEST_TEXT:
            raise BadSampleError(f"{what} is larger than {_LONGEST_TEXT} bytes")
        data = source if isinstance(source, bytes) else source.read_bytes()
        return caption_lines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{what} is not UTF-8 text") from error
    except OSError as error:
        raise BadSampleError(f"{what} cannot be read ({reason_of(error)})") from error


def caption_lines(text: str) -> list[str]:
    """Returns the lines of a text without blanks around them, empty ones left out."""
    valid = text.encode("utf-8", "replace").decode("utf-8")  # json may hold half characters
    return [" ".join(line.split()) for line in valid.replace("\0", " ").splitlines() if line.strip()]


class CaptionTable:
    """Captions by file name, from .csv, .tsv or .jsonl. Names are only ever looked up, never opened.

    A row belongs to the recording whose path below the input folder it gives, with or without the extension;
    failing that, to the only recording of that file name. Several rows for one recording are several
    captions.
    """

    def __init__(self, path: Path, *, file_column: str, caption_column: str) -> None:
        self.path = path
        self._captions: dict[str, list[str]] = {}
        for row in _table_rows(path, file_column, caption_column):
            name, caption = row[file_column], row[caption_column]
            if isinstance(name, str) and isinstance(caption, str) and caption.strip():
                self._captions.setdefault(name.replace("\\", "/").removeprefix("./"), []).extend(caption_lines(caption))
        self.unused = set(self._captions)

    def assign(self, paths: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Returns the captions of each recording.

        Args:
            paths: for each recording its file names below the input folder.
        """
        names = {entry for files in paths.values() for path in files for entry in _full_names(path)}
        bare = Counter(name for files in paths.values() for name in {n for p in files for n in _bare_names(p)} - names)
        found: dict[str, list[str]] = {}
        for recording, files in paths.items():
            keys = dict.fromkeys([name for path in files for name in _full_names(path)])
            keys |= dict.fromkeys(name for path in files for name in _bare_names(path) if bare[name] == 1)
            used = [key for key in keys if key in self._captions]
            self.unused.difference_update(used)
            found[recording] = [caption for key in used for caption in self._captions[key]]
        return found


def _full_names(path: str) -> list[str]:
    return list(dict.fromkeys([path, str(PurePosixPath(path).with_suffix(""))]))


def _bare_names(path: str) -> list[str]:
    return list(dict.fromkeys([PurePosixPath(path).name, PurePosixPath(path).stem]))


def _table_rows(path: Path, file_column: str, caption_column: str) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as a table of captions ({reason_of(error)}). Change `source.captions`."
        ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or file_column not in row or caption_column not in row:
            columns = sorted(str(key) for key in row) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(
                f"row {number} of {path} has the columns {columns}; expected {file_column!r} and "
                f"{caption_column!r}. Change `source.captions_file_column` or `source.captions_column`."
            )
    return rows
