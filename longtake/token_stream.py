"""Between pixels and tokens: what a token network is told, and from a rollout of tokens to frames as it is made.

    pixel frames  0 .. 8 | 9 .. 16      window 0: 9 frames are given (2 latents), 8 are made (1 latent)
                     8 .. 16 | 17 .. 24     window 1 starts from the last 9 frames, encoded again as a causal start

A window begins where time is 0 for the network. Its actions are those of its pixel frames; what led to its first frame
is not told, as in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.geometry import pixel_frames
from longtake.networks.action_motion import latent_motion
from longtake.networks.token_decode import PackedWeights
from longtake.networks.token_transformer import TokenTransformer
from longtake.rollout.conditions import clip_conditions
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import RolloutPlan
from longtake.rollout.tokens import TokenRollout
from longtake.streaming import VideoChunk, to_uint8
from longtake.types import Clip, Conditions


class ConditionsOf(Protocol):
    """What a window is told."""

    def __call__(self, *, num_lat: int, first_px: int) -> Conditions:
        """Returns the conditions of `num_lat` latents whose first pixel frame is frame `first_px` of the video."""
        ...


def tokens_of_pixels(video: Tensor, encoder: Any) -> Tensor:
    """Returns the tokens, int64 [b v t h w], of uint8 pixels [b v t c h w]; none of them for none."""
    if video.shape[2] == 0:
        grid = encoder.geometry.grid(*video.shape[-2:])
        return torch.zeros(*video.shape[:2], 0, *grid, dtype=torch.int64, device=video.device)
    return encoder.encode(video.float() / 127.5 - 1)


def token_conditions(
    clip: Clip,
    *,
    num_lat: int,
    ratio: int,
    actions: Any = None,
    first_px: int = 0,
    num_frames_px: int | None = None,
) -> Conditions:
    """Returns the conditions of latents, one slot each.

    Args:
        clip: texts already encoded; actions [b t a] from pixel frame 0 of the video on.
        num_lat: latents wanted.
        ratio: pixel frames a latent frame.
        actions: encoder of actions (FAST); None: the network reads them as numbers.
        first_px: pixel frame that is the causal start of the latents.
        num_frames_px: pixel frames of the video, which must have an action; None: all of the latents'. Later ones are
            only there because a length was rounded up; they repeat the last action.

    Raises:
        ConfigError: there are fewer actions than that.
    """
    table = clip.actions
    if table is None:
        return clip_conditions(clip, chunk_lat=1, num_chunks=num_lat, ratio=ratio)
    wanted = pixel_frames(num_lat, ratio)
    needed = first_px + wanted if num_frames_px is None else min(num_frames_px, first_px + wanted)
    if table.shape[1] < needed:
        raise ConfigError(
            f"actions are given for {table.shape[1]} frames, but {needed} frames are wanted. Give actions for every "
            "frame (`actions`) or lower `num_frames`."
        )
    table = table[:, first_px : first_px + wanted]
    table = torch.cat([table, table[:, -1:].expand(-1, wanted - table.shape[1], -1)], dim=1)
    if first_px:
        table = torch.cat([torch.zeros_like(table[:, :1]), table[:, 1:]], dim=1)
    told = clip_conditions(dataclasses.replace(clip, actions=table), chunk_lat=1, num_chunks=num_lat, ratio=ratio)
    assert told.actions is not None, "actions were given"
    told = dataclasses.replace(told, motion=latent_motion(told.actions, ratio))
    return told if actions is None else dataclasses.replace(told, actions=actions(table).unsqueeze(2))


def token_chunks(
    rollout: TokenRollout,
    network: TokenTransformer,
    codec: Any,
    context: Tensor,
    conditions: ConditionsOf,
    plan: RolloutPlan,
    key: NoiseKey,
    *,
    restart_lat: int,
    packed: PackedWeights | None = None,
) -> Iterator[VideoChunk]:
    """Yields the frames of every latent as soon as its tokens are there, those of the start included.

    Tokens are decoded in the precision of the network's weights, whatever autocast is around.

    Args:
        rollout: how tokens are drawn.
        network: in evaluation mode.
        codec: the video tokenizer.
        context: tokens of the start, [b v t h w] with t = plan.start_lat.
        conditions: of each window.
        plan: from `plan_rollout`; frames past its end are cut off.
        key: names the draws.
        restart_lat: latents that windows after the first one start from; at least 1 is taken.
        packed: weights prepared for decoding.
    """
    num_lat, ratio, lead = network.grid_lat[0], plan.trained.ratio, max(1, restart_lat)
    recent: list[Tensor] = []  # the last frames, as they were decoded

    def restart(_: Tensor) -> Tensor:
        return codec.encode(recent[0])

    def told(window: int) -> Conditions:
        return conditions(num_lat=num_lat, first_px=window * (num_lat - lead) * ratio)

    stream = rollout(network, context, told, plan.num_chunks, key, restart=restart, packed=packed)
    state: Any = None
    while True:
        with torch.autocast(context.device.type, enabled=False):
            latent = next(stream, None)
        if latent is None:
            return
        if latent.start is not None:
            _, state = codec.decode_stream(latent.start, None)
        video, state = codec.decode_stream(latent.tokens[:, :, None], state)
        recent = [torch.cat([*recent, video], dim=2)[:, :, -pixel_frames(lead, ratio) :]]
        start, stop = plan.frames_of(latent.index)
        given = min(max(plan.start_px - start, 0), stop - start)
        yield VideoChunk(latent.index, start, to_uint8(video[:, :, : stop - start]), given)
