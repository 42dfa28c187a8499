"""What a multi-view spec may say: the keys of Cosmos-Transfer2.5, those of its older forks, and what each must be.

A spec is one JSON object: settings, and for every view an object under the view's name. Everything is checked here that
can be checked without opening a video and without weights. Every error names the key.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from launcher.compose import nearest
from launcher.view_inputs import control_weight
from longtake.errors import ConfigError

GIVEN_PX = (0, 1, 5)
"""Frames that a view may be given: 0 = text to world, 1 = image to world, 5 = video to world."""

Check = Callable[[Any], Any]


class SpecError(ValueError):
    """What is expected of a value, to be put after the value that was found."""


def _weight(value: Any) -> float | dict[str, float]:
    """A number, or an object with a number a control type."""
    try:
        return control_weight(0.0 if value is None else value)
    except ConfigError:
        raise SpecError('a number from 0 to 1, or an object such as {"depth": 1, "labels": 0.5}') from None


def _whole(low: int, high: int | None = None) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise SpecError(f"a whole number of {low} or more" if high is None else f"a whole number {low} to {high}")
        return value

    return check


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise SpecError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SpecError("a text")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """A text, or a list of texts: one a chunk, the last of them for all further ones."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not found or not all(isinstance(text, str) for text in found):
        raise SpecError("a text, or a list of texts, one a chunk")
    return found


def given_px(value: Any) -> int:
    """Returns how many frames are given. Raises SpecError for others than 0, 1, 5."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in GIVEN_PX:
        older = "; older forks counted latent frames, and their 2 is 5 here" if value == 2 else ""
        raise SpecError(f"{', '.join(map(str, GIVEN_PX))} (pixel frames{older})")
    return value


def frame_rate(value: Any) -> Fraction:
    """Returns frames per second from a number or a text such as "35/3"."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        rate = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise SpecError("a number above 0, or a fraction such as 35/3")
    return rate


def _given_by_view(value: Any) -> dict[str, int]:
    if not isinstance(value, dict):
        raise SpecError('an object such as {"front_wide": 1}')
    return {str(name): given_px(count) for name, count in value.items()}


def _one_of(*names: str) -> Check:
    def check(value: Any) -> str:
        if value not in names:
            raise SpecError(f"one of: {', '.join(names)}")
        return value

    return check


_PRESETS = _one_of("none", "very_low", "low", "medium", "high", "very_high")

KEYS: dict[str, Check] = {
    "name": _text,
    "prompt": _texts,
    "prompt_path": _text,
    "negative_prompt": _text,
    "seed": _whole(0),
    "guidance": _whole(0, 7),
    "num_conditional_frames": given_px,
    "control_weight": _weight,
    "fps": frame_rate,
    "num_steps": _whole(1),
    "enable_autoregressive": _switch,
    "num_chunks": _whole(1),
    "chunk_overlap": _whole(0),
    "save_combined_views": _switch,
    # the first release
    "save_individual_views": _switch,
    "save_view_grid": _switch,
    # the fork that was autoregressive first
    "output_dir": _text,
    "n_views": _whole(1),
    "num_video_frames_loaded_per_view": _whole(1),
    "num_video_frames_per_view": _whole(1),
    "minimum_start_index": _whole(0),
    "no_cond_rear_tele": _switch,
    "num_conditional_frames_per_view": _given_by_view,
    # robot views
    "num_video_frames_per_chunk": _whole(1),
    "target_height": _whole(2),
    "target_width": _whole(2),
    "add_camera_prefix": _switch,
    "use_negative_prompt": _switch,
    "preset_edge_threshold": _PRESETS,
    "preset_blur_strength": _PRESETS,
}

VIEW_KEYS = ("input_path", "control_path", "mask_path", "num_conditional_frames_per_view", "prompt")


@dataclass(frozen=True)
class ViewSpec:
    """What a spec says of one view.

    Attributes:
        name: of the view, as in the rig.
        input_path: video that its given frames come from.
        control_path: its control videos by type; the type "" is the only one that the weights know. None: there is no
            file; edges are extracted from `input_path`.
        mask_path: by type, videos that are white where control counts; the type "" is all of them.
        given_px: how many frames are given; None: as all views.
        prompt: its own texts, one a chunk; None: as all views.
    """

    name: str
    input_path: Path | None = None
    control_path: Mapping[str, Path | None] = field(default_factory=dict)
    mask_path: Mapping[str, Path] = field(default_factory=dict)
    given_px: int | None = None
    prompt: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Spec:
    """One sample of a spec file.

    Attributes:
        name: of the sample and of its folder.
        values: what it says by key, checked; keys that it leaves out are absent.
        views: those that it names, in rig order.
        where: the file, and the line of a .jsonl, for messages.
        folder: what its paths are relative to.
    """

    name: str
    values: Mapping[str, Any]
    views: tuple[ViewSpec, ...]
    where: str
    folder: Path

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or `default` where it is left out."""
        return self.values.get(key, default)

    def error(self, key: str, value: object, expected: str) -> ConfigError:
        """Returns the error for a value that cannot be."""
        return value_error(self.where, key, value, expected)


def value_error(where: str, key: str, value: object, expected: str) -> ConfigError:
    """Returns the error for a value that cannot be."""
    return ConfigError(f"{where}: {key} is {value!r}; expected {expected}. Change `{key}`.")


def parse_spec(content: Any, *, where: str, name: str, folder: Path, view_names: tuple[str, ...]) -> Spec:
    """Returns a checked spec.

    Args:
        content: of the JSON object.
        where: the file and line, for messages.
        name: of the sample where it does not say itself.
        folder: what paths are relative to.
        view_names: of the rig, in its order.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or a file that is not there; the key is named.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds a {_kind(content)}; expected an object with keys such as prompt. Change it.")
    values: dict[str, Any] = {}
    views: dict[str, ViewSpec] = {}
    for key, value in content.items():
        if key in view_names:
            views[key] = _view(key, value, where, folder)
        elif key in KEYS:
            values[key] = checked(where, key, value, KEYS[key])
        else:
            raise _unknown(where, key, (*KEYS, *view_names))
    _check_name(values.get("name", name), where)
    spec = Spec(
        name=values.get("name", name),
        values=values,
        views=tuple(views[view] for view in view_names if view in views),
        where=where,
        folder=folder,
    )
    if "prompt_path" in values:
        values["prompt_path"] = existing(folder, values["prompt_path"], where, "prompt_path")
    for problem in _together(spec, view_names):
        raise problem
    return spec


