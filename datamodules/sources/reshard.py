"""Webdataset tars of any origin, or a Longtake set, made into a Longtake set, one sample at a time.

Videos are decoded and cut again as those of a folder are, or passed through as they are (`copy: true`). What
every key means stands in `conf/source/webdataset.yaml`. Nothing that a tar holds is executed: arrays are read
without pickle, and members that other tools would load as code are counted, named and left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.shards import DATASET_FILE, DatasetInfo, control_member, video_member
from datamodules.sources.base import RawSample, Skipped, Source, SourceInfo, Task
from datamodules.sources.clip_cutter import Recording, cut_clips
from datamodules.sources.clip_settings import ClipSettings
from datamodules.sources.frame_stream import VideoReader, reason_of
from datamodules.sources.naming import (
    assign_splits,
    check_fractions,
    draw_split,
    plain,
    printable,
    short_hash,
    slug,
    unique_slugs,
)
from datamodules.sources.sample_fields import FieldMap, fields_of_set
from datamodules.sources.sidecars import load_array, load_rows
from datamodules.sources.tar_inputs import expand_inputs, open_tar
from datamodules.sources.tar_splits import TAR_SPLITS, split_tars
from datamodules.sources.tar_stream import TarSample, tar_samples
from longtake.errors import BadSampleError, ConfigError, unknown_choice

log = logging.getLogger("longtake")
_PEEKED_TARS, _PEEKED_SAMPLES = 8, 64
_LONGEST_KEY = 56
_MADE_ANEW = ("episode", "num_frames", "source", "first_frame", "start_seconds", "dropped_frames")


class WebDatasetSource(Source):
    """Samples of webdataset tars; see `conf/source/webdataset.yaml`."""

    def __init__(
        self,
        *,
        input: str | list[str] | None,  # noqa: A002 (the name of the key)
        allow_remote: bool,
        copy: bool,
        fields: dict[str, Any],
        required: list[str],
        name: str | None,
        licence: str | None,
        origin: str | None,
        seed: int,
        split_by: str,
        episode_pattern: str | None,
        val_fraction: float,
        test_fraction: float,
        action_names: list[str] | None,
        state_names: list[str] | None,
        tokens_info: dict[str, Any] | None,
        latents_info: dict[str, Any] | None,
        **clips: Any,
    ) -> None:
        self._input, self._allow_remote, self._copy = plain(input), bool(allow_remote), bool(copy)
        self._fields, self._required = FieldMap.from_config(plain(fields)), tuple(plain(required))
        self._name, self._licence, self._origin = name, licence, origin
        self._seed, self._split_by, self._fractions = seed, split_by, (val_fraction, test_fraction)
        self._given_names = {"actions": plain(action_names), "states": plain(state_names)}
        self._extra = {"tokens": plain(tokens_info), "latents": plain(latents_info)}
        self._settings = ClipSettings.from_config(plain(clips))
        check_fractions(val_fraction, test_fraction)
        if split_by not in TAR_SPLITS:
            raise unknown_choice("way to split", split_by, TAR_SPLITS, "source.split_by")
        for field in self._required:
            self._fields.check_name(field, "source.required")
        self._episode_pattern = _compiled(episode_pattern)

    def info(self) -> SourceInfo:
        known, fields = self._known, self._field_map()
        if not fields.views and not self._copy:
            raise ConfigError(
                "there is no video to cut clips from; expected a member for it. Change "
                "`source.fields.video` or `source.copy`."
            )
        names = {what: tuple(self._columns(what)) for what in ("actions", "states")}
        self._settings.action_rules(names["actions"])
        first = printable(Path(self._tars()[0]).name)
        return SourceInfo(
            name=self._name or (known.source.name if known else slug(first.split(".")[0])),
            licence=self._licence or (known.source.licence if known else "unspecified"),
            origin=self._origin or (known.source.origin if known else f"webdataset tars, the first one {first}"),
            video=self._settings.video if fields.views else None,
            view_names=known.source.view_names if known else tuple(fields.views) or ("main",),
            action_names=names["actions"],
            state_names=names["states"],
            control_types=tuple(fields.control),
            rig=known.source.rig if known else None,
            tokens=self._coded("tokens"),
            latents=self._coded("latents"),
        )

    def tasks(self) -> list[Task]:
        tars = self._tars()
        how, splits = split_tars(
            tars,
            how=self._split_by,
            known=self._known,
            has_episodes=self._fields.episode is not None or self._episode_pattern is not None,
            fractions=self._fractions,
            seed=self._seed,
        )
        names = unique_slugs({tar: Path(tar).name.split(".")[0] for tar in tars})
        columns = {what: self._columns(what) for what in ("actions", "states")}
        moved = self._moved_episodes(tars[0]) if how == "episode" and len(tars) == 1 else {}
        tasks = []
        for tar in tars:
            split = splits.get(tar)
            shares = [split] if split else [s for s in ("train", "val", "test") if self._share(s) > 0]
            for share in shares:
                payload = {
                    "tar": tar,
                    "names": columns,
                    "prefix": "" if self._known or len(tars) == 1 else names[tar],
                    "by_episode": split is None,
                    "moved": moved,
                    # A tar that is read once for each split tells of its damage only once.
                    "reports": share == shares[0],
                }
                tasks.append(Task(names[tar] if split else f"{names[tar]}-{share}", share, payload))
        log.info("%d tars, split by %s: %s", len(tars), how, dict(Counter(task.split for task in tasks)))
        if not self._copy and (self._field_map().tokens or self._field_map().latents):
            log.warning(
                "tokens and latents belong to the clips as they are; clips cut anew have none "
                "(source.copy=true keeps them)"
            )
        if self.info().licence == "unspecified":
            log.info("the licence of these clips is recorded as unspecified; state it with `source.licence=...`")
        return tasks

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        tar, name = task.payload["tar"], printable(Path(task.payload["tar"]).name)
        fields, reports = self._field_map(), task.payload["reports"]
        try:
            with open_tar(tar, allow_remote=self._allow_remote) as file:
                for item in tar_samples(file, name, fields.wants):
                    if isinstance(item, TarSample):
                        yield from self._sample(item, name, task, fields)
                    elif reports:
                        yield item
        except (OSError, RuntimeError) as error:
            if reports:
                yield Skipped(name, f"the tar cannot be read ({reason_of(error)})")

    def _sample(self, sample: TarSample, tar: str, task: Task, fields: FieldMap) -> Iterator[RawSample | Skipped]:
        name = f"{tar}/{printable(sample.key)}"
        try:
            if sample.problem:
                raise BadSampleError(sample.problem)
            meta = fields.meta(sample)
            key = self._key(sample, task.payload["prefix"])
            episode = self._episode(sample, fields, task.payload["prefix"])
        except BadSampleError as error:
            if task.payload["reports"]:  # its split cannot be told
                yield Skipped(name, str(error))
            return
        moved = task.payload["moved"]
        if task.payload["by_episode"] and moved.get(episode, self._split_of(episode)) != task.split:
            return
        try:
            rows = [what for what, names in task.payload["names"].items() if names]
            missing = fields.missing(sample, {*self._required, *rows})
            if missing:
                there = ", ".join(sorted(map(printable, sample.present)))
                raise BadSampleError(
                    f"its member for {missing} is missing; it has {there} (source.fields, source.required)"
                )
            common: dict[str, Any] = {"key": key, "episode": episode, "captions": fields.captions(sample)}
            common |= self._rows(sample, fields, task.payload["names"])
            if self._copy:
                yield self._passed_through(sample, fields, meta, common)
                return
            recording = self._recording(sample, fields, name, meta, common)
        except BadSampleError as error:
            yield Skipped(name, str(error))
            return
        yield from cut_clips(recording, self._settings, task.payload["names"]["actions"])

    def _recording(
        self, sample: TarSample, fields: FieldMap, name: str, meta: dict[str, Any], common: dict[str, Any]
    ) -> Recording:
        return Recording(
            name=name,
            views={view: VideoReader(content) for view, content in fields.videos(sample).items()},
            control={
                kind: {view: VideoReader(content) for view, content in views.items()}
                for kind, views in fields.controls(sample).items()
            },
            meta={name: value for name, value in meta.items() if name not in _MADE_ANEW},
            **common,
        )

    def _passed_through(
        self, sample: TarSample, fields: FieldMap, meta: dict[str, Any], common: dict[str, Any]
    ) -> RawSample:
        """Returns a sample whose videos are the bytes of the tar; the writer decodes and measures them."""
        view_names = tuple(fields.views)
        encoded = {video_member(view, view_names): content for view, content in fields.videos(sample).items()}
        for kind, control in fields.controls(sample).items():
            encoded |= {control_member(kind, view): content for view, content in control.items()}
        tokens = None
        if fields.tokens and fields.tokens in sample.members:
            tokens = load_array(sample.members[fields.tokens], fields.tokens)
        if fields.latents and fields.latents in sample.members:
            encoded["latents.safetensors"] = sample.members[fields.latents]
        num_frames = meta.get("num_frames")
        return RawSample(
            tokens=tokens,
            meta={name: value for name, value in meta.items() if name not in ("episode", "num_frames")},
            encoded=encoded,
            num_frames=num_frames if isinstance(num_frames, int) and not view_names else None,
            **common,
        )

    def _rows(self, sample: TarSample, fields: FieldMap, names: dict[str, list[str]]) -> dict[str, Any]:
        rows = {}
        for what, member in (("actions", fields.actions), ("states", fields.states)):
            rows[what] = None
            if names[what] and member and member in sample.members:
                rows[what] = load_rows(sample.members[member], member)
                if rows[what].shape[1] != len(names[what]):
                    raise BadSampleError(
                        f"its {what} have {rows[what].shape[1]} columns, those of the set {len(names[what])}"
                    )
        return rows

    def _key(self, sample: TarSample, prefix: str) -> str:
        key = slug(sample.key)
        if key != sample.key:
            key = f"{key[:39]}-{short_hash(sample.key)}"  # two names may have become alike
        whole = "_".join(part for part in (prefix, key) if part)
        return whole if len(whole) <= _LONGEST_KEY else f"{whole[: _LONGEST_KEY - 9]}-{short_hash(whole)}"

    def _episode(self, sample: TarSample, fields: FieldMap, prefix: str) -> str:
        if fields.episode:
            stated = fields.lookup(sample, fields.episode)
            if not isinstance(stated, (str, int)) or isinstance(stated, bool) or not str(stated).isprintable():
                raise BadSampleError(
                    f"its {fields.episode} is {stated!r}; expected the name of its episode (source.fields.episode)"
                )
            return str(stated)
        if self._episode_pattern:
            match = self._episode_pattern.match(sample.key)
            if not match:
                raise BadSampleError(f"source.episode_pattern {self._episode_pattern.pattern!r} does not match its key")
            return slug(match[1] if match.re.groups else match[0])
        return self._key(sample, prefix)

    def _split_of(self, episode: str) -> str:
        val, test = self._fractions
        return draw_split(episode, val_fraction=val, test_fraction=test, seed=self._seed)

    def _moved_episodes(self, tar: str) -> dict[str, str]:
        """Returns the episodes of the only tar that are moved so that no split stays empty."""
        fields = self._field_map()
        place = fields.member_of(fields.episode) if fields.episode else None
        episodes: dict[str, None] = {}
        try:
            with open_tar(tar, allow_remote=self._allow_remote) as file:
                for item in tar_samples(file, tar, lambda member: member == place):
                    if isinstance(item, TarSample):
                        with contextlib.suppress(BadSampleError):  # samples() names it
                            episodes[self._episode(item, fields, "")] = None
        except (OSError, RuntimeError):
            return {}
        val, test = self._fractions
        splits = assign_splits(episodes, val_fraction=val, test_fraction=test, seed=self._seed)
        return {episode: split for episode, split in splits.items() if split != self._split_of(episode)}

    def _share(self, split: str) -> float:
        val, test = self._fractions
        return {"val": val, "test": test, "train": 1 - val - test}[split]

    def _tars(self) -> list[str]:
        if self._known is not None:
            return [str(path) for split in self._known.splits for path in self._known.shard_paths(split)]
        return expand_inputs(self._input, allow_remote=self._allow_remote)

    @cached_property
    def _known(self) -> DatasetInfo | None:
        """The Longtake set that the input is, or None."""
        if isinstance(self._input, str) and (Path(self._input).expanduser() / DATASET_FILE).is_file():
            return DatasetInfo.load(Path(self._input).expanduser().absolute(), key="input")
        return None

    def _field_map(self) -> FieldMap:
        return self._fields if self._known is None else fields_of_set(self._known.source)

    def _coded(self, what: str) -> dict[str, Any] | None:
        """Returns what dataset.json is to say of the tokens or latents, None where there will be none."""
        if not self._copy or not getattr(self._field_map(), what):
            return None
        coded = self._extra[what] if self._known is None else getattr(self._known.source, what)
        if coded is None:
            raise ConfigError(
                f"nothing is known of the {what}; expected their description. Change `source.{what}_info`."
            )
        return coded

    def _columns(self, what: str) -> list[str]:
        """Returns the column names: of the set, as given, or numbered as in the first sample with some."""
        if self._known is not None:
            return list(self._given_names[what] or getattr(self._known.source, f"{what.removesuffix('s')}_names"))
        member = getattr(self._fields, what)
        if self._given_names[what] is not None or not member:
            return self._given_names[what] or []
        for tar in self._tars()[:_PEEKED_TARS]:
            # samples() names what is wrong with a tar or a sample.
            with (
                contextlib.suppress(OSError, RuntimeError),
                open_tar(tar, allow_remote=self._allow_remote) as file,
            ):
                for item in itertools.islice(tar_samples(file, tar, lambda name: name == member), _PEEKED_SAMPLES):
                    if isinstance(item, TarSample) and member in item.members:
                        with contextlib.suppress(BadSampleError):
                            width = load_rows(item.members[member], member).shape[1]
                            return [f"{what.removesuffix('s')}_{index}" for index in range(width)]
        return []


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is not a regular expression ({error}). Change `source.episode_pattern`."
        ) from error
