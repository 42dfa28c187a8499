"""Finite scalar quantisation: every channel is rounded to one of a few levels, and the digits together are the token.

Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023), with the constants of the Cosmos tokenizers. A
channel with L levels has the digits 0..L-1 and the codes (digit - L//2) / (L//2): even levels span -1 to just below 1,
odd ones -1 to 1. The token is the number whose digits these are, the first one counting least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError

_MARGIN = 1.001  # tanh reaches a little beyond the outermost levels, so that these can be had at all


class FSQ(nn.Module):
    """Numbers <-> codes <-> tokens. It has no weights; channels are the last axis, and it computes in float32.

    Args:
        levels: of each channel, 2 or more.

    Attributes:
        levels: as given.
        vocab_size: tokens there are.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or any(int(level) != level or level < 2 for level in levels):
            raise ConfigError(
                f"levels of the quantiser are {list(levels)}; expected whole numbers of 2 or more, for example "
                "[8, 8, 8, 5, 5, 5]. Change `module.network.levels`."
            )
        self.levels = tuple(int(level) for level in levels)
        self.vocab_size = math.prod(self.levels)
        self._basis = [math.prod(self.levels[:index]) for index in range(len(self.levels))]

    def bound(self, z: Tensor) -> Tensor:
        """Returns numbers squeezed into the range of their levels, float32 [.. c]; 0 stays 0."""
        half = self._row([(level - 1) * _MARGIN / 2 for level in self.levels], z)
        offset = self._row([0.5 * (level % 2 == 0) for level in self.levels], z)
        shift = self._row([math.atanh(0.5 * (v % 2 == 0) / ((v - 1) * _MARGIN / 2)) for v in self.levels], z)
        return torch.tanh(z.float() + shift) * half - offset

    def forward(self, z: Tensor) -> Tensor:
        """Returns the codes of numbers, float32 [.. c]. The gradient passes the rounding as if it were not there."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._half_width(z)

    def tokens(self, codes: Tensor) -> Tensor:
        """Returns the tokens of codes [.. c], int64 [..]. Exact in float16 and bfloat16 as well."""
        half_width = self._half_width(codes)
        digits = (codes.float() * half_width + half_width).round().long()
        return (digits * torch.tensor(self._basis, device=codes.device)).sum(-1)

    def digits(self, tokens: Tensor) -> Tensor:
        """Returns the digits of tokens [..], int64 [.. c]."""
        basis, levels = (torch.tensor(row, device=tokens.device) for row in (self._basis, self.levels))
        return tokens.long()[..., None].div(basis, rounding_mode="floor") % levels

    def codes(self, tokens: Tensor) -> Tensor:
        """Returns the codes of tokens [..], float32 [.. c]."""
        digits = self.digits(tokens).float()
        half_width = self._half_width(digits)
        return (digits - half_width) / half_width

    def _half_width(self, like: Tensor) -> Tensor:
        return self._row([float(level // 2) for level in self.levels], like)

    @staticmethod
    def _row(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device)