def checked(where: str, key: str, value: Any, check: Check) -> Any:
    """Returns a value as its check makes it. Raises ConfigError naming the key."""
    try:
        return check(value)
    except SpecError as error:
        raise value_error(where, key, value, str(error)) from None


def existing(folder: Path, given: Any, where: str, key: str) -> Path:
    """Returns a path relative to the spec's folder. Raises ConfigError where there is no such file."""
    path = folder / checked(where, key, given, _text)
    if not path.is_file():
        raise ConfigError(f"{where}: {key} is {given!r}, and there is no file {path}. Change `{key}`.")
    return path


def _view(name: str, content: Any, where: str, folder: Path) -> ViewSpec:
    if not isinstance(content, dict):
        raise value_error(where, name, content, f"an object with {', '.join(VIEW_KEYS)}")
    for key in content:
        if key not in VIEW_KEYS:
            raise _unknown(where, f"{name}.{key}", tuple(f"{name}.{known}" for known in VIEW_KEYS))

    def path_of(key: str) -> Path | None:
        given = content.get(key)
        return None if given is None else existing(folder, given, where, f"{name}.{key}")

    def paths_of(key: str) -> dict[str, Path | None]:
        """One path, or an object with one a type."""
        given = content.get(key)
        if not isinstance(given, dict):
            return {} if given is None else {"": path_of(key)}
        return {
            str(kind): None if path is None else existing(folder, path, where, f"{name}.{key}.{kind}")
            for kind, path in given.items()
        }

    masks = paths_of("mask_path")
    own = {}
    for key, attribute, check in (
        ("num_conditional_frames_per_view", "given_px", given_px),
        ("prompt", "prompt", _texts),
    ):
        if content.get(key) is not None:
            own[attribute] = checked(where, f"{name}.{key}", content[key], check)
    return ViewSpec(
        name,
        path_of("input_path"),
        paths_of("control_path"),
        {kind: path for kind, path in masks.items() if path is not None},
        **own,
    )


def _together(spec: Spec, view_names: tuple[str, ...]) -> Iterator[ConfigError]:
    """Yields what keys say against each other."""
    if spec.get("prompt") is not None and spec.get("prompt_path") is not None:
        yield ConfigError(f"{spec.where}: prompt and prompt_path are both given; expected one. Change `prompt`.")
    by_view = spec.get("num_conditional_frames_per_view", {})
    for name in by_view:
        if name not in view_names:
            prefix = "num_conditional_frames_per_view."
            yield _unknown(spec.where, prefix + name, tuple(prefix + known for known in view_names))
    loaded, used = (spec.get(f"num_video_frames_{part}per_view") for part in ("loaded_", ""))
    if (loaded is None) != (used is None):
        missing = "num_video_frames_per_view" if used is None else "num_video_frames_loaded_per_view"
        yield ConfigError(f"{spec.where}: {missing} is missing; expected both counts of frames. Give `{missing}`.")
    elif loaded is not None and used is not None:
        if used > loaded or (loaded - 1) % max(1, used - 1):
            yield spec.error(
                "num_video_frames_loaded_per_view", loaded, f"1 + a multiple of {used - 1} (every so many frames taken)"
            )
        if spec.get("num_chunks") is not None:
            yield ConfigError(
                f"{spec.where}: num_chunks and num_video_frames_per_view both say how long the video is; expected one. "
                "Leave out `num_chunks`."
            )
    if spec.get("add_camera_prefix"):
        yield spec.error("add_camera_prefix", True, "false: give each view a prompt of its own instead")


def _check_name(name: str, where: str) -> None:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not plain.isalnum() or not plain.isascii() or name[0] in ".-" or len(name) > 100:
        raise value_error(where, "name", name, "letters, digits, dot, dash and underscore: it names a folder")


def _unknown(where: str, key: str, known: tuple[str, ...]) -> ConfigError:
    near = nearest(key, known) or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"{where}: unknown key `{key}`; nearest: {', '.join(near)}. Change `{key}`.")


def _kind(value: object) -> str:
    names = {list: "list", str: "text", bool: "truth value", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def check_finite(value: str) -> float:
    """Refuses NaN and Infinity, which are no JSON. Raises ValueError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no JSON number")
    return number
