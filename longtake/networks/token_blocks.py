"""The block of Cosmos AR (Llama 3), the same code for the training pass and for decoding.

    x += positions (absolute embedding, where there is one, before every layer)
    x += out(attention(turn(norm(q)), turn(norm(k)), v)),   q, k, v = qkv(norm(x))
    x += cross_out(attention(norm(cross_q(norm(x))), norm(k), v)),   k, v = cross_kv(context), not turned
    x += down(silu(gate) * up),   gate, up = gate_up(norm(x))

Query heads h ... h + groups - 1 share one key head; keys are never expanded. With adaLN the two norms around attention
and feed-forward are shifted and scaled and what they lead to is gated, by a layer of the block's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.networks.elementwise import RMSNorm, at_least_float32, compute_dtype
from longtake.networks.token_cache import StepPlan, TokenCache
from longtake.networks.token_rope import TokenTables, rotate_halves

Linear = Callable[[Tensor], Tensor]
MODULATION_STD = 0.02


@dataclass(frozen=True)
class BlockLinears:
    """The projections that a pass goes through for every token: the block's own layers, or packed ones."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    cross_q: Linear | None
    cross_out: Linear | None


@dataclass(frozen=True)
class CrossKeys:
    """Keys and values of the context of one layer, [b kv_heads m hd], computed once for a sequence."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class TokenPass:
    """What every block of one pass is told.

    Attributes:
        tables: positions of the pass's tokens: cos and sin [n 1 hd] or [b n 1 hd], absolute embedding [n d] or [b n d].
        cross_mask: which context tokens each token may see, bool [b 1 n m]; None: all.
        groups: which row of the modulation each token takes, int64 [n] or [b n]; None: there is no modulation.
        cache: where keys and values are kept; None in training.
        plan: how this pass writes and reads the cache.
    """

    tables: TokenTables
    cross_mask: Tensor | None = None
    groups: Tensor | None = None
    cache: TokenCache | None = None
    plan: StepPlan | None = None


class TokenBlock(nn.Module):
    """One layer.

    Args:
        dim: width.
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_dim: channels of a head; num_heads * head_dim need not be dim.
        ffn_dim: hidden width of the feed-forward part.
        context_dim: width of what cross-attention reads; None: no cross-attention.
        qk_norm: whether queries and keys are normalised before they are turned.
        modulated: whether there is adaLN.
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        ffn_dim: int,
        context_dim: int | None,
        qk_norm: bool,
        modulated: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.eps = num_heads, num_kv_heads, head_dim, eps
        inner, kv = num_heads * head_dim, num_kv_heads * head_dim
        self.attn_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.qkv = nn.Linear(dim, inner + 2 * kv, bias=False)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.out = nn.Linear(inner, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)
        self.has_cross = context_dim is not None
        if context_dim is not None:
            self.cross_norm = RMSNorm(dim, eps)
            self.cross_q = nn.Linear(dim, inner, bias=False)
            self.cross_kv = nn.Linear(context_dim, 2 * kv, bias=False)
            self.cross_q_norm = RMSNorm(head_dim, eps) if qk_norm else None
            self.cross_k_norm = RMSNorm(head_dim, eps) if qk_norm else None
            self.cross_out = nn.Linear(inner, dim, bias=False)
        self.modulation = nn.Linear(dim, 6 * dim) if modulated else None

    def reset_parameters(self, layer: int) -> None:
        """Draws weights as Cosmos does for training from scratch.

        Args:
            layer: index of the block; what writes into the stream starts smaller in later ones.
        """
        small = 0.02 / (2 * (layer + 1)) ** 0.5
        _truncated(self.qkv.weight, 0.02)
        gate, up = self.gate_up.weight.data.chunk(2)
        _truncated(gate, 0.02)
        for weight in (up, self.down.weight, self.out.weight):
            _truncated(weight, small)
        for norm in self.modules():
            if isinstance(norm, RMSNorm):
                nn.init.ones_(norm.weight)
        if self.has_cross:
            _truncated(self.cross_q.weight, 0.02)
            _truncated(self.cross_kv.weight, 0.02)
            _truncated(self.cross_out.weight, small)
        if self.modulation is not None:
            nn.init.normal_(self.modulation.weight, std=MODULATION_STD)
            nn.init.zeros_(self.modulation.bias)

    def linears(self, wrap: Callable[[nn.Linear], Linear]) -> BlockLinears:
        """Returns the projections of every token, each through `wrap`."""
        return BlockLinears(
            qkv=wrap(self.qkv),
            out=wrap(self.out),
            gate_up=wrap(self.gate_up),
            down=wrap(self.down),
            cross_q=wrap(self.cross_q) if self.has_cross else None,
            cross_out=wrap(self.cross_out) if self.has_cross else None,
        )

    def cross_keys(self, context: Tensor) -> CrossKeys:
        """Returns keys and values of the context [b m d]."""
        kv = self.cross_kv(context).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        k, v = kv.unbind(dim=2)
        if self.cross_k_norm is not None:
            k = normed(k, self.cross_k_norm)
        return CrossKeys(k.transpose(1, 2), v.transpose(1, 2))

    def modulation_rows(self, signal: Tensor) -> Tensor:
        """Returns shift, scale and gate twice, [b g 6 d], of a signal [b g d]; float32 or better."""
        assert self.modulation is not None, "a block without modulation"
        with torch.autocast(signal.device.type, enabled=False):
            rows = self.modulation(F.silu(signal.to(self.modulation.weight.dtype)))
        return rows.unflatten(-1, (6, -1))

    def forward(
        self,
        x: Tensor,
        told: TokenPass,
        cross: CrossKeys | None = None,
        modulation: Tensor | None = None,
        *,
        layer: int = 0,
        linears: BlockLinears | None = None,
    ) -> Tensor:
        """Returns the tokens after this layer.

        Args:
            x: [b n d].
            told: what the pass is told.
            cross: from `cross_keys`, for a block with cross-attention.
            modulation: from `modulation_rows`, for a block with adaLN.
            layer: index of the block, for the cache.
            linears: packed projections; None: the block's own.
        """
        own = linears or self.linears(_same)
        parts = None if modulation is None else _rows_of(modulation, told.groups).unbind(dim=-2)
        if told.tables.added is not None:
            x = x + told.tables.added
        hidden = self._attention(self._into(x, self.attn_norm, parts, 0), told, own, layer)
        x = x + (hidden if parts is None else hidden * (1 + parts[2]))
        if self.has_cross:
            assert cross is not None, "a block with cross-attention needs a context"
            x = x + self._cross_attention(normed(x, self.cross_norm), told, cross, own)
        gate, up = own.gate_up(self._into(x, self.ffn_norm, parts, 3)).chunk(2, dim=-1)
        hidden = own.down(F.silu(gate) * up)
        return x + (hidden if parts is None else hidden * (1 + parts[5]))

    def _into(self, x: Tensor, norm: RMSNorm, parts: tuple[Tensor, ...] | None, first: int) -> Tensor:
        hidden = normed(x, norm)
        if parts is not None:
            hidden = torch.addcmul(parts[first], at_least_float32(hidden), 1 + parts[first + 1])
        return hidden.to(compute_dtype(x))

    def _attention(self, x: Tensor, told: TokenPass, own: BlockLinears, layer: int) -> Tensor:
        heads = own.qkv(x).unflatten(-1, (-1, self.head_dim))
        turning = heads[:, :, : self.num_heads + self.num_kv_heads]
        v = heads[:, :, self.num_heads + self.num_kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turning.split((self.num_heads, self.num_kv_heads), dim=2)
            turning = torch.cat((normed(q, self.q_norm), normed(k, self.k_norm)), dim=2)
        q, k = rotate_halves(turning, told.tables).split((self.num_heads, self.num_kv_heads), dim=2)
        if told.cache is None or told.plan is None:
            mixed = grouped_attention(q, k.transpose(1, 2), v.transpose(1, 2), causal=True)
        else:
            keys, values = told.cache.extend(layer, k, v, told.plan)
            mixed = grouped_attention(q, keys, values, mask=told.plan.mask, causal=told.plan.causal)
        return own.out(mixed)

    def _cross_attention(self, x: Tensor, told: TokenPass, cross: CrossKeys, own: BlockLinears) -> Tensor:
        assert own.cross_q is not None
        assert own.cross_out is not None
        q = own.cross_q(x.to(compute_dtype(x))).unflatten(-1, (-1, self.head_dim))
        if self.cross_q_norm is not None:
            q = normed(q, self.cross_q_norm)
        mask = told.cross_mask
        if mask is not None and mask.shape[2] > 1:  # groups outside of tokens
            mask = mask.repeat(1, 1, self.num_heads // self.num_kv_heads, 1)
        return own.cross_out(grouped_attention(q, cross.k, cross.v, mask=mask))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Returns softmax attention [b n heads*hd] where groups of query heads share one key head, keys not expanded.

    Args:
        q: queries [b n heads hd].
        k: keys [b kv_heads m hd].
        v: values, as `k`.
        mask: True where a key counts, bool, broadcasts to [b kv_heads groups*n m], groups outside of tokens.
        causal: n == m and every token sees itself and those before it.
    """
    b, n, heads, width = q.shape
    kv_heads = k.shape[1]
    if k.shape[0] != b:  # one context for the whole batch
        k, v = k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)
    k, v = k.to(q.dtype), v.to(q.dtype)
    grouped = q.view(b, n, kv_heads, heads // kv_heads, width)
    if causal and n > 1:
        parts = [
            F.scaled_dot_product_attention(part.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
            for part in grouped.unbind(dim=3)
        ]
        return torch.stack(parts, dim=3).reshape(b, n, heads * width)
    folded = grouped.permute(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, width)  # [b kv_heads (groups n) hd]
    mixed = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    return mixed.view(b, kv_heads, heads // kv_heads, n, width).permute(0, 3, 1, 2, 4).reshape(b, n, heads * width)


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """Returns the norm of `x`: by its own function, which keeps few tensors for a backward pass, or by torch's."""
    if torch.is_grad_enabled() or x.dtype != norm.weight.dtype:
        return norm(x)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _rows_of(modulation: Tensor, groups: Tensor | None) -> Tensor:
    """Returns [b n 6 d], or [b 1 6 d] where all tokens take one row."""
    if groups is None or modulation.shape[1] == 1:
        return modulation[:, :1]
    if groups.ndim == 1:
        return modulation.index_select(1, groups)
    rows = modulation.expand(len(groups), -1, -1, -1)
    return rows[torch.arange(len(groups), device=groups.device)[:, None], groups]


def _same(linear: nn.Linear) -> Linear:
    return linear


def _truncated(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
