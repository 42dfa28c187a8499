"""The initial noise of NVIDIA's Cosmos drivers, for runs that shall be compared with theirs number by number."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from longtake.errors import ConfigError
from longtake.rollout.noise import NoiseKey


def cosmos_noise(key: NoiseKey, chunk: int, like: Tensor) -> Tensor:
    """Returns the noise of one chunk, of the shape, dtype and device of `like` [b v f c h w].

    It is NumPy's `RandomState(seed + chunk).standard_normal`, cast to float32, over [b c (v f) h w]: the views lie one
    after another in time. The first sample is that of a batch of one; the names of the samples do not enter.

    Raises:
        ConfigError: NumPy takes no such seed.
    """
    seed = key.seed + chunk
    if not 0 <= seed < 1 << 32:
        raise ConfigError(
            f"seed is {key.seed}, and rollout.noise=cosmos uses seed + chunk as a 32-bit number; expected less than "
            f"2**32 - {chunk}. Change `seed`, or set rollout.noise=keyed."
        )
    b, v, f, c, h, w = like.shape
    generator = np.random.RandomState(seed)  # noqa: NPY002 - the stream of the released drivers is this generator's
    drawn = generator.standard_normal((b, c, v * f, h, w)).astype(np.float32)
    noise = rearrange(torch.from_numpy(drawn), "b c (v f) h w -> b v f c h w", v=v)
    return noise.to(like.device, like.dtype)
