"""How recordings become clips: the yaml keys that every source of encoded video shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from datamodules.sources.base import VideoSpec
from datamodules.sources.resample import ACTION_RULES
from datamodules.sources.resize import RESIZE_MODES
from longtake.errors import ConfigError, unknown_choice


@dataclass(frozen=True)
class ClipSettings:
    """How recordings become clips; the attributes are keys of `conf/source/*.yaml` and explained there."""

    video: VideoSpec
    clip_frames: int
    stride: int
    keep_short: bool
    resize: str
    allow_fps_upsampling: bool
    on_length_mismatch: str
    split_scenes: bool
    cut_min_change: float
    cut_min_ratio: float
    nearest_controls: tuple[str, ...]
    actions_fps: Fraction | None
    states_fps: Fraction | None
    actions_resample: str | dict[str, str]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipSettings:
        """Returns the settings of a source's yaml keys (plain values). Raises ConfigError naming the key."""
        expected = {entry.name for entry in fields(cls)} - {"video"} | {"fps", "height", "width"}
        if set(config) != expected:
            wrong = sorted(set(config) ^ expected)
            raise ConfigError(
                f"unknown or missing keys: {', '.join(wrong)}; see `conf/source/`. Change `source.{wrong[0]}`."
            )
        if config["resize"] not in RESIZE_MODES:
            raise unknown_choice("resize mode", config["resize"], RESIZE_MODES, "source.resize")
        if config["on_length_mismatch"] not in ("cut", "skip"):
            raise unknown_choice("choice", config["on_length_mismatch"], ("cut", "skip"), "source.on_length_mismatch")
        clip_frames = positive_int(config["clip_frames"], "source.clip_frames")
        stride = config["stride"]
        settings = cls(
            video=video_spec(config["fps"], config["height"], config["width"]),
            clip_frames=clip_frames,
            stride=clip_frames if stride is None else positive_int(stride, "source.stride"),
            keep_short=bool(config["keep_short"]),
            resize=config["resize"],
            allow_fps_upsampling=bool(config["allow_fps_upsampling"]),
            on_length_mismatch=config["on_length_mismatch"],
            split_scenes=bool(config["split_scenes"]),
            cut_min_change=float(config["cut_min_change"]),
            cut_min_ratio=float(config["cut_min_ratio"]),
            nearest_controls=tuple(config["nearest_controls"]),
            actions_fps=_optional_fps(config["actions_fps"], "source.actions_fps"),
            states_fps=_optional_fps(config["states_fps"], "source.states_fps"),
            actions_resample=config["actions_resample"],
        )
        rules = settings.actions_resample
        for rule in rules.values() if isinstance(rules, dict) else [rules]:
            if rule not in ACTION_RULES:
                raise unknown_choice("rule", rule, ACTION_RULES, "source.actions_resample")
        return settings

    def action_rules(self, names: Sequence[str]) -> list[str]:
        """Returns the rule of each action column. Raises ConfigError for a rule without a column."""
        if isinstance(self.actions_resample, str):
            return [self.actions_resample] * len(names)
        for name in self.actions_resample:
            if name not in (*names, "default"):
                raise unknown_choice("action column", name, [*names, "default"], "source.actions_resample")
        return [self.actions_resample.get(name, self.actions_resample.get("default", "max")) for name in names]


def positive_int(value: Any, key: str) -> int:
    """Returns a whole number of at least 1. Raises ConfigError naming `key` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{value!r} is not a number of frames; expected a whole number from 1 on. Change `{key}`.")
    return value


def parse_fps(value: Any, key: str) -> Fraction:
    """Returns frames per second, exact ("35/3", 12, 29.97). Raises ConfigError naming `key`."""
    try:
        fps = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if not 0 < fps <= 1000:
        raise ConfigError(
            f"{value!r} is not a frame rate; expected a number or a fraction such as 35/3. Change `{key}`."
        )
    return fps


def video_spec(fps: Any, height: Any, width: Any) -> VideoSpec:
    """Returns the geometry of a set. Raises ConfigError when it cannot be encoded."""
    for key, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2 or value % 2:
            raise ConfigError(
                f"a {key} of {value!r} pixels cannot be encoded; expected an even number. Change `video.{key}`."
            )
    return VideoSpec(parse_fps(fps, "video.fps"), height, width)


def _optional_fps(value: Any, key: str) -> Fraction | None:
    return None if value is None else parse_fps(value, key)
