"""The samples of a tar from a stranger, one at a time: members whose names differ only after the first dot.

Nothing is ever extracted to disk, and only the members that are asked for are read. What is refused, and what
is left of a tar that was cut or damaged, is reported by name. `tarfile` itself takes a damaged header for the
end of the archive without a word, so the kind of the end is watched here.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from datamodules.sources.base import Skipped
from datamodules.sources.frame_stream import reason_of
from datamodules.sources.naming import printable

EXECUTABLE_MEMBERS = ("pkl", "pickle", "pyd", "pth", "pt", "pyc", "py", "so")
"""Last parts of member names that other tools load as code; here they are counted, named and never opened."""

_LARGEST_MEMBER = 2**31
_HEADER_ERRORS: Mapping[str, type[Exception]] = vars(tarfile)  # two of its errors are named in no stub
_END_MARK, _NO_HEADER = _HEADER_ERRORS["EOFHeaderError"], _HEADER_ERRORS["EmptyHeaderError"]
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, MemoryError, OverflowError)


@dataclass
class TarSample:
    """One sample of a tar.

    Attributes:
        key: what its members have in common: folders and name up to the first dot.
        members: what follows the first dot, and the bytes, of the members that were asked for.
        present: the names of all its members.
        problem: why a member of it could not be taken, or None.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    present: set[str] = field(default_factory=set)
    problem: str | None = None


class _End:
    """How the reading of headers ended: the mark at the end of an archive, or something else."""

    reason: str = ""
    is_marked: bool = False
    is_clean: bool = False  # between two members


def tar_samples(file: BinaryIO, tar_name: str, wanted: Callable[[str], bool]) -> Iterator[TarSample | Skipped]:
    """Yields the samples of a tar in its order, and Skipped for everything in it that is refused or damaged.

    Args:
        file: the tar, also compressed; it need not seek.
        tar_name: its name, for messages.
        wanted: says of a member name (what follows the first dot) whether to read it.
    """
    end = _End()
    seen: set[str] = set()
    sample: TarSample | None = None
    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_watched_headers(end), errorlevel=1) as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header it has seen
                name = printable(info.name)
                key, member = _split_name(info.name)
                refusal = _refusal(info, member)
                if refusal:
                    yield Skipped(f"{tar_name}/{name}", refusal)
                    continue
                if not info.isfile() or posixpath.basename(info.name).startswith("._") or not member:
                    continue
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                        seen.add(sample.key)
                    sample = TarSample(key)
                    if key in seen:
                        sample.problem = "a sample of this name came before; the second one is not used"
                if member in sample.present:
                    yield Skipped(f"{tar_name}/{name}", "a member of this name came before; the second one is not used")
                    continue
                _take(tar, info, sample, member, wanted)
    except _TAR_ERRORS as error:
        end.reason = end.reason or reason_of(error)
        end.is_marked = end.is_clean = False
    if sample is not None and (end.is_marked or end.is_clean):
        yield sample
    elif sample is not None:
        # Its next member may be what was lost, so the sample is not whole.
        yield Skipped(f"{tar_name}/{printable(sample.key)}", "the tar ends or is damaged within this sample")
    if not end.is_marked:
        yield Skipped(tar_name, f"the tar is cut or damaged ({end.reason or 'no end mark'}); what came before is used")


def _take(
    tar: tarfile.TarFile, info: tarfile.TarInfo, sample: TarSample, member: str, wanted: Callable[[str], bool]
) -> None:
    sample.present.add(member)
    if not wanted(member) or sample.problem:
        return
    if info.size > _LARGEST_MEMBER:
        sample.problem = f"its member {printable(member)} states {info.size} bytes, more than {_LARGEST_MEMBER}"
        return
    content = tar.extractfile(info)
    assert content is not None, "only regular files get here"
    sample.members[member] = content.read()


def _split_name(name: str) -> tuple[str, str]:
    folder, base = posixpath.split(name)
    stem, _, member = base.partition(".")
    return posixpath.join(folder, stem), member


def _refusal(info: tarfile.TarInfo, member: str) -> str:
    """Returns why a member is refused, or an empty string."""
    parts = info.name.replace("\\", "/").split("/")
    if info.name.startswith(("/", "\\")) or ":" in parts[0]:
        return "an absolute path; refused"
    if ".." in parts:
        return "a path that leads out of the folder; refused"
    if info.issym() or info.islnk():
        return "a link; refused"
    if info.ischr() or info.isblk() or info.isfifo() or info.issparse():
        return "a device, pipe or sparse file; refused"
    if member.rpartition(".")[2].lower() in EXECUTABLE_MEMBERS:
        return "may hold code; never opened"
    return ""


def _watched_headers(end: _End) -> type[tarfile.TarInfo]:
    """Returns a header class that notes how the headers of one archive end."""

    class WatchedHeader(tarfile.TarInfo):
        @classmethod
        def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # pyright: ignore[reportIncompatibleMethodOverride]
            try:
                return super().fromtarfile(archive)
            except _END_MARK:
                end.is_marked = True
                raise
            except tarfile.HeaderError as error:
                end.is_clean = isinstance(error, _NO_HEADER)
                end.reason = "" if end.is_clean else reason_of(error)
                raise

    return WatchedHeader
