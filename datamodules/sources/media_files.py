"""What lies in a folder of recordings: videos, folders of images, what belongs to them, and the rest counted.

Only names are looked at. Nothing outside the folder is ever listed: symbolic links are left out unless
allowed, and pipes and devices always are.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datamodules.sources.frame_stream import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from datamodules.sources.naming import natural_key

SIDECAR_EXTENSIONS = (".txt", ".npy", ".csv", ".tsv", ".json", ".jsonl")
_LINKS = "symbolic links (source.follow_symlinks=true follows them)"
_CONTROL_SUFFIX = re.compile(r"(?P<stem>.+)\.control\.(?P<type>[A-Za-z0-9_-]+)", re.DOTALL)


@dataclass
class FileTree:
    """Every usable file below a folder, as paths relative to it with forward slashes, in natural order."""

    videos: list[str] = field(default_factory=list)
    image_folders: list[str] = field(default_factory=list)
    sidecars: set[str] = field(default_factory=set)
    ignored: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """Returns what was left out, in a line, or an empty string."""
        return ", ".join(f"{count} {what}" for what, count in sorted(self.ignored.items()) if count)


@dataclass
class Media:
    """One recording, before any file of it is opened.

    Attributes:
        name: its path without the extension; with a view pattern, what all its cameras have in common.
        views: for each camera the path of its video or of its folder of images.
        control: for each control type and camera the same.
        problem: why it cannot be used, or None.
    """

    name: str
    views: dict[str, str] = field(default_factory=dict)
    control: dict[str, dict[str, str]] = field(default_factory=dict)
    problem: str | None = None


def list_tree(root: Path, *, follow_symlinks: bool) -> FileTree:
    """Returns the files below `root`. A folder with at least two images and no video is one recording."""
    tree = FileTree()
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=follow_symlinks):
        here = Path(folder)
        subfolders[:] = sorted(name for name in subfolders if _may_enter(here / name, seen, follow_symlinks, tree))
        videos, images = [], []
        for name in names:
            path = here / name
            extension = path.suffix.lower()
            if name.startswith("."):
                continue
            if path.is_symlink() and not follow_symlinks:
                tree.ignored[_LINKS] += 1
            elif not path.is_file():
                tree.ignored["pipes, devices or broken links"] += 1
            elif extension in VIDEO_EXTENSIONS:
                videos.append(relative(path, root))
            elif extension in IMAGE_EXTENSIONS:
                images.append(name)
            elif extension in SIDECAR_EXTENSIONS:
                tree.sidecars.add(relative(path, root))
            else:
                tree.ignored[f"files ending in {extension}" if extension else "files without an ending"] += 1
        tree.videos += videos
        if len(images) > 1 and not videos:
            tree.image_folders.append(relative(here, root))
        elif images:
            tree.ignored["single images, or images beside videos"] += len(images)
    tree.videos.sort(key=natural_key)
    tree.image_folders.sort(key=natural_key)
    return tree


def image_paths(folder: Path, *, follow_symlinks: bool) -> list[Path]:
    """Returns the images directly in a folder, in natural order."""
    paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and not p.name.startswith(".")]
    usable = [path for path in paths if path.is_file() and (follow_symlinks or not path.is_symlink())]
    return sorted(usable, key=lambda path: natural_key(path.name))


def relative(path: Path, root: Path) -> str:
    """Returns `path` below `root` with forward slashes."""
    return path.relative_to(root).as_posix()


def without_extension(path: str) -> str:
    """Returns a relative path without the ending of a video; a folder keeps its name."""
    pure = PurePosixPath(path)
    return str(pure.with_suffix("")) if pure.suffix.lower() in VIDEO_EXTENSIONS else str(pure)


def split_control(path: str, control_folder: str | None) -> tuple[str, str] | None:
    """Returns (control type, path without extension of the video it belongs to) of a control video, else
    None.

    Either `clip.control.depth.mp4` beside `clip.mp4`, or `control/depth/clip.mp4` for `clip.mp4`.
    """
    stem = without_extension(path)
    match = _CONTROL_SUFFIX.fullmatch(stem)
    if match:
        return match["type"], match["stem"]
    parts = PurePosixPath(stem).parts
    if control_folder and control_folder in parts[:-2]:
        at = parts.index(control_folder)
        return parts[at + 1], str(PurePosixPath(*parts[:at], *parts[at + 2 :]))
    return None


def group_media(
    tree: FileTree,
    *,
    view_pattern: re.Pattern[str] | None,
    views: list[str] | None,
    control_folder: str | None,
) -> list[Media]:
    """Returns the recordings of a folder, in natural order; those with a view too few or too many carry their
    problem.

    Args:
        tree: the files.
        view_pattern: matches a whole relative path without extension and names the groups `view` and,
            optionally, `episode`; without that group a recording is the path with the view cut out. None:
            each file is a recording.
        views: the cameras that a recording must have, in order; None takes those that are found.
        control_folder: name of the folder with control videos, or None.
    """
    main: dict[str, list[tuple[str, str]]] = defaultdict(list)  # recording -> (view, path)
    owners: dict[str, list[tuple[str, str]]] = defaultdict(list)  # path without extension -> (recording, view)
    controls: list[tuple[str, str, str]] = []
    for path in sorted([*tree.videos, *tree.image_folders], key=natural_key):
        control = split_control(path, control_folder)
        if control is not None:
            controls.append((*control, path))
            continue
        stem = without_extension(path)
        if view_pattern is None:
            name, view = path, "main"
        else:
            match = view_pattern.fullmatch(stem)
            if match is None or (views is not None and match["view"] not in views):
                tree.ignored["videos that source.view_pattern does not match"] += 1
                continue
            name, view = _episode_of(stem, match), match["view"]
        main[name].append((view, path))
        owners[stem].append((name, view))
    wanted = views or (sorted({view for entries in main.values() for view, _ in entries}, key=natural_key))
    media = {name: _media(name, entries, wanted) for name, entries in main.items()}
    for kind, stem, path in controls:
        for name, view in owners[stem]:
            media[name].control.setdefault(kind, {})[view] = path
        if not owners[stem]:
            tree.ignored["control videos without the video that they belong to"] += 1
    return list(media.values())


def _episode_of(stem: str, match: re.Match[str]) -> str:
    if "episode" in match.re.groupindex and match["episode"]:
        return match["episode"]
    begin, end = match.span("view")
    return (stem[:begin] + stem[end:]).strip("/_-. ") or stem


def _media(name: str, entries: list[tuple[str, str]], wanted: list[str]) -> Media:
    media = Media(name)
    for view, path in entries:
        if view in media.views:
            media.problem = f"view {view} is there twice: {media.views[view]} and {path}"
        media.views.setdefault(view, path)
    missing = [view for view in wanted if view not in media.views]
    if missing:
        media.problem = f"view {', '.join(missing)} is missing; there is {', '.join(media.views)}"
    media.views = {view: media.views[view] for view in wanted if view in media.views}
    return media


def _may_enter(path: Path, seen: set[str], follow_symlinks: bool, tree: FileTree) -> bool:
    if path.name.startswith(".") or path.name == "__MACOSX":
        return False
    if not follow_symlinks:
        tree.ignored[_LINKS] += path.is_symlink()
        return not path.is_symlink()
    real = os.path.realpath(path)
    if real in seen:
        return False  # a loop, or a folder that is listed already
    seen.add(real)
    return True
