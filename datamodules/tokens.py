"""Clips of discrete tokens: codebook indices of a causal video tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from datamodules.base import ClipsDataModule
from datamodules.loading.decoding import Companions, Decoder, Draws, Fields, Window, read_array
from datamodules.loading.reading import Sample
from datamodules.shards import DatasetInfo
from longtake.errors import BadSampleError, ConfigError
from longtake.geometry import latent_frames


@dataclass(frozen=True)
class TokensDecoder:
    """Takes the first latent frames of a tokenised clip: tokens mean what they mean only from a causal start on.

    Attributes:
        vocab_size: tokens are 0 to vocab_size - 1.
        grid: rows and columns of a latent frame.
        ratio: pixel frames a latent frame.
        num_views: of the set.
        companions: what comes along with the frames.
    """

    vocab_size: int
    grid: tuple[int, int]
    ratio: int
    num_views: int
    companions: Companions

    def __call__(self, sample: Sample, window: Window, draws: Draws) -> Fields:
        """Returns tokens int64 [v t h w], actions [t_px a], states, masks, caption and fps."""
        tokens = read_array(sample, "tokens.npy")
        needed = latent_frames(window.num_frames, self.ratio, "data.num_frames")
        if tokens.ndim != 4 or tokens.shape[0] != self.num_views or tokens.shape[2:] != self.grid:
            raise BadSampleError(
                f"tokens have shape {tokens.shape}; expected ({self.num_views}, t, {self.grid[0]}, {self.grid[1]})"
            )
        if tokens.dtype.kind not in "iu" or tokens.shape[1] < needed:
            raise BadSampleError(
                f"tokens are {tokens.dtype} of {tokens.shape[1]} latent frames; expected {needed} integer ones"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise BadSampleError(
                f"tokens lie in {tokens.min()}..{tokens.max()}; expected 0..{self.vocab_size - 1} (the set's "
                "vocabulary)"
            )
        placed = Window(0, window.num_frames)
        return {
            "tokens": torch.from_numpy(tokens[:, :needed].astype("int64")),
            **self.companions.read(sample, placed, draws, list(range(self.num_views))),
        }


class TokensDataModule(ClipsDataModule):
    """Clips of discrete tokens as `Clip.tokens`; arguments as for `ClipsDataModule`."""

    def decoder(self, info: DatasetInfo, *, training: bool) -> Decoder:
        """Returns the decoder of one set. Raises ConfigError where it holds no tokens."""
        tokens = info.source.tokens
        if tokens is None:
            raise ConfigError(f"{info.root} holds no tokens; expected a tokenised set. Change `data.root`, or `data`.")
        if self.frame_stride != 1:
            raise ConfigError(f"data.frame_stride is {self.frame_stride}; expected 1 for tokens.")
        for length in self.streams.num_frames:
            latent_frames(length, int(tokens["ratio_time"]), "data.num_frames")
        return TokensDecoder(
            vocab_size=int(tokens["vocab_size"]),
            grid=(int(tokens["grid"][-2]), int(tokens["grid"][-1])),
            ratio=int(tokens["ratio_time"]),
            num_views=len(info.source.view_names),
            companions=Companions.of(info),
        )

    def shape(self, info: DatasetInfo) -> tuple[object, ...]:
        """Returns what must be equal within a batch besides the number of frames."""
        source = info.source
        grid = tuple(source.tokens["grid"][-2:]) if source.tokens else ()
        return (*grid, source.view_names, source.action_names, source.state_names)
