"""TokenTransformer: the autoregressive transformer of Cosmos (Llama 3) over the tokens of a video.

    [BOV] a0 a1 a2 | b0 b1 b2 | ...      a slot is one latent frame, all views of it, tokens (v f h w)
      |   |  |  |    |
      a0  a1 a2 b0   b1                  what is predicted at each place

Hidden states come back shifted: that of a token is what predicts it, so it lies in the token's own slot. Without BOV
(base models) nothing predicts the first token of a video, and its hidden state is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.errors import ConfigError, DataError, unknown_choice
from longtake.networks.action_conditioning import ActionConditioning
from longtake.networks.elementwise import RMSNorm, at_least_float32, compute_dtype
from longtake.networks.layout import ChunkLayout, Grid, Slot
from longtake.networks.token_blocks import TokenBlock, TokenPass, normed
from longtake.networks.token_decode import PackedWeights, TokenDecoder
from longtake.networks.token_head import OutputHead, checked_factors, digits_of
from longtake.networks.token_rope import RopeKind, TokenTables, Yarn, checked_yarn, rotary_frequencies, token_tables
from longtake.networks.token_signal import TokenSignal, token_signal
from longtake.types import Conditions

EMBEDDING_ROWS = 64  # with special tokens the table is rounded up to a multiple of this, as released
KEPT_TABLES = 4


def token_layout(num_lat: int, *, views: int, height: int, width: int, context_lat: int = 0) -> ChunkLayout:
    """Returns the slots of a token sequence, one a latent frame; the first `context_lat` are context (not scored)."""
    slots = tuple(
        Slot(chunk=k, role="context" if k < context_lat else "target", start_lat=k, seen=True) for k in range(num_lat)
    )
    return ChunkLayout(slots, Grid(views, 1, height, width), "past", "causal")


class TokenEmbedding(nn.Module):
    """Codes to vectors: one table, or a sum of small tables, one a factor of the code.

    Args:
        vocab_size: codes.
        dim: width.
        bov: whether there is a row for BOV, whose id is `vocab_size`.
        factors: sizes of the factors, the first one fastest; None: one table.
    """

    def __init__(self, vocab_size: int, dim: int, *, bov: bool, factors: Sequence[int] | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        key = "network.embedding_factors"
        self.factors = None if factors is None else checked_factors(factors, vocab_size, key)
        rows = vocab_size if self.factors is None else sum(self.factors)
        if bov:
            rows = rows + 1 if self.factors else -(-(rows + 1) // EMBEDDING_ROWS) * EMBEDDING_ROWS
        self.table = nn.Embedding(rows, dim)

    def reset_parameters(self) -> None:
        """Draws vectors of unit variance."""
        nn.init.normal_(self.table.weight, std=1.0 if self.factors is None else len(self.factors) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns [b n d] of ids [b n]."""
        if self.factors is None:
            return self.table(ids)
        offsets = [sum(self.factors[:j]) for j in range(len(self.factors))]
        rows = [digit + offset for digit, offset in zip(digits_of(ids, self.factors), offsets, strict=True)]
        embedded = F.embedding(torch.stack(rows), self.table.weight).sum(dim=0)
        if self.table.num_embeddings == sum(self.factors):
            return embedded
        return torch.where((ids == self.vocab_size).unsqueeze(-1), self.table.weight[-1], embedded)


