"""The cheap operations between the matmuls. At small widths they cost as much as the matmuls, so they are written out.

All of them compute in float32 (float64 stays float64) and return the dtype that they were given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which matmuls on `x` run: autocast's, or its own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; returns the dtype of x."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _rms_norm(x, self.weight, self.eps)[0]
        return _RMSNorm.apply(x, self.weight, self.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = at_least_float32(x)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row, and makes few passes; autograd's own graph of it is three times slower."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = at_least_float32(grad)
        unit = at_least_float32(x) * scale
        product = grad * unit
        mean = (product @ weight.to(product.dtype).unsqueeze(-1)) / -x.shape[-1]
        d_x = torch.addcmul(grad * weight, unit, mean).mul_(scale)
        return d_x.to(x.dtype), product.flatten(0, -2).sum(dim=0).to(weight.dtype), None


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Returns layer norm over the last axis, in float32 or better."""
    return F.layer_norm(at_least_float32(x), x.shape[-1:], weight, bias, eps)
