"""VideoDiT: the diffusion transformer of Wan 2.1 over slots, with pluggable mixer and conditioning."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.networks.attention import SlotAttention
from longtake.networks.block import BlockContext, DiTBlock, modulated, one_view, per_frame
from longtake.networks.conditioning import (
    TIMESTEPS,
    ActionEmbedding,
    FrameRateEmbedding,
    ScalarEmbedding,
    TextEmbedding,
)
from longtake.networks.control import Control, patch_tokens
from longtake.networks.elementwise import at_least_float32, compute_dtype
from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.memory import LayerMemory, Memory
from longtake.networks.views import NO_VIEWS, ViewContext, Views, token_mask
from longtake.types import Conditions

KEPT_PLANS = 8  # training may have as many layouts as it draws numbers of views


class VideoDiT(nn.Module):
    """Predicts the velocity of every slot's latents.

    Args:
        dim: width.
        ffn_dim: hidden width of the feed-forward parts.
        num_heads: attention heads.
        num_layers: blocks.
        mixer: makes a mixer from (dim, num_heads): full, window, block-causal, LaCT.
        in_channels: latent channels.
        out_channels: channels of the velocity; None: as `in_channels`.
        patch_size: latent frames, rows and columns of a token; latent frames must be 1.
        freq_dim: width of the sinusoid of the noise level.
        text: makes the text embedding from (dim); None: no cross-attention.
        actions: makes the action embedding from (dim); None: actions are ignored.
        frame_rate: makes the frame-rate embedding from (dim); None: the frame rate is ignored.
        cross_attn_norm: whether there is a norm before cross-attention.
        eps: of the norms.
        views: makes from (dim) what tells views apart; None: nothing does, made for one view.
        control: makes the branches of control videos (see `Control`); None: control is ignored.
        given_channel: an input channel that is 1 where a latent is given (`Conditions.given`), and 0 elsewhere.

    Attributes:
        block_class: what to shard, checkpoint and compile, one at a time.
    """

    block_class = DiTBlock

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        num_layers: int,
        mixer: Callable[..., SlotAttention],
        in_channels: int = 16,
        out_channels: int | None = None,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        freq_dim: int = 256,
        text: Callable[[int], TextEmbedding] | None = None,
        actions: Callable[[int], ActionEmbedding] | None = None,
        frame_rate: Callable[[int], FrameRateEmbedding] | None = None,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        views: Callable[[int], Views] | None = None,
        control: Callable[..., Control] | None = None,
        given_channel: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(dim, num_heads, num_layers, patch_size)
        self.dim, self.ffn_dim, self.num_heads, self.eps = dim, ffn_dim, num_heads, eps
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.patch_size = (patch_size[0], patch_size[1], patch_size[2])
        self.given_channel = given_channel
        self.views = views(dim) if views is not None else None
        channels = in_channels + given_channel + (self.views.channels if self.views is not None else 0)
        self.patch_embedding = nn.Conv3d(channels, dim, self.patch_size, self.patch_size)
        self.time_embedding = ScalarEmbedding(dim, freq_dim)
        self.time_projection = nn.Linear(dim, 6 * dim)
        self.text = text(dim) if text is not None else None
        self.actions = actions(dim) if actions is not None else None
        self.frame_rate = frame_rate(dim) if frame_rate is not None else None
        make_block = partial(
            DiTBlock,
            dim,
            ffn_dim,
            num_heads,
            mixer,
            has_text=text is not None,
            cross_attn_norm=cross_attn_norm,
            eps=eps,
            cross_views=self.views is not None and self.views.folds,
        )
        self.blocks = nn.ModuleList(make_block() for _ in range(num_layers))
        self.head = Head(dim, self.out_channels * math.prod(self.patch_size), eps)
        self.control = None
        if control is not None:
            self.control = control(
                dim, num_layers=num_layers, channels=channels, patch_size=self.patch_size, make_block=make_block
            )
        self._plans: dict[tuple[Any, ...], Any] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters as Wan does for training from scratch: the untrained network returns zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)  # type: ignore[arg-type]
        parts = (self.time_embedding, self.text, self.actions, self.frame_rate, *self._layers, self.head)
        for part in (*parts, self.views, self.control):
            if part is not None:
                part.reset_parameters()
        if self.control is not None:
            self.control.begin_with(self._layers)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        layout: ChunkLayout,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Memory | None]:
        """Predicts velocities.

        Args:
            x: noisy latents [b s v f c H W].
            sigma: noise levels in [0, 1], [b s v f]; v and f may be 1 where it is equal for all.
            conditions: what the video should show.
            layout: the slots.
            memory: what earlier passes left; None in training, `empty_memory()` at the beginning of a rollout.

        Returns:
            The velocity, shaped as `x` and float32 or better, and the memory: a new one if one was given and the pass
            holds a `seen` slot, else the one given.
        """
        grid = self.grid(x.shape)
        assert grid == layout.grid, f"latents make a grid of {grid}, the layout is for {layout.grid}"
        extra = self._extra_channels(x, sigma, conditions)
        tokens = at_least_float32(
            patch_tokens(x if extra is None else torch.cat([x, extra], dim=4), self.patch_embedding)
        )
        embedding = self._modulation(sigma, conditions)
        if self.actions is not None and self.actions.into == "tokens":
            tokens = _add_per_frame(tokens, self.actions(conditions), grid)
        context = self._context(tokens, embedding, conditions, layout, memory)
        kept = memory.layers if memory is not None else [None] * self._num_memories
        hints, control_layers = {}, kept[len(self.blocks) :]
        if self.control is not None and conditions.control is not None:
            hints, control_layers = self.control(x, tokens, extra, conditions, context, control_layers)
        layers = []
        for index, block in enumerate(self.blocks):
            tokens, layer = block(tokens, context, kept[index])
            tokens = tokens + hints[index] if index in hints else tokens
            layers.append(layer)
        velocity = self._to_latents(self.head(tokens, embedding, grid), grid)
        if memory is not None and any(slot.seen for slot in layout.slots):
            committed = memory.committed + sum(slot.seen for slot in layout.slots)
            return velocity, Memory(cast(tuple[LayerMemory, ...], (*layers, *control_layers)), committed)
        return velocity, memory

    def empty_memory(self) -> Memory:
        """Returns the memory at the beginning of a rollout."""
        return Memory.empty(self._num_memories)

    def grid(self, shape: torch.Size | tuple[int, ...]) -> Grid:
        """Returns the tokens of a slot for latents of a shape [... v f c H W].

        Raises:
            ConfigError: height or width does not divide into patches.
        """
        views, frames, channels, height, width = shape[-5:]
        _, rows, columns = self.patch_size
        if channels != self.in_channels or height % rows or width % columns:
            raise ConfigError(
                f"latents have {channels} channels of {height} x {width}; expected {self.in_channels} channels and a "
                f"size divisible by the patch {rows} x {columns}. Change `video` or `network.patch_size`."
            )
        return Grid(views, frames, height // rows, width // columns)

    @property
    def streams(self) -> bool:
        """Whether rollouts can carry memory (a causal mixer)."""
        return self._mixer.streams

    @property
    def constant_memory(self) -> bool:
        """Whether memory keeps one size, whatever the length of the video."""
        return self._mixer.constant_memory

    def begin_new(self, kept: Set[str]) -> None:
        """Makes what is new begin as a copy of blocks that were just loaded: control blocks, cross-view attention.

        Args:
            kept: names of parameters that were not loaded.
        """
        for index, block in enumerate(self._layers):
            if block.cross_view is not None and f"blocks.{index}.cross_view.qkv.weight" in kept:
                block.cross_view.reset_parameters(like=block.self_attn.qkv)
        if self.control is not None and any(name.startswith("control.") for name in kept):
            self.control.begin_with(self._layers, kept)

    def new_parameter_names(self) -> set[str]:
        """Returns the parameters that a pretrained Wan does not have, for a learning rate of their own."""
        own = [name for name, _ in self.named_parameters()]
        names = {name for name in own if name.startswith(("views.", "control.")) or ".cross_view." in name}
        for index, block in enumerate(self._layers):
            prefix = f"blocks.{index}.self_attn.mixer."
            own = [name for name, _ in block.self_attn.mixer.named_parameters()]
            names |= {prefix + name for name in own if name.split(".")[0] in self._mixer.new_parameters}
        return names

    def hidden_matrix_names(self) -> set[str]:
        """Returns the matrices between the hidden states of the blocks, what the mixers have of their own left out."""
        matrices = {name for name, parameter in self.named_parameters() if parameter.ndim == 2}
        inside = {name for name in matrices if name.startswith("blocks.") or ".blocks." in name}
        return {name for name in inside if ".mixer." not in name}

    def num_flops(self, layout: ChunkLayout, batch: int, text_tokens: int = 0) -> int:
        """Returns multiply-adds x 2 of the matmuls and attention of a forward pass.

        With the backward pass it is three times that. What is computed once a slot or latent frame is left out.
        """
        d, slots = self.dim, len(layout.slots)
        tokens = slots * layout.grid.tokens
        patch = math.prod(self.patch_size)
        per_token = 8 * d * d + 4 * d * self.ffn_dim
        per_text = 0
        if self.text is not None:
            per_token += 4 * d * d + 4 * d * text_tokens
            per_text = 4 * d * d
        ends = 2 * tokens * d * patch * (self.in_channels + self.out_channels)
        if self.views is not None and self.views.folds:
            views = layout.grid.views
            mixed = views * self._mixer.num_flops(one_view(layout))
            seen = layout.grid.tokens // layout.grid.frames * min(views - 1, self.views.most) / views
            mixed += round(tokens * (8 * d * d + 4 * d * seen)) if views > 1 else 0
        else:
            mixed = self._mixer.num_flops(layout)
        layer = tokens * per_token + text_tokens * per_text + mixed
        return batch * (self._num_memories * layer + ends)

    def _plan(self, layout: ChunkLayout, memory: LayerMemory | None, device: torch.device, dtype: torch.dtype) -> Any:
        """What the layers of a pass share. Training repeats one layout, a sampler one a chunk: the last are kept."""
        held = None if memory is None else (memory.slots, memory.sink_slots)
        key = (layout, held, device, dtype)
        if key not in self._plans:
            while len(self._plans) >= KEPT_PLANS:
                self._plans.pop(next(iter(self._plans)))
            with torch.inference_mode(False), torch.no_grad():  # one made in validation may be used in training
                self._plans[key] = self._mixer.prepare(layout, memory, device=device, dtype=dtype)
        return self._plans[key]

    @property
    def _mixer(self) -> SlotAttention:
        return self._layers[0].self_attn.mixer

    @property
    def _layers(self) -> list[DiTBlock]:
        return cast(list[DiTBlock], list(self.blocks))

    @property
    def _num_memories(self) -> int:
        return len(self.blocks) + (self.control.num_layers if self.control is not None else 0)

    def _extra_channels(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor | None:
        """What is concatenated to the latents x, [b s v f e H W]; None: nothing."""
        found = []
        if self.given_channel:
            given = sigma == 0 if conditions.given is None else conditions.given
            found.append(given.to(x.dtype)[..., None, None, None].expand(*x.shape[:4], 1, *x.shape[5:]))
        vectors = self.views.as_channels(self.views.ids(conditions, x.shape[2])) if self.views is not None else None
        if vectors is not None:
            channels = vectors.to(x.dtype)[:, None, :, None, :, None, None]
            found.append(channels.expand(*x.shape[:4], -1, *x.shape[5:]))
        return torch.cat(found, dim=4) if found else None

    def _to_latents(self, out: Tensor, grid: Grid) -> Tensor:
        _, rows, columns = self.patch_size
        axes = {"v": grid.views, "f": grid.frames, "h": grid.height, "w": grid.width, "p": rows, "q": columns}
        return rearrange(out, "b s (v f h w) (p q c) -> b s v f c (h p) (w q)", **axes)

    def _modulation(self, sigma: Tensor, conditions: Conditions) -> Tensor:
        """The embedding of everything that modulates, [b s v f d], v and f 1 where equal."""
        embedding = self.time_embedding(sigma * TIMESTEPS)
        if self.actions is not None and self.actions.into == "modulation":
            embedding = embedding + self.actions(conditions)
        fps = self.frame_rate(conditions) if self.frame_rate is not None else None
        return embedding if fps is None else embedding + fps

    def _context(
        self, tokens: Tensor, embedding: Tensor, conditions: Conditions, layout: ChunkLayout, memory: Memory | None
    ) -> BlockContext:
        with torch.autocast(tokens.device.type, enabled=False):
            modulation = self.time_projection(F.silu(embedding)).unflatten(-1, (6, self.dim))
        first = memory.layers[0] if memory is not None else None
        views, plan_layout = self._view_context(conditions, layout.grid), layout
        if self.views is not None:
            of_views = self.views.as_modulation(self.views.ids(conditions, layout.grid.views))
            modulation = modulation if of_views is None else modulation + of_views[:, None, :, None]
            plan_layout = one_view(layout) if views.folds else layout
        plan = self._plan(plan_layout, first, tokens.device, tokens.dtype)
        if self.text is None:
            return BlockContext(layout, plan, modulation, views=views)
        text, mask = self.text(conditions, tokens.shape[0])
        text = text.to(compute_dtype(text))
        return BlockContext(layout, plan, modulation, text, mask, conditions.text_index, views)

    def _view_context(self, conditions: Conditions, grid: Grid) -> ViewContext:
        if self.views is not None:
            return self.views.context(conditions, grid)
        return NO_VIEWS if conditions.view_mask is None else ViewContext(key_mask=token_mask(conditions, grid))


class Head(nn.Module):
    """Modulated norm and projection to patches; outside of autocast, as in Wan."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        self.head = nn.Linear(dim, out_features)

    def reset_parameters(self) -> None:
        """Draws the modulation and zeroes the projection."""
        nn.init.normal_(self.modulation, std=self.modulation.shape[-1] ** -0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, embedding: Tensor, grid: Grid) -> Tensor:
        parts = (embedding.unsqueeze(-2) + self.modulation).unbind(dim=-2)
        shift, scale = (per_frame(part) for part in parts)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(modulated(x, shift, scale, self.eps, grid))


def _add_per_frame(tokens: Tensor, added: Tensor, grid: Grid) -> Tensor:
    """Adds [b s v f d] (or [d]) to tokens [b s l d], v and f 1 where equal."""
    if added.dim() == 1:
        return tokens + added
    split = tokens.view(*tokens.shape[:2], grid.views, grid.frames, -1, tokens.shape[-1])
    return (split + added.unsqueeze(-2)).view(tokens.shape)


def _check_sizes(dim: int, num_heads: int, num_layers: int, patch_size: tuple[int, int, int]) -> None:
    if num_layers < 1:
        raise ConfigError(f"network.num_layers is {num_layers}; expected 1 or more. Change `network.num_layers`.")
    if num_heads < 1 or dim % num_heads or dim // num_heads % 2:
        raise ConfigError(
            f"network.dim is {dim} with {num_heads} heads; expected a multiple of num_heads that gives an even head "
            "width. Change `network.dim` or `network.num_heads`."
        )
    if len(patch_size) != 3 or patch_size[0] != 1:
        raise ConfigError(
            f"network.patch_size is {tuple(patch_size)}; expected (1, rows, columns): a token belongs to one latent "
            "frame, which has its own noise level. Change `network.patch_size`."
        )
