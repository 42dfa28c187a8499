"""Several views of one scene: how a network tells them apart, and how they see each other.

    channels   every token of a slot sees every token of all its views; which view it is comes from a learned vector
               that is concatenated to the input channels (Cosmos Transfer 2.5 and Predict 2, multiview)
    cross      every view attends to itself only, and a second attention lets it see its neighbours at the same latent
               frame; which view it is comes with the modulation (the newer design, its robot and 14B models)

Equal (t, h, w) have equal rotary phases in all views, so without these a network could not tell views apart. The names
of the views, and with them their ids, come from a rig (`conf/rig/*.yaml`): id n is the n-th view of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.elementwise import RMSNorm, compute_dtype, layer_norm
from longtake.networks.layout import Grid
from longtake.networks.softmax import dense_attention
from longtake.types import Conditions


@dataclass(frozen=True)
class ViewContext:
    """What every block of one pass is told about views.

    Attributes:
        folds: whether a view attends to itself only: then the mixer gets every view as a sample of its own.
        key_mask: False for the tokens of absent views, bool [b l]; None: nobody is absent, or `folds`.
        neighbours: for each view the places (on the view axis) of those that it sees, int64 [b v m]; None: there is no
            cross-view attention in this pass.
        is_neighbour: False where a view has fewer than m of them, bool [b v m].
    """

    folds: bool = False
    key_mask: Tensor | None = None
    neighbours: Tensor | None = None
    is_neighbour: Tensor | None = None


NO_VIEWS = ViewContext()


def token_mask(conditions: Conditions, grid: Grid) -> Tensor | None:
    """Returns which tokens of a slot belong to views that are there, bool [b l]; None: all.

    A sample without any view (one that only fills up a batch) counts as one that has them all.
    """
    mask = conditions.view_mask
    if mask is None:
        return None
    mask = mask | ~mask.any(dim=1, keepdim=True)
    return mask.repeat_interleave(grid.tokens // grid.views, dim=1)


class Views(nn.Module):
    """Base of both designs.

    Args:
        dim: width of the network.
        rig: {"views": {name: ...}}, in the order of the view ids; what else it says of a view is not used here.
    """

    channels: int = 0
    folds: ClassVar[bool] = False
    most: int = 0  # neighbours of a view, at most

    def __init__(self, dim: int, *, rig: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = tuple(rig.get("views") or ())
        if not self.names:
            raise ConfigError("network.views.rig names no view; expected a rig of conf/rig. Change `network.views`.")

    def reset_parameters(self) -> None:
        """Draws what was learned."""

    def ids(self, conditions: Conditions, views: int) -> Tensor:
        """Returns the view ids [b v]. Raises ConfigError where there are none or too many views."""
        ids = conditions.view_ids
        if ids is None or ids.shape[1] != views or views > len(self.names):
            told = "none" if ids is None else f"{ids.shape[1]}"
            raise ConfigError(
                f"there are {views} views and ids of {told}; expected as many ids as views, and 1 to "
                f"{len(self.names)} views as in the rig of the network. Change `data` or `network.views`."
            )
        return ids

    def as_channels(self, ids: Tensor) -> Tensor | None:
        """Returns what is concatenated to the input channels, [b v channels]; None: nothing."""
        return None

    def as_modulation(self, ids: Tensor) -> Tensor | None:
        """Returns what is added to shift, scale and gate of every block, [b v 6 d]; None: nothing."""
        return None

    def context(self, conditions: Conditions, grid: Grid) -> ViewContext:
        """Returns what the blocks are told in a pass."""
        return ViewContext(key_mask=token_mask(conditions, grid))


class ViewChannels(Views):
    """Joint attention, and a learned vector a view beside the latents' channels.

    Args:
        dim: width of the network.
        rig: see `Views`.
        channels: length of the vector.
    """

    def __init__(self, dim: int, *, rig: Mapping[str, Any], channels: int = 7) -> None:
        super().__init__(dim, rig=rig)
        if channels < 1:
            raise ConfigError(
                f"network.views.channels is {channels}; expected 1 or more. Change `network.views.channels`."
            )
        self.channels = channels
        self.embedding = nn.Embedding(len(self.names), channels)

    def reset_parameters(self) -> None:
        """Draws the vectors as torch draws embeddings."""
        self.embedding.reset_parameters()

    def as_channels(self, ids: Tensor) -> Tensor | None:
        return self.embedding(ids)


class CrossViews(Views):
    """Attention inside of a view, then to its neighbours. Views modulate through a zero-initialised projection.

    Args:
        dim: width of the network.
        rig: see `Views`.
        neighbours: names of the views that each view sees; None: all others.
    """

    folds: ClassVar[bool] = True
    allowed: Tensor

    def __init__(
        self, dim: int, *, rig: Mapping[str, Any], neighbours: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__(dim, rig=rig)
        self.embedding = nn.Embedding(len(self.names), dim)
        self.projection = nn.Linear(dim, 6 * dim)
        self.register_buffer("allowed", neighbour_table(self.names, neighbours), persistent=False)
        self.most = max(1, *(len(row) for row in _listed(self.names, neighbours).values()))

    def reset_parameters(self) -> None:
        """Draws the vectors; they have no effect yet."""
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def as_modulation(self, ids: Tensor) -> Tensor | None:
        with torch.autocast(ids.device.type, enabled=False):
            return self.projection(self.embedding(ids)).unflatten(-1, (6, -1))

    def context(self, conditions: Conditions, grid: Grid) -> ViewContext:
        if grid.views == 1:
            return ViewContext(folds=True)
        ids = self.ids(conditions, grid.views)
        allowed = self.allowed[ids.unsqueeze(2), ids.unsqueeze(1)]
        if conditions.view_mask is not None:
            allowed = allowed & conditions.view_mask.unsqueeze(1)
        is_neighbour, places = allowed.sort(dim=2, descending=True, stable=True)
        most = min(self.most, grid.views)
        return ViewContext(folds=True, neighbours=places[..., :most], is_neighbour=is_neighbour[..., :most])


class CrossViewAttention(nn.Module):
    """Every view asks its neighbours at the same latent frame: no positions, no modulation, an affine norm before.

    Args:
        dim: width.
        num_heads: heads.
        eps: of the norms.
    """

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.norm = nn.LayerNorm(dim, eps)
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def reset_parameters(self, like: nn.Linear) -> None:
        """Begins with the queries, keys and values of the block's self-attention, and without effect."""
        with torch.no_grad():
            self.qkv.weight.copy_(like.weight)
            self.qkv.bias.copy_(like.bias)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def forward(self, x: Tensor, grid: Grid, views: ViewContext) -> Tensor:
        """Returns what is added to the tokens [b s l d]; zeros (but for a learned bias) for a view without neighbours.

        Args:
            x: tokens.
            grid: of a slot.
            views: with neighbours.
        """
        assert views.neighbours is not None
        assert views.is_neighbour is not None
        b, s = x.shape[:2]
        v, f, n, m = grid.views, grid.frames, grid.height * grid.width, views.neighbours.shape[2]
        hidden = layer_norm(x, self.eps, self.norm.weight, self.norm.bias).to(compute_dtype(x))
        q, k, v_ = self.qkv(hidden).chunk(3, dim=-1)
        # [b s (v f n) d] to [(b v) (s f) n heads hd]
        q, k, v_ = (
            part.view(b, s, v, f, n, self.num_heads, -1).transpose(1, 2).reshape(b * v, s * f, n, self.num_heads, -1)
            for part in (self.norm_q(q), self.norm_k(k), v_)
        )
        rows = views.neighbours + v * torch.arange(b, device=x.device)[:, None, None]
        k, v_ = (
            part.index_select(0, rows.flatten()).unflatten(0, (b * v, m)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
            for part in (k, v_)
        )  # [(b v s f) (m n) heads hd]
        seen = views.is_neighbour.reshape(b * v, m)
        has_any = seen.any(dim=1, keepdim=True)
        mask = (seen | ~has_any).repeat_interleave(n, dim=1).repeat_interleave(s * f, dim=0)
        mixed = dense_attention(q.flatten(0, 1), k, v_, mask=mask[:, None, None, :])
        mixed = mixed.reshape(b, v, s, f * n, -1) * has_any.view(b, v, 1, 1, 1)
        return self.o(mixed.transpose(1, 2).reshape(x.shape))


def neighbour_table(names: Sequence[str], neighbours: Mapping[str, Sequence[str]] | None) -> Tensor:
    """Returns which view (row) sees which (column), bool [views views].

    Args:
        names: of the views, in the order of their ids.
        neighbours: names of the views that each view sees; None: all others.

    Raises:
        ConfigError: an unknown name, a view that is not in it, or one that is its own neighbour.
    """
    table = torch.zeros(len(names), len(names), dtype=torch.bool, device="cpu")
    for name, others in _listed(names, neighbours).items():
        for other in others:
            table[names.index(name), names.index(other)] = True
    return table


def _listed(names: Sequence[str], neighbours: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    if neighbours is None:
        return {name: [other for other in names if other != name] for name in names}
    key = "network.views.neighbours"
    for name in [*neighbours, *(other for others in neighbours.values() for other in others)]:
        if name not in names:
            raise unknown_choice("view (of the rig)", name, names, key)
    for name in names:
        if name not in neighbours or name in neighbours[name]:
            told = "itself among its neighbours" if name in neighbours else "no list of neighbours"
            raise ConfigError(f"view {name} has {told}; expected a list of other views for each. Change `{key}`.")
    return {name: list(dict.fromkeys(neighbours[name])) for name in names}
