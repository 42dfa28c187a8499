"""The network of the Cosmos discrete video tokenizers (DV): Haar patches, causal encoder, FSQ, causal decoder.

At full width (128 channels) it is the released one; with fewer it is our own small tokenizer. The first frame of a clip
is one latent frame, every `ratio_time` further ones another. Encoder and decoder are causal, so latents of the first
frames and frames of the first latents do not depend on what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from longtake.encoders.cosmos_layers import (
    Attention,
    Convolution,
    Downsample,
    Factorised,
    FrameNorm,
    Past,
    ResidualBlock,
    State,
    Upsample,
)
from longtake.encoders.fsq import FSQ
from longtake.encoders.haar import patch, unpatch
from longtake.errors import ConfigError

_COLOURS = 3


class CosmosNetwork(nn.Module):
    """Clips <-> tokens.

    Args:
        levels: of the quantiser; the tokens are the numbers below their product.
        ratio_time: pixel frames a latent frame, a power of 2.
        ratio_space: pixels a latent cell, in rows and in columns, a power of 2.
        channels: width of the first layers.
        channels_mult: width of each resolution as a multiple of it.
        num_res_blocks: residual blocks of the encoder at each resolution; the decoder has one more.
        patch_size: side of the Haar blocks, a power of 2.
        z_channels: width on both sides of the quantiser.
        legacy: where the decoder upsamples: as tokenizers trained before 2024-09 do, from the lowest resolution on.
        temporal_attention: whether the middle attends over time as well as over space. Without it the state of a
            stream has a constant size.
    """

    def __init__(
        self,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        ratio_time: int = 8,
        ratio_space: int = 8,
        channels: int = 128,
        channels_mult: Sequence[int] = (2, 4, 4),
        num_res_blocks: int = 2,
        patch_size: int = 4,
        z_channels: int = 16,
        legacy: bool = False,
        temporal_attention: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"ratio_time": ratio_time, "ratio_space": ratio_space, "patch_size": patch_size}
        for name, size in sizes.items():
            if size < 2 or size & (size - 1) or size < patch_size:
                raise ConfigError(
                    f"{name} is {size} with patches of {patch_size}; expected a power of 2, 2 or more, that is no less "
                    f"than patch_size. Change `module.network.{name}`."
                )
        self.ratio_time, self.ratio_space = ratio_time, ratio_space
        self.haar_levels = patch_size.bit_length() - 1
        halvings = tuple(ratio.bit_length() - patch_size.bit_length() for ratio in (ratio_space, ratio_time))
        widths = [channels * multiple for multiple in channels_mult]
        wavelet = _COLOURS * patch_size**3
        self.encoder = Encoder(wavelet, channels, widths, num_res_blocks, z_channels, halvings, temporal_attention)
        self.quantizer = FSQ(levels)
        self.quant_conv = Convolution(z_channels, len(levels))
        self.post_quant_conv = Convolution(len(levels), z_channels)
        upsamplings = _upsamplings(halvings, len(widths), legacy)
        self.decoder = Decoder(wavelet, widths, num_res_blocks + 1, z_channels, upsamplings, temporal_attention)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Sets the weights of a network that is to be trained: maps that keep the variance, and residuals of zero.

        The first picture is grey.
        """
        silent = [self.decoder.conv_out[1]]
        for module in self.modules():
            if isinstance(module, Convolution):
                nn.init.normal_(module.conv3d.weight, std=module.conv3d.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.conv3d.bias)  # type: ignore[arg-type]
            elif isinstance(module, ResidualBlock):
                silent.append(module.conv2[1])
            elif isinstance(module, Attention):
                silent.append(module.proj_out)
        for module in silent:
            nn.init.zeros_(module.conv3d.weight)  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def begin_codes(self, mean: Tensor, covariance: Tensor) -> None:
        """Makes the quantiser's input the principal components of the latents, with mean 0 and variance 1.

        So all levels of all channels are in use from the first step on.

        Args:
            mean: of `latents`, [z].
            covariance: of them, [z z].
        """
        values, vectors = torch.linalg.eigh(covariance.double())
        num = len(self.quantizer.levels)
        values, vectors = values[-num:].flip(0), vectors[:, -num:].flip(1)
        signs = vectors[vectors.abs().argmax(0), torch.arange(num)].sign()  # eigh leaves them open
        matrix = (vectors * signs / values.clamp(min=1e-12).sqrt()).T
        self.quant_conv.conv3d.weight.copy_(matrix[:, :, None, None, None])
        self.quant_conv.conv3d.bias.copy_(-matrix @ mean.double())  # type: ignore[union-attr]

    def latents(self, video: Tensor, past: Past) -> Tensor:
        """Returns what the encoder makes of clips [n t c h w] in [-1, 1], before `quant_conv`, [n f h w z]."""
        dtype = self.quant_conv.conv3d.weight.dtype
        return self.encoder(patch(video, self.haar_levels, is_start=past.is_start).to(dtype), past)

    def features(self, video: Tensor, past: Past) -> Tensor:
        """Returns what the quantiser is given, [n f h w c], of clips [n t c h w] in [-1, 1]."""
        return self.quant_conv(self.latents(video, past), past)

    def frames(self, codes: Tensor, past: Past) -> Tensor:
        """Returns clips, float32 [n t c h w], of codes [n f h w c]."""
        dtype = self.quant_conv.conv3d.weight.dtype
        x = self.decoder(self.post_quant_conv(codes.to(dtype), past), past)
        return unpatch(x, self.haar_levels, is_start=past.is_start)

    def encode(self, video: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Returns the tokens [n f h w] of clips [n t c h w] in [-1, 1], and the state for the frames that follow.

        Args:
            video: 1 + k * ratio_time frames at the start of a clip, else k * ratio_time.
            state: None at a start.
        """
        past = Past(state)
        return self.quantizer.tokens(self.quantizer(self.features(video, past))), past.state

    def decode(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Returns the frames [n t c h w] of tokens [n f h w], and the state for the tokens that follow."""
        past = Past(state)
        return self.frames(self.quantizer.codes(tokens), past), past.state


class Encoder(nn.Module):
    """Wavelet coefficients -> latents; see `CosmosNetwork`."""

    def __init__(
        self,
        width_in: int,
        channels: int,
        widths: Sequence[int],
        num_blocks: int,
        z_channels: int,
        halvings: tuple[int, ...],
        temporal_attention: bool,
    ) -> None:
        super().__init__()
        last, (space, time) = len(widths) - 1, halvings
        if max(space, time) > last:
            raise ConfigError(
                f"{len(widths)} resolutions leave room for {last} halvings, and {max(space, time)} are needed; "
                "expected more numbers in `module.network.channels_mult`, or larger patches."
            )
        self.conv_in = Factorised(width_in, channels)
        self.down = nn.ModuleList()
        width = channels
        for level, wanted in enumerate(widths):
            part = nn.Module()
            part.block = nn.ModuleList(ResidualBlock(width if i == 0 else wanted, wanted) for i in range(num_blocks))
            if level < last:
                part.downsample = Downsample(wanted, space=level < space, time=level < time)
            self.down.append(part)
            width = wanted
        self.mid = Middle(width, temporal_attention)
        self.norm_out = FrameNorm(width)
        self.conv_out = Factorised(width, z_channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x, past)
        for level, part in enumerate(self.down):
            for block in part.block:  # type: ignore[union-attr]
                x = block(x, past)
            if level < len(self.down) - 1:
                x = part.downsample(x, past)  # type: ignore[operator]
        return self.conv_out(silu(self.norm_out(self.mid(x, past))), past)


class Decoder(nn.Module):
    """Latents -> wavelet coefficients; see `CosmosNetwork`."""

    def __init__(
        self,
        width_out: int,
        widths: Sequence[int],
        num_blocks: int,
        z_channels: int,
        upsamplings: Sequence[tuple[bool, bool]],
        temporal_attention: bool,
    ) -> None:
        super().__init__()
        width = widths[-1]
        self.conv_in = Factorised(z_channels, width)
        self.mid = Middle(width, temporal_attention)
        parts: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            part = nn.Module()
            wanted = widths[level]
            part.block = nn.ModuleList(ResidualBlock(width if i == 0 else wanted, wanted) for i in range(num_blocks))
            if level > 0:
                space, time = upsamplings[len(parts)]
                part.upsample = Upsample(wanted, space=space, time=time)
            parts.insert(0, part)
            width = wanted
        self.up = nn.ModuleList(parts)
        self.norm_out = FrameNorm(width)
        self.conv_out = Factorised(width, width_out)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.mid(self.conv_in(x, past), past)
        for level in reversed(range(len(self.up))):
            part = self.up[level]
            for block in part.block:  # type: ignore[union-attr]
                x = block(x, past)
            if level > 0:
                x = part.upsample(x, past)  # type: ignore[operator]
        return self.conv_out(silu(self.norm_out(x)), past)


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, temporal_attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        kinds = ("space", "time") if temporal_attention else ("space",)
        self.attn_1 = nn.ModuleList(Attention(width, kind) for kind in kinds)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.block_1(x, past)
        for layer in self.attn_1:
            x = layer(x, past)
        return self.block_2(x, past)


def _upsamplings(halvings: tuple[int, ...], num_levels: int, legacy: bool) -> list[tuple[bool, bool]]:
    """Returns what the decoder doubles after each resolution, (space, time), the lowest resolution first."""
    space, time = halvings
    found = []
    for step in range(num_levels - 1):
        doubles_time = step < time if legacy else 0 < step <= time
        found.append((doubles_time or (step < space and space > time), doubles_time))
    if tuple(sum(column) for column in zip(*found, strict=True)) != (halvings if found else ()):
        raise ConfigError(
            f"{num_levels} resolutions cannot undo {space} halvings of space and {time} of time with legacy={legacy}; "
            "expected another `module.network.channels_mult` (one more number), or `module.network.legacy=true`."
        )
    return found
