"""Flow matching: path, velocity, the draw of noise levels and their weight.

Path x_sigma = (1 - sigma) x0 + sigma noise with sigma in [0, 1], velocity = noise - x0, x0 = x_sigma - sigma velocity
(Lipman et al. 2023; Esser et al. 2024, arXiv 2403.03206, for shift and logit-normal weight). The network's timestep is
1000 sigma.

The rule of the released LaCT code is the default: u uniform, sigma = shift map of u, the shift from the number of
tokens of a chunk, the weight at the unshifted u. That equals, in expectation, drawing u from the logit-normal
distribution. The paper states a shift of 3 and a mean of 0.5; both are one setting away.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice

_NUM_BINS = 1000
_TOKEN_LINE = ((32760, 3.0), (73710, 5.0))  # (tokens, shift): log(shift) is linear in tokens through these two
_EPS = 1e-7


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns x_sigma; exactly x0 at sigma 0 and exactly the noise at sigma 1. `sigma` broadcasts."""
    return (1 - sigma) * x0 + sigma * noise


def token_count_shift(num_tokens: int) -> float:
    """Returns the timestep shift for a chunk of `num_tokens` tokens: 2.11347 for 4,680."""
    (tokens_a, shift_a), (tokens_b, shift_b) = _TOKEN_LINE
    slope = (math.log(shift_b) - math.log(shift_a)) / (tokens_b - tokens_a)
    return math.exp(math.log(shift_a) + slope * (num_tokens - tokens_a))


@functools.lru_cache(maxsize=8)
def logit_normal_weights(mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Returns the weight of each of 1,000 equal bins of u, float64: the logit-normal mass in it times 1000; mean 1."""
    normal = NormalDist(mean, std)

    def mass_below(u: float) -> float:
        u = min(max(u, _EPS), 1 - _EPS)
        return normal.cdf(math.log(u / (1 - u)))

    edges = [mass_below(index / _NUM_BINS) for index in range(_NUM_BINS + 1)]
    return torch.tensor([_NUM_BINS * (b - a) for a, b in zip(edges, edges[1:], strict=False)], dtype=torch.float64)


class NoiseLevels:
    """How noise levels are drawn in training, and what each of them weighs in the loss.

    Args:
        shift: timestep shift; used where `shift_by_tokens` is off.
        shift_by_tokens: take the shift from the tokens of a slot instead (`token_count_shift`).
        weighting: "logit_normal" or "none".
        weight_mean: mean of the logit-normal weight.
        weight_std: its standard deviation.
    """

    def __init__(
        self,
        *,
        shift: float = 3.0,
        shift_by_tokens: bool = True,
        weighting: Literal["logit_normal", "none"] = "logit_normal",
        weight_mean: float = 0.0,
        weight_std: float = 1.0,
    ) -> None:
        key = "objective.noise_levels"
        if weighting not in ("logit_normal", "none"):
            raise unknown_choice("loss weighting", weighting, ["logit_normal", "none"], f"{key}.weighting")
        if not math.isfinite(weight_mean):
            raise ConfigError(f"{key}.weight_mean is {weight_mean}; expected a number. Change `{key}.weight_mean`.")
        for name, value in (("shift", shift), ("weight_std", weight_std)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{key}.{name} is {value}; expected a positive number. Change `{key}.{name}`.")
        self.shift, self.shift_by_tokens = shift, shift_by_tokens
        self.weighting, self.weight_mean, self.weight_std = weighting, weight_mean, weight_std

    def sigma(self, u: Tensor, num_tokens: int) -> Tensor:
        """Returns the noise levels for uniform draws `u` in slots of `num_tokens` tokens."""
        shift = token_count_shift(num_tokens) if self.shift_by_tokens else self.shift
        return shift * u / (1 + (shift - 1) * u)

    def weight(self, u: Tensor) -> Tensor:
        """Returns the loss weights of the (unshifted) uniform draws `u` [...], float64."""
        if self.weighting == "none":
            return torch.ones_like(u)
        bins = (u * _NUM_BINS).floor().long().clamp(0, _NUM_BINS - 1)
        return logit_normal_weights(self.weight_mean, self.weight_std)[bins]


def start_probabilities(first_chunk_clean: Mapping[str, float], frames: int) -> list[float]:
    """Returns the probability of n = 0, 1, ... clean leading latents of the first chunk.

    Args:
        first_chunk_clean: probability of "none", of "image" (one latent) and of "clip" (2 up to all but one latent,
            equally likely); what is not named has none.
        frames: latent frames of a chunk.

    Raises:
        ConfigError: an unknown name, no probabilities, or a start that leaves nothing to predict.
    """
    key = "objective.first_chunk_clean"
    for name in first_chunk_clean:
        if name not in ("none", "image", "clip"):
            raise unknown_choice("start", name, ["none", "image", "clip"], key)
    none, image, clip = (float(first_chunk_clean.get(name, 0.0)) for name in ("none", "image", "clip"))
    if min(none, image, clip) < 0 or abs(none + image + clip - 1) > 1e-6:
        raise ConfigError(f"{key} is {dict(first_chunk_clean)}; expected probabilities that sum to 1. Change `{key}`.")
    clips = max(0, frames - 2)
    if (image > 0 and frames < 2) or (clip > 0 and clips == 0):
        raise ConfigError(
            f"{key} is {dict(first_chunk_clean)}, but a chunk has {frames} latent frames: an image needs 2, a clip 3, "
            f"so that something is left to predict. Change `{key}` or `video.chunk_lat`."
        )
    return [none] + ([image] if frames > 1 else []) + [clip / max(1, clips)] * clips


def pick(u: Tensor, probabilities: list[float]) -> Tensor:
    """Returns which entry each uniform draw `u` falls on, int64 of the same shape."""
    edges = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
    edges[-1] = 1.0
    return torch.searchsorted(edges, u, right=True).clamp(max=len(probabilities) - 1)
