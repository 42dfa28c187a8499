"""The block of Wan 2.1, with a mixer of choice in the place of its self-attention.

    x += gate1 * mixer(norm(x) * (1 + scale1) + shift1)
    x += cross_attention(norm3(x), text)
    x += gate2 * ffn(norm(x) * (1 + scale2) + shift2)

Shift, scale and gate belong to a (slot, view, latent frame) and are broadcast over height and width. The residual
stream is float32 under autocast, as in Wan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.networks.attention import MixerInput, SlotAttention
from longtake.networks.elementwise import RMSNorm, compute_dtype, layer_norm
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.memory import LayerMemory
from longtake.networks.softmax import dense_attention
from longtake.networks.views import NO_VIEWS, CrossViewAttention, ViewContext


@dataclass(frozen=True)
class BlockContext:
    """What every block of one pass is told.

    Attributes:
        layout: the slots.
        plan: what the mixer prepared for this pass.
        modulation: [b s v f 6 d]; v and f are 1 where it is equal for all.
        text: text tokens [b n l d]; None for a network without text.
        text_mask: which of them are real, bool [b n l]; None: all.
        text_index: which text a slot and view is told, int64 [b s v]; None: text 0.
        views: who is there and who sees whom.
    """

    layout: ChunkLayout
    plan: Any
    modulation: Tensor
    text: Tensor | None = None
    text_mask: Tensor | None = None
    text_index: Tensor | None = None
    views: ViewContext = NO_VIEWS


class SelfAttention(nn.Module):
    """q, k and v in one matmul, QK-norm over the full width, the mixer, and the output projection.

    Args:
        dim: width.
        num_heads: heads.
        mixer: makes the mixer from (dim, num_heads).
        eps: of the norms.
    """

    def __init__(self, dim: int, num_heads: int, mixer: Callable[..., SlotAttention], eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.mixer = mixer(dim, num_heads)

    def forward(
        self, x: Tensor, context: BlockContext, memory: LayerMemory | None
    ) -> tuple[Tensor, LayerMemory | None]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (self.norm_q(q), self.norm_k(k), v))
        if context.views.folds:
            return self._per_view(x, q, k, v, context, memory)
        inputs = MixerInput(x, q, k, v, context.layout, context.plan, context.views.key_mask)
        mixed, memory = self.mixer(inputs, memory)
        return self.o(mixed), memory

    def _per_view(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: BlockContext, memory: LayerMemory | None
    ) -> tuple[Tensor, LayerMemory | None]:
        """Every view is a sample of its own to the mixer: [b s (v n) ...] as [(b v) s n ...], also in memory."""
        views, layout = context.layout.grid.views, one_view(context.layout)
        x, q, k, v = (part.unflatten(2, (views, -1)).transpose(1, 2).flatten(0, 1) for part in (x, q, k, v))
        mixed, memory = self.mixer(MixerInput(x, q, k, v, layout, context.plan), memory)
        return self.o(mixed.unflatten(0, (-1, views)).transpose(1, 2).flatten(2, 3)), memory


class CrossAttention(nn.Module):
    """Attention of every token to the text of its slot and view."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.o = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        text, mask, index = context.text, context.text_mask, context.text_index
        assert text is not None, "cross-attention without text"
        b, s, tokens, _ = x.shape
        k, v = self.kv(text).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (self.norm_q(self.q(x)), self.norm_k(k), v))
        if index is None:
            q, k, v = q.flatten(1, 2), k[:, 0], v[:, 0]
            mask = None if mask is None else mask[:, 0]
        else:
            q = q.reshape(b * s * index.shape[2], tokens // index.shape[2], *q.shape[3:])
            rows = (index + torch.arange(b, device=index.device)[:, None, None] * text.shape[1]).flatten()
            k, v = (part.flatten(0, 1).index_select(0, rows) for part in (k, v))
            mask = None if mask is None else mask.flatten(0, 1).index_select(0, rows)
        mixed = dense_attention(q, k, v, mask=None if mask is None else mask[:, None, None, :])
        return self.o(mixed.reshape(x.shape))


class DiTBlock(nn.Module):
    """One layer.

    Args:
        dim: width.
        ffn_dim: hidden width of the feed-forward part.
        num_heads: heads.
        mixer: makes the mixer from (dim, num_heads).
        has_text: whether there is cross-attention.
        cross_attn_norm: whether there is a norm before it.
        eps: of the norms.
        cross_views: whether views see their neighbours.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        mixer: Callable[..., SlotAttention],
        *,
        has_text: bool,
        cross_attn_norm: bool,
        eps: float,
        cross_views: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn = SelfAttention(dim, num_heads, mixer, eps)
        self.cross_view = CrossViewAttention(dim, num_heads, eps) if cross_views else None
        self.norm3 = nn.LayerNorm(dim, eps) if has_text and cross_attn_norm else None
        self.cross_attn = CrossAttention(dim, num_heads, eps) if has_text else None
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def reset_parameters(self) -> None:
        """Draws each part of the fused projections by itself, the modulation, and what the mixer has."""
        fused = [self.self_attn.qkv] if self.cross_attn is None else [self.self_attn.qkv, self.cross_attn.kv]
        for linear in fused:
            for part in linear.weight.data.split(linear.in_features):
                nn.init.xavier_uniform_(part)
        nn.init.normal_(self.modulation, std=self.modulation.shape[-1] ** -0.5)
        self.self_attn.mixer.reset_parameters()
        if self.cross_view is not None:
            self.cross_view.reset_parameters(like=self.self_attn.qkv)

    def forward(
        self, x: Tensor, context: BlockContext, memory: LayerMemory | None
    ) -> tuple[Tensor, LayerMemory | None]:
        """Returns the tokens [b s l d] after this layer, and its memory."""
        dtype, grid = compute_dtype(x), context.layout.grid
        parts = (context.modulation + self.modulation).unbind(dim=-2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_frame(part) for part in parts)
        hidden, memory = self.self_attn(modulated(x, shift1, scale1, self.eps, grid).to(dtype), context, memory)
        x = gated(x, hidden, gate1, grid)
        if self.cross_view is not None and context.views.neighbours is not None:
            x = x + self.cross_view(x, grid, context.views)
        if self.cross_attn is not None:
            hidden = x if self.norm3 is None else layer_norm(x, self.eps, self.norm3.weight, self.norm3.bias)
            x = x + self.cross_attn(hidden.to(dtype), context)
        hidden = self.ffn(modulated(x, shift2, scale2, self.eps, grid).to(dtype))
        return gated(x, hidden, gate2, grid), memory


def one_view(layout: ChunkLayout) -> ChunkLayout:
    """Returns the layout of a single view."""
    return replace(layout, grid=replace(layout.grid, views=1))


def per_frame(x: Tensor) -> Tensor:
    """Returns [b s v f d] so that it broadcasts: over [b s l d] if equal for all, else over [b s v f (h w) d]."""
    return x[:, :, 0] if x.shape[2] == x.shape[3] == 1 else x.unsqueeze(-2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, grid: Grid) -> Tensor:
    """Returns the layer norm of `x` [b s l d], scaled and shifted by what `per_frame` returned; float32 or better."""
    normed = split_like(layer_norm(x, eps), shift, grid)
    return torch.addcmul(shift, normed, 1 + scale).view(x.shape)


def gated(x: Tensor, update: Tensor, gate: Tensor, grid: Grid) -> Tensor:
    """Returns x + gate * update in the dtype of the residual stream `x` [b s l d]."""
    return torch.addcmul(split_like(x, gate, grid), split_like(update, gate, grid), gate).view(x.shape)


def split_like(x: Tensor, other: Tensor, grid: Grid) -> Tensor:
    """Returns tokens [b s l d] as they are, or [b s v f (h w) d] if `other` has these axes."""
    return x if other.dim() == 4 else x.view(*x.shape[:2], grid.views, grid.frames, -1, x.shape[-1])
