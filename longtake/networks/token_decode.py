"""Decoding: a window of tokens under way, with its cache and everything that is computed only once for it.

Text and action keys, adaLN rows and position tables belong to a window; packed weights to all windows. A step runs the
same blocks as training. On a CPU the weights are packed into oneDNN's blocked layout: a few tokens at once then read
them at nearly the speed of one (with plain weights, eight tokens cost two to four times as much).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.networks.layout import Grid
from longtake.networks.token_blocks import BlockLinears, Linear, TokenBlock, TokenPass
from longtake.networks.token_cache import TokenCache
from longtake.types import Conditions

if TYPE_CHECKING:
    from longtake.networks.token_transformer import TokenTransformer

PACKED_ROWS = 64  # tokens of a pass up to which packed weights are the faster ones
_PACKED_FOR = 8  # rows that the blocked layout is chosen for; it serves 1 to 64 equally well


class PackedLinear:
    """A linear layer without bias whose weight lies in oneDNN's blocked layout; many rows use the plain weight.

    Args:
        linear: on the CPU, float32 or bfloat16, without bias. Its later changes are not seen.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.plain = linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain, _PACKED_FOR)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > PACKED_ROWS * x.shape[-1]:
            return F.linear(x, self.plain)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")


def can_pack(linear: nn.Linear) -> bool:
    """Returns whether a layer can be packed on this machine."""
    return (
        linear.bias is None
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


class PackedWeights:
    """The projections of a network for decoding; a copy of its weights where they can be packed, else themselves.

    Args:
        network: in evaluation mode. Later changes of its weights are not seen.
    """

    def __init__(self, network: TokenTransformer) -> None:
        with torch.no_grad():
            self.blocks = [block.linears(_pack) for block in cast(list[TokenBlock], list(network.layers))]
            self.logits: Callable[[Tensor], Tensor] = network.head.decoder(_pack)


def _pack(linear: nn.Linear) -> Linear:
    return PackedLinear(linear) if can_pack(linear) else linear


class TokenDecoder:
    """One window of a batch under way. Made by `TokenTransformer.decoder`.

    Args:
        network: in evaluation mode.
        conditions: of the whole window.
        grid: views, latent frames, rows and columns of the window.
        batch: samples.
        weights: packed weights; None: the network's own layers.

    Attributes:
        cache: keys and values; `cache.lengths` counts BOV.
        pending: the last token of each sample that no pass has read yet, int64 [b]; None at the beginning. It is kept
            for `TokenTransformer.forward` with memory; `step` and `prefill` do not touch it.
    """

    def __init__(
        self,
        network: TokenTransformer,
        conditions: Conditions,
        grid: Grid,
        batch: int,
        weights: PackedWeights | None,
    ) -> None:
        self.network, self.grid = network, grid
        self._blocks = cast(list[TokenBlock], list(network.layers))
        self._linears: list[BlockLinears | None] = [None] * len(self._blocks) if weights is None else [*weights.blocks]
        self.logits = network.head.logits if weights is None else weights.logits
        parameter = network.norm.weight
        with torch.no_grad():
            self._signal = network.signal(conditions, grid)
            context, modulation = self._signal.context, self._signal.modulation
            self._cross = [
                block.cross_keys(context) if block.has_cross and context is not None else None for block in self._blocks
            ]
            self._modulation = [
                None if modulation is None or block.modulation is None else block.modulation_rows(modulation)
                for block in self._blocks
            ]
            self._tables = network.tables(grid, self._signal.shift)
        self._places = torch.arange(self._tables.places, device=parameter.device)
        self._rows = self._signal.rows(self._places)
        self._row_free = self._signal.additive is None and modulation is None
        first = self._blocks[0]
        self.cache = TokenCache(
            num_layers=len(self._blocks),
            batch=batch,
            kv_heads=first.num_kv_heads,
            capacity=len(self._places),
            head_dim=first.head_dim,
            dtype=parameter.dtype,
            device=parameter.device,
            groups=first.num_heads // first.num_kv_heads,
        )
        self.pending: Tensor | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Reads the start of the window in one pass.

        Args:
            tokens: raster tokens without BOV, int64 [b m]; what lies behind a shorter start is ignored.
            lengths: how many of them are given for each sample; None: all.

        Returns:
            What predicts the next token of each sample, [b d]; zeros where nothing was given to a network without BOV.
        """
        b, m = tokens.shape
        given = [m] * b if lengths is None else [int(length) for length in lengths]
        extra = int(self.network.bov)
        if extra:
            tokens = torch.cat((tokens.new_full((b, 1), self.network.vocab_size), tokens), dim=1)
        if tokens.shape[1] == 0:
            return self.network.norm.weight.new_zeros(b, self.network.dim)
        hidden = self.step(tokens)
        self.cache.truncate([length + extra for length in given])
        last = torch.tensor([length + extra - 1 for length in given], device=hidden.device)
        picked = hidden[torch.arange(b, device=hidden.device), last.clamp(min=0)]
        return picked if min(given) + extra > 0 else picked * (last >= 0).unsqueeze(-1)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Reads the next tokens of each sample.

        Args:
            ids: int64 [b n], continuing at each sample's cursor.

        Returns:
            What predicts the token after each of them, [b n d].
        """
        cache = self.cache
        plan = cache.plan(ids.shape[1])
        where = slice(plan.start, plan.stop) if plan.places is None else plan.places
        places = self._places[where]
        rows = None if self._row_free else self._rows[where]
        told = TokenPass(
            tables=self._tables.rows(where),
            cross_mask=self._signal.cross_mask(places),
            groups=None if self._signal.modulation is None else rows,
            cache=cache,
            plan=plan,
        )
        x = self.network.embedded(ids)
        if rows is not None and (added := self._signal.added(rows)) is not None:
            x = x + added
        for layer, block in enumerate(self._blocks):
            x = block(x, told, self._cross[layer], self._modulation[layer], layer=layer, linears=self._linears[layer])
        cache.advance(plan.count)
        return self.network.normed(x)

    def truncate(self, lengths: Sequence[int] | Tensor) -> None:
        """Moves cursors back; one length for each sample, BOV included."""
        self.cache.truncate(lengths)
