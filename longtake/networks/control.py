"""Control video (depth, segmentation, edges, HD map): a branch beside the network that adds hints to its blocks.

    c_0 = tokens + before(embedded control)          before is zero at first, so c_0 is what the network itself sees
    c_i = block_i(c_(i-1))                           full blocks of the network, same text, time, views and positions
    tokens after base block into[i]  +=  weight * after_i(c_i)      after_i is zero at first

So an untrained branch leaves the network as it is (VACE, Jiang et al. 2025, as in Cosmos Transfer 2.5). Every control
type has a branch of its own; their hints are weighted, for each place and latent frame, and summed. Where the weights
of several types sum to more than 1 they are divided by that sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.block import BlockContext, DiTBlock
from longtake.networks.elementwise import at_least_float32
from longtake.networks.layout import Grid
from longtake.networks.memory import LayerMemory
from longtake.types import Conditions

INITS = ("first", "partner", "none")


def patch_tokens(x: Tensor, embedding: nn.Conv3d) -> Tensor:
    """Returns the tokens [b s l d] of latents [b s v f c H W]; the convolution's stride is its size: one matmul."""
    _, rows, columns = embedding.kernel_size
    patches = rearrange(x, "b s v f c (h p) (w q) -> b s (v f h w) (c p q)", p=rows, q=columns)
    return F.linear(patches, embedding.weight.flatten(1), embedding.bias)


