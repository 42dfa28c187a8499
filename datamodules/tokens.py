"""Clips of discrete tokens: codebook indices of a causal video tokenizer.

`tokens.npy` is the encoding of the whole clip; a sample may hold further ones, `tokens.<first pixel frame>.npy`, each a
causal start of its own (see `datamodules.cached`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from datamodules.cached import CachedDataModule, drawn_start
from datamodules.loading.decoding import Companions, Decoder, Draws, Fields, Window, read_array
from datamodules.loading.reading import Sample
from datamodules.shards import DatasetInfo
from longtake.errors import BadSampleError, ConfigError
from longtake.geometry import latent_frames

MEMBER = "tokens.npy"


@dataclass(frozen=True)
class TokensDecoder:
    """Takes the first latent frames of an encoding: tokens mean what they mean only from a causal start on.

    Attributes:
        vocab_size: tokens are 0 to vocab_size - 1.
        grid: rows and columns of a latent frame.
        ratio: pixel frames a latent frame.
        num_views: of the set.
        start_frames: pixel frames of the encodings that do not begin at frame 0; None: all up to the end.
        companions: what comes along with the frames.
    """

    vocab_size: int
    grid: tuple[int, int]
    ratio: int
    num_views: int
    start_frames: int | None
    companions: Companions

    def __call__(self, sample: Sample, window: Window, draws: Draws) -> Fields:
        """Returns tokens int64 [v t h w], actions [t_px a], states, masks, caption and fps."""
        needed = latent_frames(window.num_frames, self.ratio, "data.num_frames")
        members = members_by_start(sample)
        start = 0
        if len(members) > 1:
            lengths = {first: self._length(sample, first, needed) for first in members}
            start = drawn_start(lengths, window, needed, draws)
        tokens = self._checked(read_array(sample, members[start]), needed)
        placed = Window(start, window.num_frames)
        return {
            "tokens": torch.from_numpy(tokens[:, :needed].astype("int64")),
            **self.companions.read(sample, placed, draws, list(range(self.num_views))),
        }

    def _length(self, sample: Sample, first: int, needed: int) -> int:
        """Returns the latent frames of the encoding that begins at pixel frame `first`; `needed` if nothing says."""
        frames = self.start_frames if first else None
        if frames is None and sample.num_frames is not None:
            frames = sample.num_frames - first
        return needed if frames is None else 1 + (frames - 1) // self.ratio

    def _checked(self, tokens: np.ndarray, needed: int) -> np.ndarray:
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
        return tokens


def members_by_start(sample: Sample) -> dict[int, str]:
    """Returns the members with tokens, by the pixel frame at which they begin."""
    found = {0: MEMBER}
    for name in sample.members:
        parts = name.split(".")
        if len(parts) == 3 and parts[0] == "tokens" and parts[1].isdecimal() and parts[2] == "npy":
            found[int(parts[1])] = name
    return found


class TokensDataModule(CachedDataModule):
    """Clips of discrete tokens as `Clip.tokens`; arguments as for `CachedDataModule`."""

    def decoder(self, info: DatasetInfo, *, training: bool) -> Decoder:
        """Returns the decoder of one set. Raises ConfigError where it holds no tokens, or those of another encoder."""
        tokens = info.source.tokens
        if tokens is None:
            raise ConfigError(f"{info.root} holds no tokens; expected a tokenised set. Change `data.root`, or `data`.")
        self.check_cache(info, "tokens", tokens.get("encoder_fingerprint"), int(tokens["ratio_time"]))
        return TokensDecoder(
            vocab_size=int(tokens["vocab_size"]),
            grid=(int(tokens["grid"][-2]), int(tokens["grid"][-1])),
            ratio=int(tokens["ratio_time"]),
            num_views=len(info.source.view_names),
            start_frames=tokens.get("start_frames"),
            companions=Companions.of(info),
        )

    def shape(self, info: DatasetInfo) -> tuple[object, ...]:
        """Returns what must be equal within a batch besides the number of frames."""
        source = info.source
        grid = tuple(source.tokens["grid"][-2:]) if source.tokens else ()
        return (*grid, source.view_names, source.action_names, source.state_names)
