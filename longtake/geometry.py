"""Pixel frames <-> latent frames: the one place where they are converted.

A causal video encoder codes the first pixel frame by itself and every `ratio` further ones together, so n latent
frames hold 1 + ratio (n - 1) pixel frames. Counts say their unit: `_px` for pixel frames, `_lat` for latent frames.
"""

from __future__ import annotations

from longtake.errors import ConfigError


def latent_frames(num_frames_px: int, ratio: int, key: str) -> int:
    """Returns the latent frames of a causal clip.

    Args:
        num_frames_px: pixel frames, 1 + k * ratio.
        ratio: pixel frames a latent frame, 1 or more.
        key: configuration key that holds `num_frames_px`, for the message.

    Raises:
        ConfigError: off the lattice, with the two nearest legal values.
    """
    if num_frames_px < 1 or (num_frames_px - 1) % ratio != 0:
        below = 1 + max(0, (num_frames_px - 1) // ratio) * ratio
        raise ConfigError(
            f"{key} is {num_frames_px}; expected 1 + k*{ratio} frames, for example {below} or {below + ratio}. Change `{key}`."
        )
    return 1 + (num_frames_px - 1) // ratio


def pixel_frames(num_frames_lat: int, ratio: int) -> int:
    """Returns the pixel frames of `num_frames_lat` latent frames that begin at a causal start; 0 for 0."""
    return 0 if num_frames_lat == 0 else 1 + (num_frames_lat - 1) * ratio
