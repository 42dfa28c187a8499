"""Clips of cached latents, with text that is encoded already: training pays no frozen encoder.

A sample holds one encoding for each causal start, as tensors `latents.<first pixel frame>` (see `datamodules.cached`).
"""

from __future__ import annotations

from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from datamodules.cached import CachedDataModule, drawn_start
from datamodules.loading.decoding import Companions, Decoder, Draws, Fields, Window
from datamodules.loading.reading import Sample
from datamodules.shards import DatasetInfo
from longtake.errors import BadSampleError, ConfigError, unknown_choice
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
        control: cached control types that are wanted.
        block_frames: pixel frames of a block where a clip is made of blocks, each an encoding of its own; None: it is
            one encoding.
    """

    ratio: int
    channels: int
    num_views: int
    companions: Companions
    control: tuple[str, ...] = ()
    block_frames: int | None = None

    def __call__(self, sample: Sample, window: Window, draws: Draws) -> Fields:
        """Returns latents [v t c h w], control the same, text where cached, actions [t_px a], states, masks and fps."""
        try:
            tensors = safetensors.torch.load(sample.read(MEMBER))
        except safetensors.SafetensorError as error:
            raise BadSampleError(f"member {MEMBER!r} cannot be read: {error}") from error
        block_px = self.block_frames or window.num_frames
        needed = latent_frames(block_px, self.ratio, "data.num_frames")
        encodings = {
            int(name.removeprefix(PREFIX)): len(value[0])
            for name, value in tensors.items()
            if name.startswith(PREFIX) and name.removeprefix(PREFIX).isdecimal() and value.ndim
        }
        offsets = range(0, window.num_frames, block_px)
        start = drawn_start(encodings, window, needed, draws, offsets)
        placed = Window(start, window.num_frames)
        text = _drawn_text({name: tensors[name] for name in TEXT_FIELDS if name in tensors}, draws)
        return {
            "latents": self._blocks(tensors, PREFIX, start, offsets, needed),
            **self._controls(tensors, start, offsets, needed),
            **self.companions.read(sample, placed, draws, list(range(self.num_views))),
            **text,
        }

    def _controls(self, tensors: dict[str, Tensor], start: int, offsets: range, needed: int) -> Fields:
        """Returns the latents of the control videos from the same start, and which views have them."""
        if not self.control:
            return {}
        latents, masks = {}, {}
        for kind in self.control:
            prefix = f"control.{kind}."
            missing = [f"{prefix}{start + offset}" for offset in offsets if f"{prefix}{start + offset}" not in tensors]
            if missing or f"control_mask.{kind}" not in tensors:
                name = missing[0] if missing else f"control_mask.{kind}"
                raise BadSampleError(f"holds no {name!r}; expected the control video {kind!r} beside the latents")
            latents[kind] = self._blocks(tensors, prefix, start, offsets, needed)
            masks[kind] = tensors[f"control_mask.{kind}"].bool()
        return {"control": latents, "control_mask": masks}

    def _blocks(self, tensors: dict[str, Tensor], prefix: str, start: int, offsets: range, needed: int) -> Tensor:
        """Returns the first `needed` latents of the encoding that begins at each block, one after another."""
        blocks = [self._checked(tensors[f"{prefix}{start + offset}"])[:, :needed] for offset in offsets]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

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


class LatentsDataModule(CachedDataModule):
    """Clips of cached latents as `Clip.latents`.

    Args:
        control: cached control types to load, as latents.
        block_frames: pixel frames of a block: a clip is then made of blocks, each of them a cached encoding that begins
            there, so a causal start of its own. None: it is one encoding.
        **kwargs: as for `CachedDataModule`.
    """

    def __init__(self, *, control: list[str] | None = None, block_frames: int | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.control = tuple(control or ())
        if block_frames is not None and block_frames < 1:
            raise ConfigError(
                f"data.block_frames is {block_frames}; expected 1 or more, or null. Change `data.block_frames`."
            )
        self.block_frames = block_frames

    def decoder(self, info: DatasetInfo, *, training: bool) -> Decoder:
        """Returns the decoder of one set. Raises ConfigError where its latents are not the model's."""
        latents, video = info.source.latents, info.source.video
        if latents is None or video is None:
            raise ConfigError(
                f"{info.root} holds no latents; expected a set written by `python -m scripts.cache_latents`. Change "
                "`data.root`."
            )
        self.check_cache(info, "latents", latents["encoder_fingerprint"], int(latents["ratio_time"]))
        for kind in self.control:
            if kind not in latents.get("control", []):
                raise unknown_choice(
                    f"cached control type (of {info.root})", kind, latents.get("control", []), "data.control"
                )
        return LatentsDecoder(
            ratio=int(latents["ratio_time"]),
            channels=int(latents["channels"]),
            num_views=len(info.source.view_names),
            companions=Companions.of(info),
            control=self.control,
            block_frames=self.block_frames,
        )

    def shape(self, info: DatasetInfo) -> tuple[object, ...]:
        """Returns what must be equal within a batch besides the number of frames."""
        video, source = info.source.video, info.source
        size = (video.height, video.width) if video else ()
        return (*size, source.view_names, source.action_names, source.state_names)
