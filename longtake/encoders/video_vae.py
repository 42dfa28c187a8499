"""Our small first stage: 4 frames x 8 x 8 pixels <-> 16 numbers, causal in time, made of 2-D convolutions.

Pixel frames come in groups of `RATIO_TIME`: the first frame repeated, then four by four. The encoder sees one group at
a time. The decoder also sees what it made of earlier groups (the camera moves, so what was in view helps), through
layers that keep one feature map each: a stream of any length costs the same for every chunk. Each side is a linear
map of 4x8x8 blocks, which can begin as the principal components of the data, plus a residual network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.encoders.shipped import load_network
from longtake.encoders.video import DTYPES, LatentGeometry, VideoEncoder
from longtake.errors import ConfigError, unknown_choice
from longtake.geometry import latent_frames
from longtake.pretrained.weights_file import fingerprint

RATIO_TIME, RATIO_SPACE = 4, 8
KIND = "video_encoder"

_COLOURS = 3
_BLOCK = RATIO_TIME * _COLOURS * RATIO_SPACE**2  # numbers in a 4x8x8 block
_LEVELS = 3  # resolutions: 1/2, 1/4 and 1/8 of the pixels

State = tuple[Tensor, ...]
"""For each layer that looks back its last feature map, [n c h w]."""


def grouped(video: Tensor) -> Tensor:
    """Returns the groups of clips [n t c h w] as pictures with 12 channels, [(n f) 12 h w]."""
    video = torch.cat([video[:, :1].expand(-1, RATIO_TIME - 1, -1, -1, -1), video], dim=1)
    groups = video.unflatten(1, (-1, RATIO_TIME)).flatten(0, 1).flatten(1, 2)
    return groups.contiguous(memory_format=torch.channels_last)


def ungrouped(groups: Tensor, num_clips: int, *, is_start: bool) -> Tensor:
    """Returns clips [n t c h w] of groups [(n f) 12 h w]; a group at a start holds its frame in the last place."""
    frames = groups.unflatten(0, (num_clips, -1)).unflatten(2, (RATIO_TIME, _COLOURS)).flatten(1, 2)
    return frames[:, RATIO_TIME - 1 :] if is_start else frames


class ChannelNorm(nn.Module):
    """Divides every position by the root mean square of its channels: nothing of other positions or frames enters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6)
        return x * inverse.to(x.dtype) * self.scale.to(x.dtype)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))), zero at the start of training.

    Args:
        width: channels.
        looks_back: the first convolution also sees the normalised input of the group before.
    """

    def __init__(self, width: int, *, looks_back: bool = False) -> None:
        super().__init__()
        self.looks_back = looks_back
        self.norm = ChannelNorm(width)
        self.first = nn.Conv2d(2 * width if looks_back else width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, num_clips: int, before: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the output and, where it looks back, what to give as `before` for the groups that follow.

        Args:
            x: groups of clips in order, [(n f) c h w].
            num_clips: n.
            before: the feature map [n c h w] of the group before the first one; None at the start of a clip.
        """
        features, last = F.silu(self.norm(x)), None
        if self.looks_back:
            now = features.unflatten(0, (num_clips, -1))
            start = torch.zeros_like(now[:, 0]) if before is None else before.to(now.dtype)
            earlier = torch.cat([start[:, None], now[:, :-1]], dim=1).flatten(0, 1)
            features = torch.cat([features, earlier], dim=1).contiguous(memory_format=torch.channels_last)
            last = now[:, -1]
        return x + self.second(F.silu(self.first(features))), last


class VideoVAENetwork(nn.Module):
    """Encoder and decoder of groups of frames. Its latents are raw: `mean` and `std` normalise them.

    Args:
        channels: numbers a latent cell.
        encoder_widths: channels at 1/2, 1/4 and 1/8 of the pixels.
        encoder_blocks: residual blocks there.
        decoder_widths: the same for the decoder.
        decoder_blocks: those at 1/8 look back in time.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int = 16,
        encoder_widths: Sequence[int] = (64, 112, 160),
        encoder_blocks: Sequence[int] = (1, 2, 1),
        decoder_widths: Sequence[int] = (64, 112, 160),
        decoder_blocks: Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__()
        if {len(encoder_widths), len(encoder_blocks), len(decoder_widths), len(decoder_blocks)} != {_LEVELS}:
            raise ConfigError(
                f"widths and blocks of the first stage are {list(encoder_widths)}, {list(encoder_blocks)}, "
                f"{list(decoder_widths)} and {list(decoder_blocks)}; expected {_LEVELS} numbers each. Change "
                "`module.network`."
            )
        self.channels = channels
        self.encoder = Encoder(channels, encoder_widths, encoder_blocks)
        self.decoder = Decoder(channels, decoder_widths, decoder_blocks)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, video: Tensor) -> Tensor:
        """Returns raw latents [n f c h w] of clips [n t c h w] in [-1, 1] with 1 + 4k frames."""
        return self.encoder(grouped(video)).unflatten(0, (len(video), -1))

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Returns frames [n t c h w] of raw latents [n f c h w], and the state for the latents that follow.

        Args:
            latents: those after the ones that gave `state`.
            state: None at the start of a clip, where the first latent is one frame.
        """
        groups, new_state = self.decoder(latents.flatten(0, 1), len(latents), state)
        return ungrouped(groups, len(latents), is_start=state is None), new_state

    @torch.no_grad()
    def begin_linear(self, mean: Tensor, covariance: Tensor) -> None:
        """Makes the linear maps the principal components of the data, with latents of mean 0 and variance 1.

        Args:
            mean: of 4x8x8 blocks as `blocks` lays them out, [768].
            covariance: of them, [768 768].
        """
        values, vectors = torch.linalg.eigh(covariance.double())
        values, vectors = values[-self.channels :].flip(0), vectors[:, -self.channels :].flip(1)
        signs = vectors[vectors.abs().argmax(0), torch.arange(self.channels)].sign()  # eigh leaves them open
        vectors, std = vectors * signs, values.clamp(min=1e-8).sqrt()
        encode, decode = (vectors / std).T, vectors * std
        pairs = (
            (self.encoder.linear.weight, encode[:, :, None, None]),
            (self.encoder.linear.bias, -encode @ mean.double()),
            (self.decoder.linear.weight, decode[:, :, None, None]),
            (self.decoder.linear.bias, mean),
        )
        for parameter, value in pairs:
            parameter.copy_(value)  # type: ignore[union-attr]

    @staticmethod
    def blocks(video: Tensor) -> Tensor:
        """Returns the 4x8x8 blocks of clips [n t c h w] as the linear maps see them, [m 768]."""
        return F.pixel_unshuffle(grouped(video), RATIO_SPACE).permute(0, 2, 3, 1).reshape(-1, _BLOCK)


