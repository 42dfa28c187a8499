"""The fast-weight kernel of LaCT: a gated network whose weights are updated once for a whole chunk of tokens.

Zhang et al. 2025, "Test-Time Training Done Right", arXiv 2505.23884, the AR-video variant:

    f_W(x) = W1 (silu(W0 x) * (W2 x))
    dW     = - gradient of  -sum_tokens rate * <f_W(k), v>     a sum, not a mean; one rate a token and matrix
    W      <- rownorm(W + dW)                                  rows keep the norms they had in the initial weights

Fast weights are [n out in] with n = batch x fast-weight heads, float32 or better; matmuls run in autocast's precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class FastWeights:
    """Fast weights of a batch of sequences, and the running sums of their updates where momentum is used.

    Attributes:
        w0: [n hidden in].
        w1: [n out hidden].
        w2: [n hidden in].
        sum0: running sum of the updates of `w0`; None before the first, or without momentum.
        sum1: of `w1`.
        sum2: of `w2`.
    """

    w0: Tensor
    w1: Tensor
    w2: Tensor
    sum0: Tensor | None = None
    sum1: Tensor | None = None
    sum2: Tensor | None = None

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w0, self.w1, self.w2

    @property
    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.sum0, self.sum1, self.sum2

    def lowered(self, dtype: torch.dtype) -> FastWeights:
        """Returns the matrices in the precision of the matmuls: cast once, for all that uses them."""
        return FastWeights(*(weight.to(dtype) for weight in self.matrices))


def read(weights: FastWeights, q: Tensor) -> Tensor:
    """Returns f_W(q): [n l in] to [n l out]."""
    hidden = F.silu(torch.matmul(q, weights.w0.mT)) * torch.matmul(q, weights.w2.mT)
    return torch.matmul(hidden, weights.w1.mT)


def gradient(weights: FastWeights, k: Tensor, v: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dW0, dW1 and dW2: one gradient step on sum rate * <f_W(k), v>, all from the weights as they are.

    Args:
        weights: fast weights.
        k: inputs [n l in].
        v: wanted outputs [n l out].
        rates: [n l 3], of W0, W1 and W2.
    """
    rate0, rate1, rate2 = rates.to(k.dtype).split(1, dim=-1)
    a, b = torch.matmul(k, weights.w0.mT), torch.matmul(k, weights.w2.mT)
    by_hidden = torch.matmul(v, weights.w1)  # gradient of <f(k), v> by the hidden state
    hidden, by_a, by_b = _HiddenGradient.apply(a, b, by_hidden)
    d_w1 = torch.matmul((v * rate1).mT, hidden)
    return torch.matmul(by_a.mT, k * rate0), d_w1, torch.matmul(by_b.mT, k * rate2)


def update(
    weights: FastWeights,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    *,
    norms: tuple[Tensor, Tensor, Tensor],
    lowered: FastWeights | None = None,
    momentum: Tensor | None = None,
    muon_steps: int = 0,
) -> FastWeights:
    """Returns the fast weights after one chunk.

    Args:
        weights: fast weights.
        k: inputs [n l in].
        v: wanted outputs [n l out].
        rates: [n l 3], of W0, W1 and W2.
        norms: row norms that the three matrices return to, [n out 1].
        lowered: the weights in the precision of the matmuls, if they were cast before.
        momentum: share of the earlier updates that is added again [n]; None: none.
        muon_steps: Newton-Schulz iterations on the update; 0: none.
    """
    changes: tuple[Tensor, ...] = gradient(lowered or weights, k, v, rates)
    sums: tuple[Tensor, ...] = ()
    if momentum is not None:
        changes = sums = tuple(
            change.to(weight.dtype) if earlier is None else change + momentum[:, None, None] * earlier
            for change, earlier, weight in zip(changes, weights.sums, weights.matrices, strict=True)
        )
    if muon_steps:
        changes = tuple(orthogonalised(change, muon_steps) for change in changes)
    pairs = zip(weights.matrices, changes, norms, strict=True)
    return FastWeights(*(_Rescaled.apply(weight, change, norm) for weight, change, norm in pairs), *sums)


def row_norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=-1, keepdim=True)


def orthogonalised(change: Tensor, steps: int) -> Tensor:
    """Returns the matrices with all singular values near 1 (Newton-Schulz, the coefficients of Muon)."""
    a, b, c = NEWTON_SCHULZ
    x = change / (torch.linalg.matrix_norm(change, keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = torch.matmul(x, x.mT)
        x = a * x + torch.matmul(b * gram + c * torch.matmul(gram, gram), x)
    return x.mT if is_tall else x


class _HiddenGradient(torch.autograd.Function):
    """(a, b, g) to (silu(a) b,  g b silu'(a),  g silu(a)): the hidden state, and the gradient by a and b given g.

    Written out because autograd would keep and pass over three times as many tensors.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(a, b, g)
        sigmoid = torch.sigmoid(a)
        silu = a * sigmoid
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        return silu * b, slope.mul_(g).mul_(b), g * silu

    @staticmethod
    def backward(ctx, d_hidden: Tensor, d_by_a: Tensor, d_by_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, g = ctx.saved_tensors
        sigmoid = torch.sigmoid(a)
        rest = 1 - sigmoid
        silu = a * sigmoid
        slope = torch.addcmul(sigmoid, silu, rest)
        bend = (rest - sigmoid).mul_(a).add_(2).mul_(sigmoid).mul_(rest)  # silu''(a)
        d_a = torch.addcmul(d_hidden * b, d_by_b, g).mul_(slope)
        d_a = d_a.addcmul_(bend.mul_(g).mul_(b), d_by_a)
        scaled = slope.mul_(d_by_a)
        d_b = torch.addcmul(d_hidden * silu, scaled, g)
        return d_a, d_b, torch.addcmul(d_by_b * silu, scaled, b)


class _Rescaled(torch.autograd.Function):
    """(W, dW, norm) to W + dW with every row brought to `norm`: few passes over a state as large as the layer."""

    @staticmethod
    def forward(ctx, weight: Tensor, change: Tensor, norm: Tensor) -> Tensor:
        moved = weight + change
        length = row_norm(moved)
        scale = norm / (length + NORM_EPS)
        out = moved.mul_(scale)
        ctx.save_for_backward(out, scale, length, norm)
        ctx.change_dtype = change.dtype
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, scale, length, norm = ctx.saved_tensors
        along = (grad * out).sum(dim=-1, keepdim=True) / norm
        d_moved = torch.addcmul(grad * scale, out, along / -length)
        return d_moved, d_moved.to(ctx.change_dtype), along
