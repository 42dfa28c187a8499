"""Dense softmax attention, by whichever kernel is fast for the device, the dtype and the size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured on Zen 4: for bfloat16 the flash kernel of the CPU backend is 1.5 to 6 times slower, forward and backward,
# than three matmuls while the scores are few, and catches up at about 900 x 900.
FEW_SCORES = 768 * 768


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Returns softmax(q k^T / sqrt(hd)) v.

    Args:
        q: queries [n l heads hd].
        k: keys [n m heads hd].
        v: values, as `k`.
        mask: True where a key counts, bool, broadcasts to [n heads l m].
        causal: queries are the last l of the m keys, and see none after themselves.

    Returns:
        [n l heads hd].
    """
    if causal and (mask is not None or q.shape[1] != k.shape[1]):
        earlier = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        mask, causal = earlier if mask is None else mask & earlier, False
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not causal and q.shape[2] * k.shape[2] <= FEW_SCORES:
        return _by_matmuls(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _by_matmuls(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.matmul(torch.softmax(scores, dim=-1), v)
