"""Which member of a foreign sample is what: the `fields` of `conf/source/webdataset.yaml`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from datamodules.shards import NAME_PATTERN, control_member, video_member
from datamodules.sources.base import SourceInfo
from datamodules.sources.frame_stream import VIDEO_EXTENSIONS
from datamodules.sources.sidecars import caption_lines, load_captions
from datamodules.sources.tar_stream import TarSample
from longtake.errors import BadSampleError, ConfigError, unknown_choice

FIELDS = ("video", "control", "caption", "actions", "states", "tokens", "latents", "episode")


@dataclass(frozen=True)
class FieldMap:
    """The members of a sample. A video may go by several names: the first one that is there is taken.

    Attributes:
        views: for each camera the member names of its video.
        control: for each control type and camera the same.
        caption: texts: members, or places inside a json member ("json.caption").
        actions: member with the actions, or None; likewise states, tokens, latents.
        episode: place inside a json member that names the episode, or None.
        meta_member: json member whose content is kept with the sample.
    """

    views: dict[str, list[str]]
    control: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    caption: tuple[str, ...] = ()
    actions: str | None = None
    states: str | None = None
    tokens: str | None = None
    latents: str | None = None
    episode: str | None = None
    meta_member: str | None = "json"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FieldMap:
        """Returns the map of the yaml keys. Raises ConfigError."""
        for name in config:
            if name not in FIELDS:
                raise unknown_choice("field", name, FIELDS, "source.fields")
        video, control = config.get("video"), config.get("control") or {}
        views = video if isinstance(video, dict) else {"main": video} if video else {}
        for name in [*views, *control]:
            if not NAME_PATTERN.fullmatch(name):
                raise ConfigError(
                    f"{name!r} cannot be the name of a view; expected letters, digits, _ and -. Change `source.fields`."
                )
        first = next(iter(views), "main")
        return cls(
            views={view: _names(names) for view, names in views.items()},
            control={
                kind: {v: _names(n) for v, n in (names if isinstance(names, dict) else {first: names}).items()}
                for kind, names in control.items()
            },
            caption=tuple(_names(config.get("caption"))),
            **{name: config.get(name) for name in ("actions", "states", "tokens", "latents", "episode")},
        )

    def check_name(self, name: str, key: str) -> None:
        """Raises ConfigError when a field that must be there is not known, or was given no member."""
        if name not in FIELDS:
            raise unknown_choice("field", name, FIELDS, key)
        if not (self.views if name == "video" else getattr(self, name)):
            raise ConfigError(
                f"{name} is required and no member was given for it. Change `source.fields.{name}` or `{key}`."
            )

    def wants(self, member: str) -> bool:
        """Returns whether a member is read at all."""
        videos = [name for names in self.views.values() for name in names]
        videos += [name for views in self.control.values() for names in views.values() for name in names]
        places = [_json_place(place)[0] for place in (*self.caption, self.episode or "")]
        return member in (
            *videos,
            *places,
            self.actions,
            self.states,
            self.tokens,
            self.latents,
            self.meta_member,
        )

    @staticmethod
    def member_of(place: str) -> str:
        """Returns the member that a place such as "json.meta.episode" lies in."""
        return _json_place(place)[0]

    def missing(self, sample: TarSample, required: set[str]) -> str:
        """Returns the first required field that the sample lacks, or an empty string."""
        for name in FIELDS:
            if name not in required:
                continue
            if name == "video":
                lacking = [view for view, names in self.views.items() if not set(names) & set(sample.members)]
                if lacking:
                    return "video" if lacking == ["main"] else f"view {', '.join(lacking)}"
            elif name == "control":
                if self.controls(sample).keys() != self.control.keys():
                    return "control"
            elif name == "caption":
                if not self.captions(sample):
                    return "caption"
            elif _json_place(getattr(self, name) or "")[0] not in sample.members:
                return name
        return ""

    def videos(self, sample: TarSample) -> dict[str, bytes]:
        """Returns the encoded video of each camera that is there."""
        return {view: sample.members[name] for view, names in self.views.items() if (name := _first(names, sample))}

    def controls(self, sample: TarSample) -> dict[str, dict[str, bytes]]:
        """Returns the encoded control videos that are there."""
        found = {
            kind: {view: sample.members[name] for view, names in views.items() if (name := _first(names, sample))}
            for kind, views in self.control.items()
        }
        return {kind: views for kind, views in found.items() if views}

    def captions(self, sample: TarSample) -> list[str]:
        """Returns the captions of the first place that has any. Raises BadSampleError when it is not text."""
        for place in self.caption:
            member, inner = _json_place(place)
            if member not in sample.members:
                continue
            if not inner:
                return load_captions(sample.members[member], member)
            value = self.lookup(sample, place)
            texts = value if isinstance(value, list) else [value]
            found = [line for text in texts if isinstance(text, str) for line in caption_lines(text)]
            if found:
                return found
        return []

    def lookup(self, sample: TarSample, place: str) -> Any:
        """Returns what stands at a place such as "json.a.caption", or None. Raises BadSampleError."""
        member, inner = _json_place(place)
        value = _json(sample, member)
        for name in inner:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def meta(self, sample: TarSample) -> dict[str, Any]:
        """Returns the json member of the sample, to be kept. Raises BadSampleError when it is not json."""
        value = _json(sample, self.meta_member) if self.meta_member else None
        return value if isinstance(value, dict) else {}


def fields_of_set(source: SourceInfo) -> FieldMap:
    """Returns the map of a Longtake set."""
    views = source.view_names if source.video is not None else ()
    return FieldMap(
        views={view: [video_member(view, source.view_names)] for view in views},
        control={
            kind: {view: [control_member(kind, view)] for view in source.view_names} for kind in source.control_types
        },
        caption=("txt",),
        actions="actions.npy" if source.action_names else None,
        states="states.npy" if source.state_names else None,
        tokens="tokens.npy" if source.tokens else None,
        latents="latents.safetensors" if source.latents else None,
        episode="json.episode",
    )


def _names(value: Any) -> list[str]:
    if value == "any":
        return [ending.removeprefix(".") for ending in VIDEO_EXTENSIONS]
    names = [] if value is None else [value] if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{value!r} is not a member name or a list of them. Change `source.fields`.")
    return names


def _first(names: list[str], sample: TarSample) -> str | None:
    return next((name for name in names if name in sample.members), None)


def _json_place(place: str) -> tuple[str, list[str]]:
    """Splits "meta.json.a.b" into the member "meta.json" and the way inside it; others are members."""
    parts = place.split(".")
    if "json" not in parts[:-1]:
        return place, []
    at = parts.index("json")
    return ".".join(parts[: at + 1]), parts[at + 1 :]


def _json(sample: TarSample, member: str) -> Any:
    if member not in sample.members:
        return None
    try:
        return json.loads(sample.members[member].decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"its member {member} is not json") from error


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not json")
