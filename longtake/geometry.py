"""Pixel frames <-> latent frames: the one place where they are converted.

A causal video encoder codes the first pixel frame by itself and every `ratio` further ones together, so n latent
frames hold 1 + ratio (n - 1) pixel frames. Counts say their unit: `_px` for pixel frames, `_lat` for latent frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longtake.errors import ConfigError

if TYPE_CHECKING:  # data workers import this module and need no torch
    from torch import Tensor


def latent_frames(num_frames_px: int, ratio: int, key: str, block_lat: int | None = None) -> int:
    """Returns the latent frames of a causal clip.

    Args:
        num_frames_px: pixel frames, 1 + k * ratio; in blocks whole ones, and such a count after them.
        ratio: pixel frames a latent frame, 1 or more.
        key: configuration key that holds `num_frames_px`, for the message.
        block_lat: latent frames of a block.

    Raises:
        ConfigError: off the lattice, with the two nearest legal values.
    """
    if block_lat is not None:
        return _latent_frames_in_blocks(num_frames_px, ratio, key, block_lat)
    if num_frames_px < 1 or (num_frames_px - 1) % ratio != 0:
        below = 1 + max(0, (num_frames_px - 1) // ratio) * ratio
        raise ConfigError(
            f"{key} is {num_frames_px}; expected 1 + k*{ratio} frames, for example {below} or {below + ratio}. Change "
            f"`{key}`."
        )
    return 1 + (num_frames_px - 1) // ratio


def _latent_frames_in_blocks(num_frames_px: int, ratio: int, key: str, block_lat: int) -> int:
    num_lat = covering_latent_frames(max(1, num_frames_px), ratio, block_lat)
    above = pixel_frames(num_lat, ratio, block_lat)
    if above == num_frames_px:
        return num_lat
    below = pixel_frames(max(1, num_lat - 1), ratio, block_lat)
    block_px = pixel_frames(block_lat, ratio)
    raise ConfigError(
        f"{key} is {num_frames_px}; expected blocks of {block_px} frames, and 1 + k*{ratio} frames where the last one "
        f"is not whole, for example {below} or {max(above, below + 1)}. Change `{key}`."
    )


def pixel_frames(num_frames_lat: int, ratio: int, block_lat: int | None = None) -> int:
    """Returns the pixel frames of `num_frames_lat` latent frames that begin at a causal start; 0 for 0."""
    if block_lat is not None:
        blocks, rest = divmod(num_frames_lat, block_lat)
        return blocks * pixel_frames(block_lat, ratio) + pixel_frames(rest, ratio)
    return 0 if num_frames_lat == 0 else 1 + (num_frames_lat - 1) * ratio


def covering_latent_frames(num_frames_px: int, ratio: int, block_lat: int | None = None) -> int:
    """Returns the fewest latent frames whose pixel frames hold `num_frames_px`: on the lattice or the next value up."""
    if block_lat is not None:
        blocks, rest = divmod(num_frames_px, pixel_frames(block_lat, ratio))
        return blocks * block_lat + covering_latent_frames(rest, ratio)
    return 0 if num_frames_px == 0 else 1 - (1 - num_frames_px) // ratio


def pixel_range(start_lat: int, stop_lat: int, ratio: int, block_lat: int | None = None) -> tuple[int, int]:
    """Returns the pixel frames [start, stop) of latent frames [start, stop): 0 is pixel 0, k is 4k-3..4k at 4."""
    return pixel_frames(start_lat, ratio, block_lat), pixel_frames(stop_lat, ratio, block_lat)


def whole_chunks(num_frames_px: int, chunk_lat: int, ratio: int, key: str) -> int:
    """Returns the chunks of a clip.

    Args:
        num_frames_px: pixel frames of the clip.
        chunk_lat: latent frames of a chunk.
        ratio: pixel frames a latent frame.
        key: configuration key that holds `num_frames_px`, for the message.

    Raises:
        ConfigError: off the lattice, or not whole chunks; with the two nearest legal values.
    """
    num_lat = latent_frames(num_frames_px, ratio, key)
    if num_lat % chunk_lat != 0:
        below = max(1, num_lat // chunk_lat)
        legal = [pixel_frames(count * chunk_lat, ratio) for count in (below, below + 1)]
        raise ConfigError(
            f"{key} is {num_frames_px} frames, that is {num_lat} latent frames, which are not whole chunks of "
            f"{chunk_lat}; "
            f"expected for example {legal[0]} or {legal[1]} frames. Change `{key}` or `video.chunk_lat`."
        )
    return num_lat // chunk_lat


def group_by_latent(values: Tensor, ratio: int, block_lat: int | None = None) -> Tensor:
    """Returns values of pixel frames (actions) laid side by side for each latent frame.

    Latent frame 0 gets pixel 0 in its last place and zeros before it; latent frame k gets pixels 4k-3..4k at ratio 4.

    Args:
        values: [b t a], t = 1 + k * ratio pixel frames from a causal start; in blocks whole ones.
        ratio: pixel frames a latent frame.
        block_lat: latent frames of a block.

    Returns:
        [b t' ratio*a] with t' = 1 + k latent frames, pixel frame after pixel frame.
    """
    if block_lat is not None:
        blocks = values.unflatten(1, (-1, pixel_frames(block_lat, ratio)))
        return group_by_latent(blocks.flatten(0, 1), ratio).unflatten(0, blocks.shape[:2]).flatten(1, 2)
    b, t, a = values.shape
    assert t % ratio == 1 % ratio, f"{t} pixel frames are no causal clip at {ratio} a latent frame"
    full = values.new_zeros(b, t - 1 + ratio, a)
    full[:, ratio - 1 :] = values
    return full.reshape(b, -1, ratio * a)