def capped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of all types with their sum capped at 1 in every place; tensors of equal shape."""
    total = torch.stack(list(weights.values())).sum(dim=0).clamp(min=1)
    return {name: weight / total for name, weight in weights.items()}


def token_weights(weight: Tensor | None, x: Tensor, grid: Grid) -> Tensor:
    """Returns how much control counts for each token, [b s l 1]: the mean of the latents' weights over its patch.

    Args:
        weight: [b s v f h w] with size 1 in v, f, h and w where equal for all; None: 1.
        x: latents [b s v f c H W].
        grid: of a slot.
    """
    if weight is None:
        return x.new_ones(*x.shape[:2], grid.tokens, 1)
    whole = weight.to(x.dtype).expand(*x.shape[:4], *x.shape[5:])
    rows, columns = x.shape[5] // grid.height, x.shape[6] // grid.width
    patches = rearrange(whole, "b s v f (h p) (w q) -> b s (v f h w) (p q)", p=rows, q=columns)
    return patches.mean(dim=-1, keepdim=True)


class ControlBranch(nn.Module):
    """The branch of one control type.

    Args:
        dim: width.
        channels: of the control latents and of what is concatenated to them.
        patch_size: of the network.
        blocks: its blocks.
        hint_layers: layers (Linear, SiLU) of a network on the embedded control.
    """

    def __init__(
        self, dim: int, channels: int, patch_size: tuple[int, int, int], blocks: Sequence[DiTBlock], hint_layers: int
    ) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(channels, dim, patch_size, patch_size)
        layers = [layer for _ in range(hint_layers) for layer in (nn.Linear(dim, dim), nn.SiLU())]
        self.hint = nn.Sequential(*layers)
        self.before = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(blocks)
        self.after = nn.ModuleList(nn.Linear(dim, dim) for _ in blocks)

    def reset_parameters(self) -> None:
        """Draws the embedding and the blocks; what comes before and after the blocks is zero."""
        nn.init.xavier_uniform_(self.patch_embedding.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)  # type: ignore[arg-type]
        for block in cast(list[DiTBlock], list(self.blocks)):
            block.reset_parameters()
        for linear in (self.before, *cast(list[nn.Linear], list(self.after))):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, tokens: Tensor, control: Tensor, context: BlockContext, memories: Sequence[LayerMemory | None]
    ) -> tuple[list[Tensor], list[LayerMemory | None]]:
        """Returns a hint a block, [b s l d], and the memory of its blocks.

        Args:
            tokens: what enters the network's first block.
            control: latents of the control video and what is concatenated to them, [b s v f c H W].
            context: of the pass.
            memories: of the blocks.
        """
        embedded = at_least_float32(self.before(self.hint(patch_tokens(control, self.patch_embedding))))
        hidden, hints, layers = tokens + embedded, [], []
        for block, after, memory in zip(self.blocks, self.after, memories, strict=True):
            hidden, layer = block(hidden, context, memory)
            hints.append(after(hidden))
            layers.append(layer)
        return hints, layers


class Control(nn.Module):
    """The branches of all control types of a network.

    Args:
        dim: width.
        types: names of the control types.
        into: the blocks of the network that get a hint, rising; as many blocks has a branch.
        hint_layers: layers of a network on the embedded control; 0: none.
        init: what the blocks of a branch begin with: the "first" blocks of the network, their "partner" (the one that
            gets the hint), or "none": values of their own.
        num_layers: blocks of the network.
        channels: of the latents and of what is concatenated to them.
        patch_size: of the network.
        make_block: makes a block like those of the network.
    """

    def __init__(
        self,
        dim: int,
        *,
        types: Sequence[str],
        into: Sequence[int],
        hint_layers: int = 0,
        init: Literal["first", "partner", "none"] = "first",
        num_layers: int,
        channels: int,
        patch_size: tuple[int, int, int],
        make_block: Callable[[], DiTBlock],
    ) -> None:
        super().__init__()
        if not types or len(set(types)) != len(types):
            raise ConfigError(
                f"network.control.types is {list(types)}; expected different control types, at least one. Change "
                "`network.control.types`, or set network.control=null."
            )
        rising = all(a < b for a, b in zip(into, list(into)[1:], strict=False))
        if not into or not rising or into[0] < 0 or into[-1] >= num_layers:
            raise ConfigError(
                f"network.control.into is {list(into)}; expected rising numbers of blocks, 0 to {num_layers - 1}. "
                "Change `network.control.into`."
            )
        if hint_layers < 0:
            raise ConfigError(
                f"network.control.hint_layers is {hint_layers}; expected 0 or more. Change `network.control."
                "hint_layers`."
            )
        if init not in INITS:
            raise unknown_choice("beginning of control blocks", init, INITS, "network.control.init")
        self.types, self.into, self.init = tuple(types), tuple(into), init
        self.branches = nn.ModuleDict()
        for kind in types:
            blocks = [make_block() for _ in into]
            self.branches[kind] = ControlBranch(dim, channels, patch_size, blocks, hint_layers)

    @property
    def num_layers(self) -> int:
        """Blocks of all branches."""
        return len(self.types) * len(self.into)

    def reset_parameters(self) -> None:
        """Draws the branches."""
        for branch in self.branches.values():
            branch.reset_parameters()  # type: ignore[operator]

    def begin_with(self, blocks: Sequence[DiTBlock], kept: Set[str] | None = None) -> None:
        """Copies the network's blocks into those of the branches, as `init` says.

        Args:
            blocks: of the network.
            kept: only branches with parameters of these names (control.branches.<type>. ...); None: all.
        """
        if self.init == "none":
            return
        for kind, branch in cast(dict[str, ControlBranch], dict(self.branches.items())).items():
            if kept is not None and not any(name.startswith(f"control.branches.{kind}.") for name in kept):
                continue
            for index, block in enumerate(branch.blocks):
                like = blocks[index if self.init == "first" else self.into[index]]
                block.load_state_dict(like.state_dict())

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        extra: Tensor | None,
        conditions: Conditions,
        context: BlockContext,
        memories: Sequence[LayerMemory | None],
    ) -> tuple[dict[int, Tensor], list[LayerMemory | None]]:
        """Returns what is added to the tokens after each block, [b s l d] by block, and the memory of all branches.

        Args:
            x: latents [b s v f c H W].
            tokens: what enters the network's first block.
            extra: what is concatenated to the latents of x, and so to those of the control video, [b s v f e H W].
            conditions: with `control`; a type that is not in it gives no hint.
            context: of the pass.
            memories: of the blocks of all branches, type after type.

        Raises:
            ConfigError: a control type that the network has no branch for.
        """
        control, size = conditions.control or {}, len(self.into)
        for kind in control:
            if kind not in self.types:
                raise unknown_choice("control type (of these weights)", kind, self.types, "network.control.types")
        given = conditions.control_weight or {}
        weights = {kind: token_weights(given.get(kind), x, context.layout.grid) for kind in control}
        weights = capped(weights) if len(weights) > 1 else weights
        hints: dict[int, Tensor] = {}
        layers = list(memories)
        for index, kind in enumerate(self.types):
            if kind not in control:
                continue
            latents = control[kind].to(x.dtype)
            if latents.shape != x.shape:
                raise ConfigError(
                    f"the control video {kind!r} has latents of {tuple(latents.shape)}, the video of {tuple(x.shape)} "
                    "[b s v f c h w]; expected the same views, frames and size. Change the control video."
                )
            own = slice(index * size, (index + 1) * size)
            latents = latents if extra is None else torch.cat([latents, extra], dim=4)
            found, layers[own] = self.branches[kind](tokens, latents, context, memories[own])
            for block, hint in zip(self.into, found, strict=True):
                weighted = weights[kind] * hint
                hints[block] = hints[block] + weighted if block in hints else weighted
        return hints, layers
