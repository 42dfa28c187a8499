"""Videos from a network that predicts tokens, and what it makes of given ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtake.errors import ConfigError, DataError
from longtake.generate import Frames, Request, VideoModel, with_given
from longtake.geometry import latent_frames, pixel_frames
from longtake.model_spec import TokenSpec
from longtake.networks.token_decode import PackedWeights
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan
from longtake.streaming import VideoChunk, to_uint8
from longtake.token_stream import token_chunks, token_conditions, tokens_of_pixels
from longtake.types import Clip, Conditions

logger = logging.getLogger("longtake")


class TokenModel(VideoModel):
    """See `VideoModel`. It computes in float32 whatever it was trained in, since cross entropy suffers from less.

    Args:
        spec: what the weights say of themselves.
        network: a `TokenTransformer`.
        encoders: see `VideoModel`; without "video" it can score tokens, but make no video.
        rollout: how tokens are drawn.
    """

    spec: TokenSpec

    def __init__(self, spec: TokenSpec, network: nn.Module, encoders: Mapping[str, Any], rollout: Any) -> None:
        super().__init__(spec, network, encoders, rollout)
        self.precision = "float32"
        self._packed: PackedWeights | None = None

    def to(self, device: torch.device | str) -> VideoModel:
        self._packed = None
        return super().to(device)

    @property
    def start_lat(self) -> int:
        """Latent frames that are given by default."""
        given = self.spec.num_context_frames
        return latent_frames(given, self._trained.ratio, "num_context_frames") if given else 0

    @property
    def packed(self) -> PackedWeights:
        """The network's weights prepared for decoding, in `precision`."""
        packed = self._packed
        if packed is None:
            self.network.to(getattr(torch, self.precision))
            packed = self._packed = self.network.pack()
        return packed

    def tokens_of(self, frames: np.ndarray) -> Tensor:
        """Returns the tokens [b v t h w] of frames, uint8 [b v t h w c] with t = 1 + k * ratio, or 0."""
        self._needs_tokenizer()
        video = torch.as_tensor(np.ascontiguousarray(frames), device=self.device).permute(0, 1, 2, 5, 3, 4)
        return tokens_of_pixels(video, self.video_encoder)

    def frames_of(self, tokens: Tensor) -> np.ndarray:
        """Returns the frames, uint8 [b v t h w c], of tokens [b v t h w] from a causal start on."""
        self._needs_tokenizer()
        return to_uint8(self.video_encoder.decode(tokens.to(self.device)))

    def conditions(self, clip: Clip, num_lat: int, first_px: int = 0, num_frames_px: int | None = None) -> Conditions:
        """Returns what the network is told of latents of a clip (texts encoded), see `token_conditions`."""
        clip = clip if self.spec.action_names else dataclasses.replace(clip, actions=None)
        return token_conditions(
            clip,
            num_lat=num_lat,
            ratio=self._trained.ratio,
            actions=self.encoders.get("actions"),
            first_px=first_px,
            num_frames_px=num_frames_px,
        )

    def check_tokens(self, tokens: np.ndarray, what: str) -> np.ndarray:
        """Returns tokens [t h w] or [v t h w] as int64 [v t h w].

        Args:
            tokens: integers.
            what: they are, for messages.

        Raises:
            ConfigError: another grid than the weights were trained on.
            DataError: tokens outside of the vocabulary.
        """
        tokens = tokens if tokens.ndim == 4 else tokens[None]
        rows, columns = self.spec.grid_lat[1:]
        if tokens.ndim != 4 or tokens.shape[2:] != (rows, columns) or tokens.dtype.kind not in "iu":
            raise ConfigError(
                f"{what}: {tokens.dtype} {list(tokens.shape)}; expected whole numbers [latent frames, {rows}, "
                f"{columns}], the grid that these weights were trained on. Change `input_tokens_dir` or `ckpt`."
            )
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.spec.vocab_size):
            raise DataError(
                f"{what}: tokens from {tokens.min()} to {tokens.max()}; expected 0 to {self.spec.vocab_size - 1}, the "
                "vocabulary of these weights. Change `input_tokens_dir` or `ckpt`."
            )
        return tokens.astype(np.int64)

    def _given(
        self, start: Frames | str | Path | None, num_context_frames: int | None
    ) -> tuple[Frames, np.ndarray | None, list[str]]:
        self._needs_tokenizer()
        if not isinstance(start, np.ndarray) or start.dtype == np.uint8:
            return super()._given(start, num_context_frames)
        tokens = self.check_tokens(start, "the start")
        there = tokens.shape[1]
        if num_context_frames is None:
            count = min(there, max(self._trained.starts_lat))
        else:
            count = latent_frames(num_context_frames, self._trained.ratio, "num_context_frames")
        if count > there:
            raise ConfigError(
                f"num_context_frames is {num_context_frames}, but the start has {there} latent frames, that is "
                f"{pixel_frames(there, self._trained.ratio)}; expected at most that. Change `num_context_frames`."
            )
        tokens = tokens[:, :count]
        return self.frames_of(torch.from_numpy(tokens)[None])[0], tokens, []

    def _stream(self, request: Request) -> Iterator[VideoChunk]:
        count, plan = len(request.names), request.plan
        assert isinstance(plan, RolloutPlan), f"tokens follow a plan of latents, got {plan}"
        trained_px = pixel_frames(self.spec.grid_lat[0], self._trained.ratio)
        for notice in request.notices:
            logger.info(notice)
        if plan.num_frames_px > trained_px:
            logger.info(
                "%d frames are more than the %d of training: whenever a window is full, its last %d frames are encoded "
                "again and start the next one.",
                plan.num_frames_px,
                trained_px,
                pixel_frames(max(1, self.start_lat), self._trained.ratio),
            )
        if request.tokens is not None:
            start = torch.from_numpy(request.tokens)[None].to(self.device)
        else:
            start = self.tokens_of(request.start[None])
        actions = None if request.actions is None else torch.from_numpy(request.actions)[None].to(self.device)
        clip = Clip(
            actions=None if actions is None else actions.expand(count, -1, -1),
            fps=torch.full((count,), float(self.fps), device=self.device),
            view_ids=torch.arange(start.shape[1], device=self.device).expand(count, -1),
        )
        clip = dataclasses.replace(clip, **self.text_fields([request.prompt or ""] * count))
        chunks = token_chunks(
            self.rollout,
            self.network,
            self.video_encoder,
            start.expand(count, -1, -1, -1, -1),
            partial(self.conditions, clip, num_frames_px=plan.num_frames_px),
            plan,
            NoiseKey(request.seed, request.names),
            restart_lat=self.start_lat,
            packed=self.packed,
        )
        for chunk in chunks:
            yield with_given(chunk, request.start)

    def _needs_tokenizer(self) -> None:
        if self.video_encoder is None:
            raise ConfigError(
                "these weights come without a video tokenizer, so they can only score tokens (only_eval=true with "
                "input_type=tokens). Choose `encoder/video`, for example encoder/video=cosmos_dv8x8x8."
            )