class Encoder(nn.Module):
    """Groups [m 12 h w] -> raw latents [m c h/8 w/8], each group by itself."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.linear = nn.Conv2d(_BLOCK, channels, 1)
        self.first = nn.Conv2d(4 * _COLOURS * RATIO_TIME, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width) for _ in range(count))
            for width, count in zip(widths, blocks, strict=True)
        )
        self.down = nn.ModuleList(nn.Conv2d(4 * widths[i], widths[i + 1], 1) for i in range(_LEVELS - 1))
        self.norm = ChannelNorm(widths[-1])
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, groups: Tensor) -> Tensor:
        x = self.first(F.pixel_unshuffle(groups, 2))
        for level, blocks in enumerate(self.blocks):
            if level > 0:
                x = self.down[level - 1](F.pixel_unshuffle(x, 2))
            for block in blocks:  # type: ignore[union-attr]
                x, _ = block(x, len(x))
        linear = self.linear(F.pixel_unshuffle(groups, RATIO_SPACE))
        return linear.float() + self.last(F.silu(self.norm(x))).float()


class Decoder(nn.Module):
    """Raw latents [(n f) c h/8 w/8] -> groups [(n f) 12 h w]; looks back in time at the lowest resolution."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, _BLOCK, 1)
        self.first = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(widths[level], looks_back=level == _LEVELS - 1) for _ in range(blocks[level]))
            for level in reversed(range(_LEVELS))
        )
        self.up = nn.ModuleList(nn.Conv2d(widths[i + 1], 4 * widths[i], 1) for i in reversed(range(_LEVELS - 1)))
        self.norm = ChannelNorm(widths[0])
        self.last = nn.Conv2d(widths[0], 4 * _COLOURS * RATIO_TIME, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, latents: Tensor, num_clips: int, state: State | None) -> tuple[Tensor, State]:
        latents = latents.contiguous(memory_format=torch.channels_last)
        x, kept = self.first(latents), []
        for level, blocks in enumerate(self.blocks):
            if level > 0:
                x = F.pixel_shuffle(self.up[level - 1](x), 2)
            for block in blocks:  # type: ignore[union-attr]
                before = state[len(kept)] if block.looks_back and state is not None else None
                x, last = block(x, num_clips, before)
                if last is not None:
                    kept.append(last)
        linear = F.pixel_shuffle(self.linear(latents), RATIO_SPACE)
        return linear.float() + F.pixel_shuffle(self.last(F.silu(self.norm(x))), 2).float(), tuple(kept)


class VideoVAE(VideoEncoder):
    """The trained first stage.

    Args:
        weights: name of a file in the project's folder `weights` (without its ending), or a path.
        dtype: what it computes in: "float32", or "bfloat16" where speed counts more than the last digits.
    """

    def __init__(self, weights: str, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise unknown_choice("type of numbers", dtype, DTYPES, "encoder.video.dtype")
        network, config = load_network(weights, KIND, VideoVAENetwork)
        super().__init__(LatentGeometry(RATIO_TIME, RATIO_SPACE, network.channels), network.mean, network.std)
        self.network = network
        self._config = config
        assert self.fingerprint  # of the numbers in the file, not of what they are rounded to below
        self.network.to(DTYPES[dtype])
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of what makes latents; another decoder for the same latents does not change what they mean."""
        state = self.network.state_dict()
        config = {name: value for name, value in self._config.items() if not name.startswith("decoder")}
        return fingerprint(config, {name: value for name, value in state.items() if not name.startswith("decoder.")})

    def encode_clips(self, video: Tensor) -> Tensor:
        raw = self.network.encode(video).float()
        return (raw - self.mean[:, None, None]) / self.std[:, None, None]

    def encode_starts(self, video: Tensor, starts: Mapping[int, int]) -> dict[int, Tensor]:
        """See `VideoEncoder`. Groups are encoded one by one, so sub-clips share all but their first latents."""
        latents: dict[int, Tensor] = {}
        for phase in sorted({start % RATIO_TIME for start in starts}):
            alike = {start: count for start, count in starts.items() if start % RATIO_TIME == phase}
            first = min(alike)
            shared = self.encode(video[:, :, first : max(start + count for start, count in alike.items())])
            for start, count in alike.items():
                begin = (start - first) // RATIO_TIME
                end = begin + latent_frames(count, RATIO_TIME, "num_frames")
                own = shared[:, :, :1] if start == first else self.encode(video[:, :, start : start + 1])
                latents[start] = torch.cat([own, shared[:, :, begin + 1 : end]], dim=2)
        return {start: latents[start] for start in starts}

    def decode_clips(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        raw = latents * self.std[:, None, None].to(latents) + self.mean[:, None, None].to(latents)
        return self.network.decode(raw, state)
