"""What cached codes of a frozen encoder (latents, tokens) have in common.

A causal encoder codes the first frame of whatever it is given by itself, so a sub-clip of cached codes that does not
begin where an encoding began is not what the encoder would have made of that sub-clip. A sample may therefore hold
several encodings, one for each start, and a window always begins at one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from datamodules.base import ClipsDataModule
from datamodules.loading.decoding import Draws, Window
from datamodules.shards import DatasetInfo
from longtake.errors import BadSampleError, ConfigError
from longtake.geometry import latent_frames


def drawn_start(
    encodings: Mapping[int, int], window: Window, needed: int, draws: Draws, offsets: Iterable[int] = (0,)
) -> int:
    """Returns the pixel frame at which the encoding begins that is taken.

    Args:
        encodings: latent frames of each encoding, by the pixel frame that it begins at.
        window: with its start, or without: then it is drawn.
        needed: latent frames wanted, of each block where there are several.
        draws: of the sample.
        offsets: pixel frames from the start to the beginning of each block; every block is an encoding of its own.

    Raises:
        BadSampleError: no encoding is long enough, or none begins there.
    """
    offsets = tuple(offsets)
    long_enough = {start for start, there in encodings.items() if there >= needed}
    starts = sorted(start for start in long_enough if all(start + offset in long_enough for offset in offsets))
    if window.start is not None:
        starts = [start for start in starts if start == window.start]
    if not starts:
        there = ", ".join(map(str, sorted(encodings)))
        blocks = f"{len(offsets)} encodings in a row" if len(offsets) > 1 else "encoding"
        raise BadSampleError(f"holds no {blocks} of {needed} latent frames (encodings begin at: {there})")
    return starts[draws.below(len(starts), "start")]


class CachedDataModule(ClipsDataModule):
    """Clips of cached codes.

    Args:
        encoder_fingerprint: of the encoder that the model uses; a set made by another one is refused. None asks the
            model for it, where there is one.
        pixels: name of the data that holds the pixels, for those who compare rollouts with them; not used here.
        **kwargs: as for `ClipsDataModule`; `num_frames` still counts pixel frames.

    Attributes:
        block_frames: pixel frames of a block, where a clip is made of blocks that are causal starts of their own; else
            None.
    """

    def __init__(self, *, encoder_fingerprint: str | None = None, pixels: str | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.encoder_fingerprint = encoder_fingerprint
        self.pixels = pixels
        self.block_frames: int | None = None

    def setup(self, stage: str) -> None:
        """See `ClipsDataModule`; takes the fingerprint from the model that is trained."""
        model = self.trainer.lightning_module if self.trainer is not None else None
        encoder = getattr(model, "video_encoder", None)
        if self.encoder_fingerprint is None and encoder is not None:
            self.encoder_fingerprint = encoder.fingerprint
        super().setup(stage)

    def check_cache(self, info: DatasetInfo, what: str, found: str | None, ratio: int) -> None:
        """Checks that the codes of a set are those of the model's encoder, and that windows fit them.

        Args:
            info: the set.
            what: "latents" or "tokens".
            found: fingerprint of the encoder that made them; None: not known.
            ratio: pixel frames a latent frame.

        Raises:
            ConfigError: they are not, or they do not.
        """
        if None not in (self.encoder_fingerprint, found) and self.encoder_fingerprint != found:
            raise ConfigError(
                f"the {what} in {info.root} come from encoder {found}, the model's encoder is "
                f"{self.encoder_fingerprint}; expected the same. Cache them again (data.rebuild=true), or change "
                "`encoder/video`."
            )
        if self.frame_stride != 1:
            raise ConfigError(f"data.frame_stride is {self.frame_stride}; expected 1 for cached {what}.")
        for length in self.streams.num_frames:
            if self.block_frames is None:
                latent_frames(length, ratio, "data.num_frames")
            elif length % self.block_frames:
                raise ConfigError(
                    f"data.num_frames is {length}; expected whole blocks of data.block_frames={self.block_frames} "
                    f"frames, for example {2 * self.block_frames}. Change `video.num_frames`."
                )
        if self.block_frames is not None:
            latent_frames(self.block_frames, ratio, "data.block_frames")
