"""The 1X World Model Challenge, v1.1 and v2.0: a source for `make_shards`, and clips read directly for predict.

What cannot be used is counted and named: the partial last clip of a shard, clips that straddle two recordings, clips
with values that cannot be. See `onex_v1.py` and `onex_v2.py` for the files.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.sources.base import SPLITS, RawSample, Skipped, Source, SourceInfo, Task, VideoSpec
from datamodules.sources.naming import check_fractions, draw_split, plain, unique_slugs
from datamodules.sources.onex_format import Dropped, OnexClip, OnexFolder, OnexGeometry, Unit
from datamodules.sources.onex_v1 import V1Folder
from datamodules.sources.onex_v2 import V2Folder
from longtake.errors import BadSampleError, ConfigError, DataError, unknown_choice

_log = logging.getLogger("longtake")
VERSIONS: dict[str, type[OnexFolder]] = {"v1.1": V1Folder, "v2.0": V2Folder}
STATES_AS = ("actions", "states", "both", "none")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class OnexSource(Source):
    """Clips of a folder of the challenge, or of a folder that holds several (train_v2.0, val_v2.0).

    Args:
        version: "v1.1" or "v2.0".
        input: the folder.
        split: where the clips go: train, val, test, or auto, which reads it from the folder's name (train if it says
            nothing).
        val_fraction: share of the recordings of train that goes to val, for those who have no val folder.
        states_as: the robot's states become "actions" (what leads to a frame is told with it, as in the challenge),
            "states", "both" or "none".
        name: of the set; None takes "onex" and the version.
        licence: under which terms the clips may be used.
        origin: where they come from; None names the challenge.
        seed: of the split by `val_fraction`.
        settings: of the folder, see `V1Folder` and `V2Folder`.

    Raises:
        ConfigError: a setting cannot be.
    """

    def __init__(
        self,
        *,
        version: str,
        input: str | None,  # noqa: A002 (the name of the key)
        split: str = "auto",
        val_fraction: float = 0.0,
        states_as: str = "actions",
        name: str | None = None,
        licence: str = "unspecified",
        origin: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if version not in VERSIONS:
            raise unknown_choice("version of the challenge", version, VERSIONS, "source.version")
        if input is None:
            raise ConfigError("there is nothing to read; expected a folder of the challenge. Change `input`.")
        if split not in ("auto", *SPLITS):
            raise unknown_choice("split", split, ("auto", *SPLITS), "source.split")
        if states_as not in STATES_AS:
            raise unknown_choice("use of the states", states_as, STATES_AS, "source.states_as")
        check_fractions(val_fraction, 0.0)
        self._input, self._version = Path(input).expanduser().absolute(), version
        self._split, self._val_fraction, self._seed, self._states_as = split, val_fraction, seed, states_as
        self._name, self._licence, self._origin = name, licence, origin
        self._settings = {**plain(settings), "use_states": states_as != "none"}

    def info(self) -> SourceInfo:
        """Returns what is true of every clip. Raises ConfigError, or DataError if nothing can be read."""
        geometries = {folder.geometry for folder in self._folders.values()}
        if len(geometries) > 1:
            raise DataError(
                f"the folders in {self._input} hold clips of different kinds ({' and '.join(map(str, geometries))}); "
                "expected one kind. Change `input` to one of them."
            )
        geometry = geometries.pop()
        _, height, width = geometry.grid
        return SourceInfo(
            name=self._name or f"onex_{self._version.replace('.', '_')}",
            licence=self._licence,
            origin=self._origin or f"1X World Model Challenge {self._version}, tokens of {geometry.tokenizer}",
            video=VideoSpec(geometry.fps, height * geometry.ratio_space, width * geometry.ratio_space),
            action_names=geometry.columns if self._states_as in ("actions", "both") else (),
            state_names=geometry.columns if self._states_as in ("states", "both") else (),
            tokens={
                "vocab_size": geometry.vocab_size,
                "grid": list(geometry.grid),
                "ratio_time": geometry.ratio_time,
                "tokenizer": geometry.tokenizer,
            },
        )

    def tasks(self) -> list[Task]:
        """Returns a task a shard (v2.0) or range of recordings (v1.1), twice where it goes to two splits."""
        tasks = []
        for slug, folder in self._folders.items():
            split = self._split_of(folder.path)
            splits = ("train", "val") if split == "train" and self._val_fraction > 0 else (split,)
            for unit in _readable(folder.units, "input"):
                payload = {"folder": slug, "name": unit.name, "first": unit.first, "stop": unit.stop}
                for number, goes_to in enumerate(splits):
                    name = f"{slug}-{unit.name}" if len(splits) == 1 else f"{slug}-{unit.name}-{goes_to}"
                    only = goes_to if len(splits) > 1 else None
                    tasks.append(Task(name, goes_to, {**payload, "only": only, "counts": number == 0}))
        return tasks

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        """Yields the clips of a task and names what was dropped."""
        work = task.payload
        folder = self._folders[work["folder"]]
        unit = Unit(work["name"], work["first"], work["stop"])
        try:
            for clip in folder.clips(unit):
                if isinstance(clip, OnexClip):
                    sample = self._sample(work["folder"], clip)
                    if work["only"] is None or self._drawn(sample.episode) == work["only"]:
                        yield sample
                elif work["counts"]:
                    yield Skipped(f"{work['folder']}-{clip.name}", f"{clip.kind}: {clip.reason}")
        except BadSampleError as error:
            if work["counts"]:
                yield Skipped(f"{work['folder']}-{unit.name}", str(error))

    def _sample(self, slug: str, clip: OnexClip) -> RawSample:
        as_actions, as_states = self._states_as in ("actions", "both"), self._states_as in ("states", "both")
        return RawSample(
            key=f"{slug}-{clip.name}",
            episode=f"{slug}-{clip.shard}-{clip.segment}",
            tokens=clip.tokens[None],
            actions=clip.states if as_actions else None,
            states=clip.states if as_states else None,
            meta={"segment": clip.segment, "shard": clip.shard, "first_frame": clip.first_frame},
            num_frames=self._folders[slug].geometry.num_frames,
        )

    def _drawn(self, episode: str) -> str:
        return draw_split(episode, val_fraction=self._val_fraction, test_fraction=0.0, seed=self._seed)

    def _split_of(self, path: Path) -> str:
        if self._split != "auto":
            return self._split
        word = re.match(r"[a-z]*", path.name.lower())
        return _SPLIT_WORDS.get(word[0] if word else "", "train")

    @cached_property
    def _folders(self) -> dict[str, OnexFolder]:
        """The folders of this version in `input`, by a name fit for keys."""
        paths = find_folders(self._input, self._version, "input")
        slugs = unique_slugs({str(path): path.name for path in paths})
        return {slugs[str(path)]: _open_folder(self._version, path, self._settings, "input") for path in paths}


@dataclass(frozen=True)
class OnexClips:
    """Clips that were read directly.

    Attributes:
        clips: in the order of the files.
        dropped: how many clips were left out, by kind: "partial", "straddling".
        geometry: what is true of every clip.
    """

    clips: list[OnexClip]
    dropped: dict[str, int]
    geometry: OnexGeometry


def read_onex_clips(
    path: str | Path,
    *,
    version: str | None = None,
    limit: int | None = None,
    key: str = "input_tokens_dir",
    **settings: Any,
) -> OnexClips:
    """Returns the clips of one folder of the challenge, without making shards.

    Args:
        path: the folder.
        version: "v1.1" or "v2.0"; None takes what the files look like.
        limit: at most this many clips; None: all.
        key: configuration key that holds `path`, for messages.
        settings: of the folder, see `V1Folder` and `V2Folder`.

    Raises:
        ConfigError: there is no such folder, or a setting cannot be.
        DataError: a file is missing or has another size than the metadata promise, tokens or states that cannot be, or
            no clip is left. Nothing is skipped in silence: figures are computed on these clips.
    """
    path = Path(path).expanduser()
    if version is None:
        version = next((name for name, kind in VERSIONS.items() if path.is_dir() and kind.matches(path)), None)
        if version is None:
            raise _no_folder(path, list(VERSIONS), key)
    elif version not in VERSIONS:
        raise unknown_choice("version of the challenge", version, VERSIONS, "version")
    elif not (path.is_dir() and VERSIONS[version].matches(path)):
        raise _no_folder(path, [version], key)
    folder = _open_folder(version, path, settings, key)
    clips, dropped = [], Counter()
    for clip in _readable(lambda: _all_clips(folder), key):
        if isinstance(clip, Dropped):
            if clip.kind == "damaged":
                raise DataError(f"{path}, {clip.name}: {clip.reason}. Change `{key}` otherwise.")
            dropped[clip.kind] += clip.count
        elif limit is None or len(clips) < limit:
            clips.append(clip)
        if limit is not None and len(clips) == limit:
            break
    counts = ", ".join(f"{count} {kind}" for kind, count in dropped.items()) or "none"
    if not clips:
        raise DataError(f"{path} has no whole clip (dropped: {counts}); expected at least one. Change `{key}`.")
    _log.info("%s: %d clips; dropped: %s", path, len(clips), counts)
    return OnexClips(clips, dict(dropped), folder.geometry)


def find_folders(path: Path, version: str, key: str) -> list[Path]:
    """Returns `path` if it is a folder of this version, else its subfolders that are.

    Raises:
        ConfigError: there is none.
    """
    kind = VERSIONS[version]
    if path.is_dir():
        if kind.matches(path):
            return [path]
        found = sorted(child for child in path.iterdir() if child.is_dir() and kind.matches(child))
        if found:
            return found
    raise _no_folder(path, [version], key)


def _all_clips(folder: OnexFolder) -> Iterator[OnexClip | Dropped]:
    for unit in folder.units():
        yield from folder.clips(unit)


def _open_folder(version: str, path: Path, settings: dict[str, Any], key: str) -> OnexFolder:
    try:
        return VERSIONS[version](path, **settings)  # type: ignore[call-arg]
    except BadSampleError as error:
        raise DataError(f"{error}. Change `{key}`.") from error


def _readable(read: Any, key: str) -> Iterator[Any]:
    """Yields what `read()` does; what makes a shard unusable makes all of it unusable."""
    try:
        yield from read()
    except BadSampleError as error:
        raise DataError(f"{error}. Change `{key}`.") from error


def _no_folder(path: Path, versions: Sequence[str], key: str) -> ConfigError:
    what = "; or ".join(f"{VERSIONS[version].expected} ({version})" for version in versions)
    found = "is no folder" if not path.is_dir() else "holds no such files"
    return ConfigError(f"{path} {found}; expected a folder with {what}. Change `{key}`.")
