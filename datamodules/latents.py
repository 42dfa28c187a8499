"""Clips of cached latents, with text that is encoded already: training pays no frozen encoder.

A causal encoder codes the first frame of whatever it is given by itself, so a sub-clip of cached latents that does not
begin where an encoding began is not what the encoder would have made of that sub-clip. A sample may therefore hold
several encodings, one for each start: tensors `latents.<first pixel frame>`, and a window always begins at one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from datamodules.base import ClipsDataModule
from datamodules.loading.decoding import Companions, Decoder, Draws, Fields, Window
from datamodules.loading.reading import Sample
from datamodules.shards import DatasetInfo
from longtake.errors import BadSampleError, ConfigError
from longtake.geometry import latent_frames

MEMBER = "latents.safetensors"
PREFIX = "latents."
TEXT_FIELDS = ("text_emb", "text_ids", "text_mask")


@dataclass(frozen=True)
class LatentsDecoder:
    """Takes the first latent frames of one of the cached encodings.

    Attributes:
        ratio: pixel frames a latent frame.
        channels: of the latents.
        num_views: of the set.
        companions: what comes along with the frames.
    """

    ratio: int
    channels: int
    num_views: int
    companions: Companions

    def __call__(self, sample: Sample, window: Window, draws: Draws) -> Fields:
        """Returns latents [v t c h w], text fields where cached, actions [t_px a], states, masks, caption and fps."""
        try:
            tensors = safetensors.torch.load(sample.read(MEMBER))
        except safetensors.SafetensorError as error:
            raise BadSampleError(f"member {MEMBER!r} cannot be read: {error}") from error
        needed = latent_frames(window.num_frames, self.ratio, "data.num_frames")
        starts = self._starts(tensors, window, needed)
        start = starts[draws.below(len(starts), "start")]
        placed = Window(start, window.num_frames)
        text = _drawn_text({name: tensors[name] for name in TEXT_FIELDS if name in tensors}, draws)
        return {
            "latents": self._checked(tensors[f"{PREFIX}{start}"])[:, :needed],
            **self.companions.read(sample, placed, draws, list(range(self.num_views))),
            **text,
        }

    def _starts(self, tensors: dict[str, Tensor], window: Window, needed: int) -> list[int]:
        """Returns the pixel frames at which a long enough encoding begins."""
        names = [name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)]
        starts = sorted(int(name) for name in names if name.isdecimal())
        if window.start is not None:
            starts = [start for start in starts if start == window.start]
        starts = [start for start in starts if tensors[f"{PREFIX}{start}"].shape[1] >= needed]
        if not starts:
            raise BadSampleError(
                f"holds no encoding of {needed} latent frames (encodings begin at: {', '.join(names)})"
            )
        return starts

    def _checked(self, latents: Tensor) -> Tensor:
        if latents.ndim != 5 or latents.shape[0] != self.num_views or latents.shape[2] != self.channels:
            raise BadSampleError(
                f"latents have shape {tuple(latents.shape)}; expected ({self.num_views}, t, {self.channels}, h, w)"
            )
        if not torch.isfinite(latents).all():
            raise BadSampleError("latents hold values that are not finite")
        return latents.float()


def _drawn_text(fields: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
    """Returns the one text [1 ...] of the caption that `read_caption` draws; a row for each caption is cached."""
    if not fields:
        return {}
    counts = {len(value) for value in fields.values()}
    if len(counts) != 1 or 0 in counts:
        raise BadSampleError(
            f"its text fields have {', '.join(map(str, sorted(counts)))} rows; expected a row a caption"
        )
    row = draws.below(counts.pop(), "caption")
    return {name: value[row : row + 1] for name, value in fields.items()}


class LatentsDataModule(ClipsDataModule):
    """Clips of cached latents as `Clip.latents`.

    Args:
        encoder_fingerprint: of the encoder that the model uses; a set made by another one is refused. None asks the
            model for it, where there is one.
        pixels: name of the data that holds the pixels, for those who compare rollouts with them; not used here.
        **kwargs: as for `ClipsDataModule`; `num_frames` still counts pixel frames.
    """

    def __init__(self, *, encoder_fingerprint: str | None = None, pixels: str | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.encoder_fingerprint = encoder_fingerprint
        self.pixels = pixels

    def setup(self, stage: str) -> None:
        """See `ClipsDataModule`; takes the fingerprint from the model that is trained."""
        model = self.trainer.lightning_module if self.trainer is not None else None
        if self.encoder_fingerprint is None and hasattr(model, "video_encoder"):
            self.encoder_fingerprint = model.video_encoder.fingerprint  # type: ignore[union-attr]
        super().setup(stage)

    def decoder(self, info: DatasetInfo, *, training: bool) -> Decoder:
        """Returns the decoder of one set. Raises ConfigError where its latents are not the model's."""
        latents, video = info.source.latents, info.source.video
        if latents is None or video is None:
            raise ConfigError(
                f"{info.root} holds no latents; expected a set written by `python -m scripts.cache_latents`. Change "
                "`data.root`."
            )
        if self.encoder_fingerprint not in (None, latents["encoder_fingerprint"]):
            raise ConfigError(
                f"the latents in {info.root} come from encoder {latents['encoder_fingerprint']}, the model's encoder "
                f"is {self.encoder_fingerprint}; expected the same. Cache them again (data.rebuild=true), or change "
                "`encoder/video`."
            )
        if self.frame_stride != 1:
            raise ConfigError(f"data.frame_stride is {self.frame_stride}; expected 1 for cached latents.")
        for length in self.streams.num_frames:
            latent_frames(length, int(latents["ratio_time"]), "data.num_frames")
        return LatentsDecoder(
            ratio=int(latents["ratio_time"]),
            channels=int(latents["channels"]),
            num_views=len(info.source.view_names),
            companions=Companions.of(info),
        )

    def shape(self, info: DatasetInfo) -> tuple[object, ...]:
        """Returns what must be equal within a batch besides the number of frames."""
        video, source = info.source.video, info.source
        size = (video.height, video.width) if video else ()
        return (*size, source.view_names, source.action_names, source.state_names)