class TokenTransformer(nn.Module):
    """Predicts every token of a video from those before it.

    Args:
        dim: width.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: heads of keys and values; must divide `num_heads`.
        ffn_dim: hidden width of the feed-forward parts.
        vocab_size: codes.
        grid_lat: latent frames, rows and columns that the weights are trained for.
        head: makes the output head from (dim, vocab_size).
        head_dim: channels of a head; None: dim / num_heads. num_heads * head_dim need not be dim.
        rope: "3d" turns with time, rows and columns, "1d" with the place in the sequence.
        rope_theta: base of the frequencies.
        yarn: stretched frequencies (scale, original [t h w], beta_fast, beta_slow); None: plain ones.
        qk_norm: whether queries and keys are normalised before they are turned.
        abs_pos_emb: whether a sine embedding is added before every layer.
        cross_attn_every: cross-attention in every k-th layer, from the first one on; None: none.
        context_dim: width of the text embeddings that it reads; None: `dim`, as action tokens have it.
        attends_padding: whether the padding of a text is zero rows that attention sees, as in Cosmos.
        bov: whether a begin-of-video token comes first, so that the first token is predicted too.
        actions: makes the `ActionConditioning` from (dim); None: actions are ignored.
        embedding_factors: embeds a code as the sum of vectors of its factors; None: one vector a code.
        eps: of the norms.

    Raises:
        ConfigError: sizes that do not fit each other.

    Attributes:
        block_class: what to shard, checkpoint and compile, one at a time.
    """

    block_class = TokenBlock

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        vocab_size: int,
        grid_lat: Sequence[int],
        head: Callable[..., OutputHead],
        head_dim: int | None = None,
        rope: RopeKind = "3d",
        rope_theta: float = 500000.0,
        yarn: Yarn | dict[str, Any] | None = None,
        qk_norm: bool = True,
        abs_pos_emb: bool = False,
        cross_attn_every: int | None = None,
        context_dim: int | None = None,
        attends_padding: bool = False,
        bov: bool = False,
        actions: Callable[..., ActionConditioning] | None = None,
        embedding_factors: Sequence[int] | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        width = head_dim or dim // max(1, num_heads)
        _check_sizes(dim, num_layers, num_heads, num_kv_heads, width, rope, grid_lat)
        self.dim, self.vocab_size, self.bov, self.eps = dim, vocab_size, bov, eps
        self.grid_lat = (int(grid_lat[0]), int(grid_lat[1]), int(grid_lat[2]))
        self.abs_pos_emb, self.attends_padding = abs_pos_emb, attends_padding
        self._turns = (width, rope_theta, rope, checked_yarn(yarn, rope))
        self.actions = actions(dim) if actions is not None else None
        if rope == "1d" and self.actions is not None and self.actions.pan is not None:
            raise ConfigError(
                "network.actions.pan is true with network.rope=1d, where nothing has a column to move; expected rope "
                "3d. Change `network.actions.pan` or `network.rope`."
            )
        self.context_dim = _context_dim(dim, cross_attn_every, context_dim, self.actions)
        self.embedding = TokenEmbedding(vocab_size, dim, bov=bov, factors=embedding_factors)
        self.layers = nn.ModuleList(
            TokenBlock(
                dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=width,
                ffn_dim=ffn_dim,
                context_dim=self.context_dim if cross_attn_every and layer % cross_attn_every == 0 else None,
                qk_norm=qk_norm,
                modulated=self.actions is not None and self.actions.signal == "modulation",
                eps=eps,
            )
            for layer in range(num_layers)
        )
        self.norm = RMSNorm(dim, eps)
        self.head = head(dim, vocab_size)
        # of several key heads the first half, and the queries that read them, keep their places in the picture
        stays = [key < num_kv_heads // 2 for key in range(num_kv_heads)]
        self._moved = [not stays[head * num_kv_heads // num_heads] for head in range(num_heads)]
        self._moved += [not head for head in stays]
        self._tables: dict[tuple[Any, ...], TokenTables] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters as Cosmos does for training from scratch; actions draw their own."""
        self.embedding.reset_parameters()
        for index, block in enumerate(self._blocks):
            block.reset_parameters(index)
        nn.init.ones_(self.norm.weight)
        self.head.reset_parameters()

    def forward(
        self, x: Tensor, conditions: Conditions, layout: ChunkLayout, memory: TokenDecoder | None = None
    ) -> tuple[Tensor, TokenDecoder | None]:
        """Returns what predicts every token, given the true ones before it.

        Args:
            x: codes [b s v f h w], the slots one latent frame after another.
            conditions: what the video should show; with a memory its own conditions count.
            layout: from `token_layout`.
            memory: a window under way, whose next latents the slots are; None: they begin the video.

        Returns:
            Hidden states [b s l d], that of a token predicting this token, and the memory, which has then read all
            tokens but the last one.

        Raises:
            ConfigError: another grid than the network's.
            DataError: codes outside of the vocabulary.
        """
        b, s, views, frames, height, width = x.shape
        grid = Grid(views, s * frames, height, width)
        self.check(x)
        assert layout.intra == "causal", "tokens need a causal layout"
        starts = [slot.start_lat for slot in layout.slots]
        first = starts[0]
        assert starts == list(range(first, first + s * frames, frames)), f"slots start at {starts}, not one by one"
        assert memory is not None or first == 0, f"a sequence without memory begins at latent 0, not {first}"
        ids = x.flatten(1)
        before = ids.new_full((b, int(self.bov)), self.vocab_size)
        if memory is not None and memory.pending is not None:
            before = memory.pending[:, None]
        inputs = torch.cat((before, ids[:, :-1]), dim=1)
        if memory is None:
            hidden = self._whole(inputs, conditions, grid)
        else:
            hidden = memory.step(inputs) if inputs.shape[1] else self.norm.weight.new_zeros(b, 0, self.dim)
            memory.pending = ids[:, -1]
        hidden = F.pad(hidden, (0, 0, ids.shape[1] - hidden.shape[1], 0))
        return hidden.view(b, s, -1, self.dim), memory

    def decoder(
        self,
        conditions: Conditions,
        *,
        batch: int,
        num_lat: int | None = None,
        views: int = 1,
        packed: PackedWeights | None = None,
    ) -> TokenDecoder:
        """Returns an empty window to decode.

        Args:
            conditions: of all its latents.
            batch: samples.
            num_lat: latent frames of the window; None: as trained.
            views: views.
            packed: from `pack`, for speed on a CPU.
        """
        grid = Grid(views, num_lat or self.grid_lat[0], *self.grid_lat[1:])
        return TokenDecoder(self, conditions, grid, batch, packed)

    def pack(self) -> PackedWeights:
        """Returns the weights prepared for decoding few tokens at once; a second copy of them on a CPU."""
        return PackedWeights(self)

    def check(self, x: Tensor) -> None:
        """Checks codes [b s v f h w] against the network.

        Raises:
            ConfigError: another grid.
            DataError: a code outside of the vocabulary (checked on the CPU only; elsewhere it would stall the device).
        """
        height, width = x.shape[-2:]
        if (height, width) != self.grid_lat[1:]:
            raise ConfigError(
                f"the tokens lie on a grid of {height} x {width}; the network is for {self.grid_lat[1]} x "
                f"{self.grid_lat[2]}. Change `data`, `video` or `network.grid_lat`."
            )
        if x.device.type == "cpu" and x.numel():
            low, high = (int(value) for value in torch.aminmax(x))
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"tokens range from {low} to {high}; expected 0 to {self.vocab_size - 1}, the vocabulary of the "
                    "network. Change `data` or `network.vocab_size`."
                )

    def embedded(self, ids: Tensor) -> Tensor:
        """Returns [b n d] of ids [b n]."""
        return self.embedding(ids)

    def normed(self, x: Tensor) -> Tensor:
        """Returns the last norm of the tokens [b n d], what the head reads."""
        return normed(x, self.norm)

    def signal(self, conditions: Conditions, grid: Grid) -> TokenSignal:
        """Returns what the tokens of a sequence are told."""
        return token_signal(
            conditions,
            grid,
            bov=self.bov,
            actions=self.actions,
            context_dim=self.context_dim,
            padding=self.attends_padding,
        )

    def tables(self, grid: Grid, shift: Tensor | None = None) -> TokenTables:
        """Returns the positions of a sequence; those that nothing moves (`TokenSignal.shift`) are kept."""
        weight = self.norm.weight
        told: dict[str, Any] = {
            "bov": self.bov,
            "abs_dim": self.dim if self.abs_pos_emb else None,
            "dtype": weight.dtype,
            "device": weight.device,
        }
        if shift is not None:
            return token_tables(grid, rotary_frequencies(*self._turns), shift=shift, moved=self._moved, **told)
        key = (grid, weight.device, weight.dtype)
        if key not in self._tables:
            while len(self._tables) >= KEPT_TABLES:
                self._tables.pop(next(iter(self._tables)))
            with torch.inference_mode(False), torch.no_grad():  # made in validation, used in training
                self._tables[key] = token_tables(grid, rotary_frequencies(*self._turns), **told)
        return self._tables[key]

    def hidden_matrix_names(self) -> set[str]:
        """Returns the matrices between the hidden states of the blocks, adaLN left out."""
        matrices = {name for name, parameter in self.named_parameters() if parameter.ndim == 2}
        return {name for name in matrices if name.startswith("layers.") and ".modulation." not in name}

    def new_parameter_names(self) -> set[str]:
        """Returns what a network that was trained without actions does not have."""
        parts = [
            ".modulation.",
            *([".cross_"] if self.actions is not None and self.actions.signal == "context" else []),
        ]
        names = {name for name, _ in self.named_parameters()}
        return {name for name in names if name.startswith("actions.") or any(part in name for part in parts)}

    def num_flops(self, layout: ChunkLayout, batch: int, text_tokens: int = 0) -> int:
        """Returns multiply-adds x 2 of the matmuls and attention of a forward pass, head included."""
        tokens = len(layout.slots) * layout.grid.tokens
        head = sum(p.numel() for p in self.head.parameters() if p.ndim == 2)
        layers = 0
        for block in self._blocks:
            inner = block.num_heads * block.head_dim
            weights = sum(linear.weight.numel() for linear in (block.qkv, block.out, block.gate_up, block.down))
            if block.has_cross:
                weights += block.cross_q.weight.numel() + block.cross_out.weight.numel()
                layers += 2 * text_tokens * block.cross_kv.weight.numel() + 4 * tokens * text_tokens * inner
            layers += 2 * tokens * weights + 2 * tokens * tokens * inner
        return batch * (layers + 2 * tokens * head)

    def _whole(self, ids: Tensor, conditions: Conditions, grid: Grid) -> Tensor:
        """Returns the normed hidden states [b n d] of a sequence from its beginning on."""
        n = ids.shape[1]
        signal = self.signal(conditions, grid)
        places = torch.arange(n, device=ids.device)
        rows = signal.rows(places)
        told = TokenPass(
            tables=self.tables(grid, signal.shift).rows(slice(0, n)),
            cross_mask=signal.cross_mask(places),
            groups=None if signal.modulation is None else rows,
        )
        x = self.embedded(ids)
        added = signal.added(rows)
        x = x if added is None else x + added
        x = x if compute_dtype(x) == x.dtype else at_least_float32(x)
        for block in self._blocks:
            cross = block.cross_keys(signal.context) if block.has_cross and signal.context is not None else None
            rows = None
            if block.modulation is not None and signal.modulation is not None:
                rows = block.modulation_rows(signal.modulation)
            x = block(x, told, cross, rows)
        return self.normed(x)

    @property
    def _blocks(self) -> list[TokenBlock]:
        return cast(list[TokenBlock], list(self.layers))


def _context_dim(
    dim: int, every: int | None, context_dim: int | None, actions: ActionConditioning | None
) -> int | None:
    needs = actions is not None and actions.signal == "context"
    if needs and (not every or context_dim not in (None, dim)):
        raise ConfigError(
            f"actions go through cross-attention, with network.cross_attn_every={every} and context_dim={context_dim}; "
            f"expected cross-attention of width {dim}. Change `network.cross_attn_every` and `network.context_dim`, or "
            "`network/actions`."
        )
    return None if not every else context_dim or dim


def _check_sizes(
    dim: int, layers: int, heads: int, kv_heads: int, head_dim: int, rope: str, grid_lat: Sequence[int]
) -> None:
    if layers < 1:
        raise ConfigError(f"network.num_layers is {layers}; expected 1 or more. Change `network.num_layers`.")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(
            f"network.num_heads is {heads} with {kv_heads} key heads; expected a multiple. Change `network.num_heads` "
            "or `network.num_kv_heads`."
        )
    if dim < 1 or dim % 2 or head_dim < 6 or head_dim % 2:
        raise ConfigError(
            f"network.dim is {dim} with heads of width {head_dim}; expected even numbers, heads of 6 or wider. Change "
            "`network.dim` or `network.head_dim`."
        )
    if rope not in ("3d", "1d"):
        raise unknown_choice("kind of rotary positions", rope, ("3d", "1d"), "network.rope")
    if len(grid_lat) != 3 or min(grid_lat) < 1:
        raise ConfigError(
            f"network.grid_lat is {list(grid_lat)}; expected [latent frames, rows, columns] of the trained clips. "
            "Change `network.grid_lat`."
        )
