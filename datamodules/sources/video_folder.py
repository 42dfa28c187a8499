"""The user's own videos: any folder of video files or of folders of images, with what lies beside them.

    clip.mp4                  the video (or a folder clip/ of images)
    clip.txt                  its captions, one a line (or a table captions.csv for all)
    clip.actions.npy          one row a source frame: row j is what led from frame j-1 to frame j
    clip.states.npy           one row a source frame: what was measured when frame j was taken
    clip.control.depth.mp4    a control video, or control/depth/clip.mp4

Every key is explained in `conf/source/video_folder.yaml`.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.shards import NAME_PATTERN
from datamodules.sources.base import RawSample, Skipped, Source, SourceInfo, Task
from datamodules.sources.clip_cutter import Recording, cut_clips
from datamodules.sources.clip_settings import ClipSettings, parse_fps
from datamodules.sources.frame_stream import (
    VIDEO_EXTENSIONS,
    FrameReader,
    ImageSequenceReader,
    VideoReader,
    reason_of,
)
from datamodules.sources.media_files import (
    FileTree,
    Media,
    group_media,
    image_paths,
    list_tree,
    relative,
    without_extension,
)
from datamodules.sources.naming import (
    assign_splits,
    check_fractions,
    folder_split,
    natural_key,
    plain,
    printable,
    unique_slugs,
)
from datamodules.sources.sidecars import CaptionTable, load_captions, load_rows, npy_columns
from longtake.errors import BadSampleError, ConfigError, DataError, unknown_choice

log = logging.getLogger("longtake")
_TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.csv", "metadata.jsonl")


class VideoFolderSource(Source):
    """Clips cut from the videos below a folder; see `conf/source/video_folder.yaml`."""

    def __init__(
        self,
        *,
        input: str | None,  # noqa: A002 (the name of the key)
        name: str | None,
        licence: str,
        origin: str | None,
        seed: int,
        split_by: str,
        val_fraction: float,
        test_fraction: float,
        follow_symlinks: bool,
        frames_fps: Any,
        view_pattern: str | None,
        views: list[str] | None,
        rig: dict[str, Any] | None,
        control_folder: str | None,
        captions: str | None,
        captions_file_column: str,
        captions_column: str,
        action_names: list[str] | None,
        state_names: list[str] | None,
        use_actions: bool,
        use_states: bool,
        **clips: Any,
    ) -> None:
        self._input, self._name, self._licence, self._origin = input, name, licence, origin
        self._seed, self._split_by, self._fractions = seed, split_by, (val_fraction, test_fraction)
        self._follow_symlinks, self._control_folder = bool(follow_symlinks), control_folder
        self._views, self._rig = plain(views), plain(rig)
        self._captions, self._columns = captions, (captions_file_column, captions_column)
        self._names = {"actions": plain(action_names), "states": plain(state_names)}
        self._used = {"actions": bool(use_actions), "states": bool(use_states)}
        self._settings = ClipSettings.from_config(plain(clips))
        self._frames_fps = parse_fps(frames_fps, "source.frames_fps")
        self._view_pattern = _compile_views(view_pattern)
        check_fractions(val_fraction, test_fraction)
        if split_by not in ("auto", "folder", "hash"):
            raise unknown_choice("way to split", split_by, ("auto", "folder", "hash"), "source.split_by")

    def info(self) -> SourceInfo:
        tree, media = self._list()
        views = self._views or sorted({view for item in media for view in item.views}, key=natural_key)
        kinds = sorted({kind for item in media for kind in item.control})
        for what, name in [("view", view) for view in views] + [("control type", kind) for kind in kinds]:
            if not NAME_PATTERN.fullmatch(name):
                raise ConfigError(
                    f"{what} {name!r} cannot be the name of a shard member; expected letters, digits, _ and "
                    "-. Change `source.view_pattern`, or rename the files."
                )
        actions = self._column_names("actions", tree, media)
        self._settings.action_rules(actions)
        root = self._root()
        return SourceInfo(
            name=self._name or printable(root.name),
            licence=self._licence,
            origin=self._origin or f"videos in {printable(root.name)}",
            video=self._settings.video,
            view_names=tuple(views) or ("main",),
            action_names=tuple(actions),
            state_names=tuple(self._column_names("states", tree, media)),
            control_types=tuple(kinds),
            rig=self._rig,
        )

    def tasks(self) -> list[Task]:
        tree, media = self._list()
        if not media:
            raise DataError(
                f"no video in {self._root()}; expected files ending in {', '.join(VIDEO_EXTENSIONS)} or "
                f"folders of at least two images. There are: {tree.summary() or 'no files'}. Change `input`."
            )
        keys = unique_slugs({item.name: self._title(item.name) for item in media})
        splits = self._splits(media)
        captions = self._table_captions(media)
        columns = {what: self._column_names(what, tree, media) for what in self._names}
        tasks = []
        for item in media:
            payload = self._payload(item, tree, columns)
            payload |= {"key": keys[item.name], "captions": captions.get(item.name, [])}
            tasks.append(Task(keys[item.name], splits[item.name], payload))
        self._report(tree, tasks)
        return tasks

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        payload = task.payload
        name = printable(payload["name"])
        if payload["problem"]:
            yield Skipped(name, payload["problem"])
            return
        captions, beside = list(payload["captions"]), payload["caption_file"]
        try:
            if beside:
                captions = load_captions(self._path(beside), beside) + captions
        except BadSampleError as error:
            yield Skipped(printable(beside), f"{error}; its clips have no caption of it")
        try:
            recording = self._recording(payload, name, captions)
        except BadSampleError as error:
            yield Skipped(name, str(error))
            return
        yield from cut_clips(recording, self._settings, payload["columns"]["actions"])

    def _recording(self, payload: dict[str, Any], name: str, captions: list[str]) -> Recording:
        rows: dict[str, Any] = {}
        for what in ("actions", "states"):
            if not payload[what]:
                rows[what] = None
                continue
            rows[what] = load_rows(self._path(payload[what]), Path(payload[what]).name)
            expected = len(payload["columns"][what])
            if rows[what].shape[1] != expected:
                raise BadSampleError(f"its {what} have {rows[what].shape[1]} columns, those of the set {expected}")
        return Recording(
            name=name,
            key=payload["key"],
            episode=payload["key"],
            views={view: self._reader(path) for view, path in payload["views"].items()},
            control={
                kind: {view: self._reader(path) for view, path in views.items()}
                for kind, views in payload["control"].items()
            },
            captions=captions,
            **rows,
        )

    def _reader(self, path: str) -> FrameReader:
        full = self._path(path)
        if not full.is_dir():
            return VideoReader(full)
        try:
            images = image_paths(full, follow_symlinks=self._follow_symlinks)
        except OSError as error:
            raise BadSampleError(f"its folder cannot be listed ({reason_of(error)})") from error
        return ImageSequenceReader(images, self._frames_fps)

    def _root(self) -> Path:
        """Returns the folder that paths are relative to. Raises ConfigError when the input is not there."""
        if self._input is None:
            raise ConfigError("no input was given; expected a folder of videos or one video. Change `input`.")
        path = Path(self._input).expanduser().absolute()
        if not path.exists():
            raise ConfigError(
                f"input {str(path)!r} does not exist; expected a folder of videos or one video. Change `input`."
            )
        return path if path.is_dir() else path.parent

    def _path(self, path: str) -> Path:
        return self._root() / path

    def _title(self, name: str) -> str:
        return self._root().name if name == "." else without_extension(name)

    def _list(self) -> tuple[FileTree, list[Media]]:
        root = self._root()
        tree = list_tree(root, follow_symlinks=self._follow_symlinks)
        only = Path(str(self._input)).expanduser().absolute()
        if only != root:  # one file was named: the others of its folder only serve it
            videos = [path for path in tree.videos if path == relative(only, root)]
            tree = FileTree(videos=videos, sidecars=tree.sidecars)
        media = group_media(
            tree, view_pattern=self._view_pattern, views=self._views, control_folder=self._control_folder
        )
        return tree, media

    def _splits(self, media: list[Media]) -> dict[str, str]:
        folders = {item.name: folder_split(next(iter(item.views.values()), item.name)) for item in media}
        named = {split for split in folders.values() if split}
        if self._split_by == "folder" or (self._split_by == "auto" and None not in folders.values() and len(named) > 1):
            outside = [name for name, split in folders.items() if split is None]
            if outside:
                raise ConfigError(
                    f"{printable(outside[0])} and {len(outside) - 1} more lie in no folder named after a "
                    "split; expected train/, val/, test/ or long/. Change `source.split_by`."
                )
            return {name: split for name, split in folders.items() if split}
        val, test = self._fractions
        return assign_splits(folders, val_fraction=val, test_fraction=test, seed=self._seed)

    def _table_captions(self, media: list[Media]) -> dict[str, list[str]]:
        root = self._root()
        if self._captions is None:
            found = [root / name for name in _TABLES if (root / name).is_file()]
        else:
            given = Path(self._captions).expanduser()
            found = [path for path in (root / given, given) if path.is_file()][:1]
            if not found:
                raise ConfigError(
                    f"there is no table {self._captions!r}, neither in {root} nor here. Change `source.captions`."
                )
        if not found:
            return {}
        table = CaptionTable(found[0], file_column=self._columns[0], caption_column=self._columns[1])
        captions = table.assign({item.name: [item.name, *item.views.values()] for item in media})
        if table.unused:
            example = printable(min(table.unused))
            log.warning("%s: %d names match no video, for example %r", found[0].name, len(table.unused), example)
        return captions

    def _bases(self, item: Media) -> list[str]:
        """Returns what the names of the files beside a recording may begin with."""
        stems = [without_extension(path) for path in item.views.values()]
        return list(dict.fromkeys([without_extension(item.name), *stems]))

    def _beside(self, item: Media, tree: FileTree, ending: str) -> str | None:
        names = [f"{base}.{ending}" for base in self._bases(item)]
        names += [os.path.normpath(f"{base}/{ending}") for base in self._bases(item)]  # inside a folder of images
        return next((name for name in names if name in tree.sidecars), None)

    def _payload(self, item: Media, tree: FileTree, columns: dict[str, list[str]]) -> dict[str, Any]:
        payload: dict[str, Any] = {"name": self._title(item.name) if item.name == "." else item.name}
        payload |= {"views": item.views, "control": item.control, "problem": item.problem, "columns": columns}
        payload["caption_file"] = self._beside(item, tree, "txt") or self._beside(item, tree, "caption.txt")
        for what in ("actions", "states"):
            payload[what] = self._beside(item, tree, f"{what}.npy") if self._used[what] else None
            if columns[what] and payload[what] is None and not item.problem:
                payload["problem"] = (
                    f"it has no {what} and other recordings do; expected a file "
                    f"{Path(self._bases(item)[0]).name}.{what}.npy (source.use_{what}=false makes a set "
                    f"without {what})"
                )
        return payload

    def _column_names(self, what: str, tree: FileTree, media: list[Media]) -> list[str]:
        """Returns the names of the columns: as given, else numbered, as many as most of the files have."""
        paths = [path for item in media if (path := self._beside(item, tree, f"{what}.npy"))]
        if not paths or not self._used[what]:
            return []
        if self._names[what] is not None:
            return list(self._names[what])
        counts = Counter(count for path in paths if (count := npy_columns(self._path(path))))
        return [
            f"{what.removesuffix('s')}_{index}" for index in range(max(counts, key=lambda c: (counts[c], c), default=0))
        ]

    def _report(self, tree: FileTree, tasks: list[Task]) -> None:
        shares = Counter(task.split for task in tasks)
        without = sum(not task.payload["captions"] and not task.payload["caption_file"] for task in tasks)
        log.info(
            "%d recordings in %s: %s",
            len(tasks),
            self._root(),
            ", ".join(f"{n} {s}" for s, n in shares.items()),
        )
        if len(shares) == 1 and any(self._fractions):
            log.warning(
                "all of it goes to the split %s: a recording is never in two splits, and there is one",
                next(iter(shares)),
            )
        if without:
            log.info("%d of %d recordings have no caption", without, len(tasks))
        if tree.summary():
            log.info("left out: %s", tree.summary())
        used = {task.payload[what] for task in tasks for what in ("actions", "states", "caption_file")}
        unused = sorted(path for path in tree.sidecars - used if path.endswith((".npy", ".txt")))
        if unused and all(self._used.values()):
            log.warning(
                "%d .npy and .txt files belong to no recording, for example %s; expected "
                "<video>.actions.npy, <video>.states.npy or <video>.txt",
                len(unused),
                printable(unused[0]),
            )
        if self._licence == "unspecified":
            log.info("the licence of these videos is recorded as unspecified; state it with `source.licence=...`")


def _compile_views(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is not a regular expression ({error}). Change `source.view_pattern`."
        ) from error
    if "view" not in compiled.groupindex:
        raise ConfigError(
            f"{pattern!r} has no group named view; expected for example "
            "'(?P<episode>.+)_(?P<view>front|left|right)'. Change `source.view_pattern`."
        )
    return compiled
