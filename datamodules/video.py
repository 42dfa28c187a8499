"""Clips of pixels: mp4 members -> uint8 frames, with actions, states, captions and control videos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.base import ClipsDataModule
from datamodules.loading.decoding import Companions, Decoder, Draws, Fields, Window
from datamodules.loading.reading import Sample
from datamodules.shards import DatasetInfo, control_member, video_member
from datamodules.sources.control_frames import check_control, is_extracted
from longtake.errors import BadSampleError, ConfigError, unknown_choice
from longtake.media.edges import edge_video
from longtake.media.read import probe_video, read_video


@dataclass(frozen=True)
class VideoDecoder:
    """Decodes the wanted frames of the wanted views.

    Attributes:
        height: pixel rows that every view must have.
        width: pixel columns that every view must have.
        rig_names: every view of the set, in rig order.
        views: the wanted ones.
        control: wanted control types.
        extracted: those of them that are extracted from the views.
        flip: whether half of the clips are mirrored.
        reader: "auto", "decord" or "pyav", see `longtake.media.read.read_video`.
        companions: what comes along with the frames.
    """

    height: int
    width: int
    rig_names: tuple[str, ...]
    views: tuple[str, ...]
    control: tuple[str, ...]
    extracted: tuple[str, ...]
    flip: bool
    reader: str
    companions: Companions

    def __call__(self, sample: Sample, window: Window, draws: Draws) -> Fields:
        """Returns video uint8 [v t c h w], control the same, actions [t a], states [t s], masks, caption and fps."""
        window = window.place(self._available(sample), draws)
        mirrored = self.flip and draws.below(2, "flip") == 1
        members = [video_member(view, self.rig_names) for view in self.views]
        video = _stacked([self._frames(sample, member, window, mirrored) for member in members])
        control, control_mask = self._controls(sample, window, mirrored, video)
        return {
            "video": video,
            "control": control,
            "control_mask": control_mask,
            **self.companions.read(sample, window, draws, [self.rig_names.index(view) for view in self.views]),
        }

    def _available(self, sample: Sample) -> int:
        if sample.num_frames is not None:
            return sample.num_frames
        return probe_video(sample.read(video_member(self.views[0], self.rig_names))).num_frames

    def _frames(self, sample: Sample, member: str, window: Window, mirrored: bool) -> Tensor:
        """Returns the frames of one member, uint8 [t c h w]."""
        frames = read_video(sample.read(member), frames=window.frames(), verified=sample.verified, backend=self.reader)
        if frames.shape[1:] != (self.height, self.width, 3):
            raise BadSampleError(
                f"member {member!r} has frames of {frames.shape[2]}x{frames.shape[1]}; expected "
                f"{self.width}x{self.height}"
            )
        if mirrored:
            frames = np.ascontiguousarray(frames[:, :, ::-1])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def _controls(
        self, sample: Sample, window: Window, mirrored: bool, video: Tensor
    ) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """Returns the control videos [v t c h w] and which views have them [v]; a missing one is zeros."""
        if not self.control:
            return None, None
        frames: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for kind in self.control:
            if kind in self.extracted:
                edges = [edge_video(view.permute(0, 2, 3, 1).numpy()) for view in video]
                frames[kind] = torch.stack([torch.from_numpy(view).permute(0, 3, 1, 2) for view in edges])
                masks[kind] = torch.ones(len(video), dtype=torch.bool)
                continue
            members = [control_member(kind, view) for view in self.views]
            there = [sample.has(member) for member in members]
            blank = torch.zeros((window.num_frames, 3, self.height, self.width), dtype=torch.uint8)
            frames[kind] = _stacked(
                [
                    self._frames(sample, member, window, mirrored) if has else blank
                    for member, has in zip(members, there, strict=True)
                ]
            )
            masks[kind] = torch.tensor(there)
        return frames, masks


def _stacked(views: list[Tensor]) -> Tensor:
    """Returns [v ...] of [...]; without a copy for one view, since the batch makes one anyway."""
    return views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)


class VideoDataModule(ClipsDataModule):
    """Clips of pixels as `Clip.video`, uint8: they travel to the device as bytes and are scaled there.

    Args:
        views: names of the views to load, in this order; None for all of the rig.
        control: control types to load; "edge" is extracted from the views where the set has none.
        horizontal_flip: mirror half of the clips; "auto" does so where nothing in the set knows left from right
            (no actions, one view).
        reduce_actions: "last", "mean", "sum" or "max": how the actions between two frames become one where
            `frame_stride` is above 1.
        video_reader: "auto" (decord for what was verified when it was written, PyAV for all else), "decord" or "pyav".
        **kwargs: as for `ClipsDataModule`.
    """

    def __init__(
        self,
        *,
        views: list[str] | None = None,
        control: list[str] | None = None,
        horizontal_flip: bool | str = "auto",
        reduce_actions: str | None = None,
        video_reader: str = "auto",
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.views = tuple(views) if views is not None else None
        self.control = tuple(control or ())
        self.horizontal_flip = horizontal_flip
        self.reduce_actions = reduce_actions
        self.video_reader = video_reader
        if horizontal_flip not in (True, False, "auto"):
            raise unknown_choice("choice", horizontal_flip, ["auto", "true", "false"], "data.horizontal_flip")
        if video_reader not in ("auto", "decord", "pyav"):
            raise unknown_choice("reader", video_reader, ["auto", "decord", "pyav"], "data.video_reader")
        if reduce_actions not in (None, "last", "mean", "sum", "max"):
            raise unknown_choice("choice", reduce_actions, ["last", "mean", "sum", "max"], "data.reduce_actions")

    def decoder(self, info: DatasetInfo, *, training: bool) -> Decoder:
        """Returns the decoder of one set. Raises ConfigError where the set has not what is asked for."""
        source = info.source
        if source.video is None:
            raise ConfigError(
                f"{info.root} holds no pixels; expected a set with videos. Change `data.root`, or `data`."
            )
        views = self.views or source.view_names
        for view in views:
            if view not in source.view_names:
                raise unknown_choice(f"view (of {info.root})", view, source.view_names, "data.views")
        check_control(self.control, source, info.root, "data.control")
        if self.frame_stride > 1 and source.action_names and self.reduce_actions is None:
            raise ConfigError(
                f"data.frame_stride is {self.frame_stride} and {info.root} has actions; expected to be told how the "
                "actions of "
                f"{self.frame_stride} frames become one. Set `data.reduce_actions` to last, mean, sum or max."
            )
        return VideoDecoder(
            height=source.video.height,
            width=source.video.width,
            rig_names=source.view_names,
            views=tuple(views),
            control=self.control,
            extracted=tuple(kind for kind in self.control if is_extracted(kind, source)),
            flip=training and self._flips(info),
            reader=self.video_reader,
            companions=Companions.of(info, self.reduce_actions or "last"),
        )

    def shape(self, info: DatasetInfo) -> tuple[object, ...]:
        """Returns what must be equal within a batch besides the number of frames."""
        video, source = info.source.video, info.source
        size = (video.height, video.width) if video else ()
        return (*size, self.views or source.view_names, source.action_names, source.state_names)

    def _flips(self, info: DatasetInfo) -> bool:
        sided = bool(info.source.action_names) or len(info.source.view_names) > 1
        if self.horizontal_flip is True and sided:
            raise ConfigError(
                f"data.horizontal_flip is true, but {info.root} has actions or several views, which a mirror would "
                "make wrong; "
                "expected false or auto. Change `data.horizontal_flip`."
            )
        return self.horizontal_flip is True or (self.horizontal_flip == "auto" and not sided)
