"""The folder that the 1X challenge's compression track takes: one `<id>.npz` a sample and a README.txt, flat, zipped.

Every npz holds `indices` int32 and `values` float32, [t h w 500] (v2.0: t, h, w = 3, 32, 32; 450 samples).
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from longtake.errors import ConfigError, DataError
from longtake.metrics.token_top500 import K

FIELDS = ("method", "team", "authors", "e-mail", "institution", "country")
GRID = (3, 32, 32)
VOCAB_SIZE = 64000
README = "README.txt"
_ID = re.compile(r"[A-Za-z0-9_-]+")
_HEAD_BYTES = 4096


def write_submission(
    path: Path, samples: Iterable[tuple[str, np.ndarray, np.ndarray]], readme: Mapping[str, str]
) -> int:
    """Writes a submission, sample by sample; returns how many.

    Args:
        path: `<name>.zip`; it appears when it is whole.
        samples: (id, indices [t h w k], values [t h w k]) of each.
        readme: all of `FIELDS`.

    Raises:
        ConfigError: a field is missing, or the path does not end in .zip.
        DataError: an id that cannot be a file name or comes twice, or the file cannot be written.
    """
    if path.suffix != ".zip":
        raise ConfigError(f"a submission is one zip file; expected <name>.zip, got {path.name!r}. Change `submission`.")
    missing = [name for name in FIELDS if not str(readme.get(name, "")).strip()]
    if missing:
        raise ConfigError(
            f"the submission does not state its {', '.join(missing)}. Set `submission_readme.{missing[0]}`."
        )
    temporary = path.with_name(f".{path.name}.tmp")
    written: set[str] = set()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(README, "".join(f"{name}: {readme[name]}\n" for name in FIELDS))
            for name, indices, values in samples:
                if not _ID.fullmatch(name) or name in written:
                    raise DataError(
                        f"sample {name!r} cannot be written; expected different ids of letters, digits, _, -"
                    )
                written.add(name)
                content = io.BytesIO()
                np.savez_compressed(content, indices=indices.astype(np.int32), values=values.astype(np.float32))
                archive.writestr(f"{name}.npz", content.getvalue())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}; choose another `submission`") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(written)


def check_submission(
    path: Path,
    *,
    num_samples: int | None = 450,
    grid: tuple[int, int, int] = GRID,
    vocab_size: int = VOCAB_SIZE,
    k: int = K,
) -> list[str]:
    """Returns everything that is wrong with a submission, a sentence each; an empty list: it can be sent.

    Args:
        path: a zip file, or a folder that is to become one.
        num_samples: how many the track wants; None: any number.
        grid: latent frames, rows, columns.
        vocab_size: tokens are 0 to vocab_size - 1.
        k: tokens a place.
    """
    try:
        members = _members(path)
    except (OSError, zipfile.BadZipFile) as error:
        return [f"{path} cannot be read: {error}"]
    names = [name for name, _ in members]
    problems = [f"{name} lies in a folder; expected a flat archive" for name in names if "/" in name.rstrip("/")]
    problems += [f"{name} does not belong here" for name in names if name != README and not name.endswith(".npz")]
    samples = [name for name in names if name.endswith(".npz")]
    if num_samples is not None and len(samples) != num_samples:
        problems.append(f"there are {len(samples)} samples; expected {num_samples}")
    if README in names:
        text = _read(path, README, 1 << 16).decode("utf-8", errors="replace").lower()
        problems += [
            f"{README} does not state {field}" for field in FIELDS if not re.search(rf"^{field}:.*\S", text, re.M)
        ]
    else:
        problems.append(f"{README} is missing")
    shape = (*grid, k)
    for name in samples:
        problem = _sample_problem(path, name, shape, vocab_size)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def _sample_problem(path: Path, name: str, shape: tuple[int, ...], vocab_size: int) -> str | None:
    most = 2 * (int(np.prod(shape)) * 4 + _HEAD_BYTES)
    try:
        content = io.BytesIO(_read(path, name, most))
        with zipfile.ZipFile(content) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > most:
            return f"it unpacks to {size} bytes; expected at most {most}"
        with np.load(content, allow_pickle=False) as arrays:
            indices, values = arrays["indices"], arrays["values"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"
    for what, array, dtype in (("indices", indices, np.int32), ("values", values, np.float32)):
        if array.dtype != dtype or array.shape != shape:
            return f"{what} are {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}"
    if indices.min() < 0 or indices.max() >= vocab_size:
        return f"indices run from {indices.min()} to {indices.max()}; expected 0 to {vocab_size - 1}"
    if not np.isfinite(values).all():
        return "values hold NaN or infinity"
    ordered = np.sort(indices, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "a token is given twice at one place"
    return None


def _members(path: Path) -> list[tuple[str, int]]:
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return [(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, info.file_size) for info in archive.infolist()]


def _read(path: Path, name: str, most: int) -> bytes:
    """Returns a member of at most so many bytes. Raises ValueError for a larger one."""
    size = dict(_members(path))[name] if path.is_dir() else None
    if path.is_dir():
        if size is not None and size > most:
            raise ValueError(f"it has {size} bytes; expected at most {most}")
        return (path / name).read_bytes()
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(name).file_size
        if size > most:
            raise ValueError(f"it has {size} bytes; expected at most {most}")
        return archive.read(name)
