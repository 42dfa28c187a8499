"""Video tokenizers of the Cosmos kind: our own small one, the released ones, and released JIT files as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longtake.encoders.cosmos_network import CosmosNetwork
from longtake.encoders.shipped import load_network
from longtake.encoders.video import DTYPES
from longtake.encoders.video_tokens import TokenGeometry, VideoTokens
from longtake.errors import unknown_choice
from longtake.pretrained.cosmos_tokenizer import find_legacy, fit, open_jit, read_tokenizer
from longtake.pretrained.weights_file import fingerprint

KIND = "video_tokens"


class CosmosVideoTokenizer(VideoTokens):
    """A tokenizer of a network with trained weights.

    It works on one latent frame at a time, with a state: memory does not grow with the length of a video (but for
    temporal attention, which keeps a feature map a latent frame), and every way to cut a video gives the same bits.

    Args:
        network: with its weights.
        config: what names the network in the fingerprint, plain JSON.
        dtype: what it computes in: "float32", or "bfloat16" where speed counts more than the last digits.
    """

    def __init__(self, network: CosmosNetwork, config: Mapping[str, Any], dtype: str = "float32") -> None:
        super().__init__(TokenGeometry(network.ratio_time, network.ratio_space, network.quantizer.levels))
        self.network, self._config = network, dict(config)
        if dtype != "float32":
            assert self.fingerprint  # of the numbers in the file, not of what they are rounded to below
        self.network.to(DTYPES[_checked(dtype)])
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return fingerprint(self._config, self.network.state_dict())

    def encode_clips(self, video: Tensor) -> Tensor:
        tokens, state = self.network.encode(video[:, :1])
        parts = [tokens]
        for group in video[:, 1:].split(self.geometry.ratio_time, dim=1) if video.shape[1] > 1 else ():
            tokens, state = self.network.encode(group, state)
            parts.append(tokens)
        return torch.cat(parts, dim=1)

    def decode_clips(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        parts = []
        for latent in tokens.split(1, dim=1):
            frames, state = self.network.decode(latent, state)
            parts.append(frames)
        return torch.cat(parts, dim=1), state


class VideoFSQ(CosmosVideoTokenizer):
    """Our own tokenizer.

    Args:
        weights: name of a file in the project's folder `weights` (without its ending), or a path.
        dtype: "float32" or "bfloat16".
    """

    def __init__(self, weights: str, dtype: str = "float32") -> None:
        network, config = load_network(weights, KIND, CosmosNetwork)
        super().__init__(network, config, _checked(dtype))


class CosmosDV(CosmosVideoTokenizer):
    """A released tokenizer (Cosmos-0.1-Tokenizer-DV*, Cosmos-Tokenize1-DV*), from the tensors of its files.

    Args:
        path: folder with `encoder.jit` and `decoder.jit` (or `autoencoder.jit`), or a file with all tensors.
        ratio_time: pixel frames a latent frame.
        ratio_space: pixels a token.
        patch_size: see `CosmosNetwork`, as the others below.
        z_channels: see there.
        legacy: see there; None finds out from the names of the tensors.
        channels: see there.
        channels_mult: see there.
        num_res_blocks: see there.
        levels: see there.
        dtype: "float32" or "bfloat16" (what the files hold).
    """

    def __init__(
        self,
        path: str,
        ratio_time: int = 8,
        ratio_space: int = 8,
        patch_size: int = 4,
        z_channels: int = 16,
        legacy: bool | None = None,
        channels: int = 128,
        channels_mult: Sequence[int] = (2, 4, 4),
        num_res_blocks: int = 2,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        dtype: str = "float32",
    ) -> None:
        _checked(dtype)
        tensors = read_tokenizer(path)
        sizes: dict[str, Any] = {
            "levels": list(levels),
            "ratio_time": ratio_time,
            "ratio_space": ratio_space,
            "channels": channels,
            "channels_mult": list(channels_mult),
            "num_res_blocks": num_res_blocks,
            "patch_size": patch_size,
            "z_channels": z_channels,
            "legacy": find_legacy(tensors, path) if legacy is None else legacy,
        }
        network = CosmosNetwork(**sizes)
        fit(network, tensors, path)
        super().__init__(network, sizes, dtype)


class CosmosJit(VideoTokens):
    """A released tokenizer run as it was published: the TorchScript programs themselves.

    A stream keeps the tokens so far and decodes them again for every chunk, since the programs keep no state: exact,
    because they are causal, but slower with every chunk. `CosmosDV` reads the same files and does not have that cost.

    Args:
        path: folder with `encoder.jit` and `decoder.jit`.
        ratio_time: pixel frames a latent frame.
        ratio_space: pixels a token.
        levels: of the quantiser.
        dtype: "float32" or "bfloat16" (what the files hold).
    """

    def __init__(
        self,
        path: str,
        ratio_time: int = 8,
        ratio_space: int = 8,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        dtype: str = "float32",
    ) -> None:
        super().__init__(TokenGeometry(ratio_time, ratio_space, tuple(levels)))
        self.encoder, self.decoder = open_jit(path, "encoder"), open_jit(path, "decoder")
        self._config = {"ratio_time": ratio_time, "ratio_space": ratio_space, "levels": list(levels)}
        assert self.fingerprint
        self.to(DTYPES[_checked(dtype)])
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return fingerprint(self._config, self.state_dict())

    def encode_clips(self, video: Tensor) -> Tensor:
        # with other fusers a second call gives other bits than the first (pytorch#74534)
        with torch.jit.fuser("fuser0"):  # type: ignore[reportPrivateImportUsage]
            return self.encoder(video.transpose(1, 2))[0].long()

    def decode_clips(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        so_far = tokens if state is None else torch.cat([state, tokens], dim=1)
        with torch.jit.fuser("fuser0"):  # type: ignore[reportPrivateImportUsage]
            video = self.decoder(so_far).transpose(1, 2)
        known = 0 if state is None else 1 + (state.shape[1] - 1) * self.geometry.ratio_time
        return video[:, known:], so_far


def _checked(dtype: str) -> str:
    if dtype not in DTYPES:
        raise unknown_choice("type of numbers", dtype, DTYPES, "encoder.video.dtype")
    return dtype
