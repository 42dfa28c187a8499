"""How a token network is told the actions: cross-attention with a group-causal mask, additive, or adaLN.

Alignment, with `ratio_time` pixel frames a latent frame, from a causal start on: latent 0 <- pixel 0, latent k <-
pixels 8k-7..8k at 8. Tokens of latent k are told the actions of latents <= k and never of later ones, whatever the
way. With `prior_only` everything is one latent later: what latent k is told ends at pixel 8(k-1), and latent 0 is told
nothing.

Every way is a module `(Conditions) -> ActionSignal`, and the network does with the signal what its fields say. In
`Conditions.actions [b s f a]` slots and their latent frames in this order are the latents from the causal start on.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.action_motion import MotionEmbedding, Pan
from longtake.networks.conditioning import ActionEmbedding, sinusoid
from longtake.types import Conditions


@dataclass(frozen=True)
class ActionSignal:
    """What a network adds, modulates with, and attends to. v is 1 where the actions are those of all views.

    Attributes:
        additive: added to the tokens that enter the first block, [b s v f d], or [1 1 1 1 d] without any actions.
        modulation: what every block makes its shift, scale and gate of, by a layer of its own, as `additive`.
        context: what cross-attention reads, [b n d].
        context_group: latent index from which on each context token may be seen, int64 [n].
        context_mask: True where a context token is real, bool [b n].
        shift: how far the rotary rows and columns of each latent frame's tokens are moved, [b k 2].
    """

    additive: Tensor | None = None
    modulation: Tensor | None = None
    context: Tensor | None = None
    context_group: Tensor | None = None
    context_mask: Tensor | None = None
    shift: Tensor | None = None

    def visible(self, latent: Tensor) -> Tensor:
        """Returns which context tokens queries may see, bool [b 1 l n]: those of their latent and of earlier ones.

        Args:
            latent: latent index of each query, int64 [l], or [b l] where it differs between samples.
        """
        assert self.context_group is not None, "there is no context to see"
        group = self.context_group
        seen = latent.unsqueeze(-1) >= group  # [l n] or [b l n]
        seen = seen if seen.ndim == 3 else seen.unsqueeze(0)
        if self.context_mask is not None:
            seen = seen & self.context_mask.unsqueeze(1)
        return seen.unsqueeze(1)


class ActionConditioning(nn.Module):
    """Base of all ways: checks what comes in and moves it one latent later with `prior_only`.

    Attributes:
        signal: which field of `ActionSignal` the network must have a place for: "additive", "modulation" or "context".

    Args:
        dim: width of the network, and of what is returned.
        action_dim: action columns.
        ratio_time: pixel frames of a latent frame.
        prior_only: tells latent k what happened up to the end of latent k - 1, and latent 0 nothing.
        pan: moves the rotary positions of every latent's tokens along with the camera (`Pan`).

    Raises:
        ConfigError: the data has no actions.
    """

    signal: Literal["additive", "modulation", "context"]

    def __init__(
        self, dim: int, *, action_dim: int | None, ratio_time: int, prior_only: bool = False, pan: bool = False
    ) -> None:
        super().__init__()
        if not action_dim:
            raise ConfigError(
                f"the data has {action_dim or 'no'} action columns, and the network takes actions. Change `data`, or "
                "set `network.actions=null`."
            )
        self.dim, self.action_dim, self.ratio_time, self.prior_only = dim, action_dim, ratio_time, prior_only
        self.pan = Pan(action_dim) if pan else None

    def forward(self, conditions: Conditions) -> ActionSignal:
        """Returns the signal of every latent that `conditions.actions` has a row for.

        Args:
            conditions: actions from the causal start of the sequence on, or None; `actions_mask` False: dropped.

        Raises:
            ConfigError: actions of another width or kind than the network was made for.
        """
        if conditions.actions is not None:
            self.check(conditions.actions)
            if self.prior_only:
                conditions = _one_latent_later(conditions)
        signal = self.embed(conditions)
        if self.pan is None or conditions.actions is None:
            return signal
        return dataclasses.replace(signal, shift=self.pan(self.motion(conditions)))

    def motion(self, conditions: Conditions) -> Tensor:
        """Returns the motion of every latent, [b k 2a]; zeros where actions were dropped.

        Raises:
            ConfigError: there is none beside the actions.
        """
        motion = conditions.motion
        if motion is None or motion.shape[-1] != 2 * self.action_dim:
            raise ConfigError(
                f"the network takes the motion of {self.action_dim} action columns and was given "
                f"{'none' if motion is None else motion.shape[-1] // 2}. Change `network.actions.totals`, "
                "`network.actions.pan` or `data`."
            )
        if conditions.actions_mask is not None:
            motion = motion * conditions.actions_mask.unsqueeze(-1)
        return motion.flatten(1, 2)

    def check(self, actions: Tensor) -> None:
        """Raises ConfigError for actions that this way cannot take."""
        expected = self.action_dim * self.ratio_time
        if actions.shape[-1] != expected or not actions.is_floating_point():
            raise ConfigError(
                f"a latent frame brings {actions.shape[-1]} action numbers of {actions.dtype}; the network takes "
                f"{expected} floats, {self.ratio_time} frames of {self.action_dim} columns. Change "
                "`network.actions.action_dim`, `network.actions.ratio_time` or `data`."
            )

    @abstractmethod
    def embed(self, conditions: Conditions) -> ActionSignal:
        """Returns the signal of checked conditions."""


class PerLatentActions(ActionConditioning):
    """One vector a latent frame through a small MLP, the same for all its tokens.

    Args:
        dim: width of the network.
        action_dim: action columns.
        ratio_time: pixel frames of a latent frame.
        into: "additive" adds it to the tokens (Genie); "modulation" sets shift, scale and gate of every block (adaLN).
        prior_only: as for `ActionConditioning`.
        pan: as for `ActionConditioning`.
        zero_init: starts without any effect, for a pretrained network.

    Raises:
        ConfigError: no action columns, or an unknown `into`.
    """

    def __init__(
        self,
        dim: int,
        *,
        action_dim: int | None,
        ratio_time: int,
        into: Literal["additive", "modulation"] = "additive",
        prior_only: bool = False,
        pan: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__(dim, action_dim=action_dim, ratio_time=ratio_time, prior_only=prior_only, pan=pan)
        if into not in ("additive", "modulation"):
            raise unknown_choice("place for actions", into, ("additive", "modulation"), "network.actions.into")
        self.signal = into
        self.embedding = ActionEmbedding(dim, action_dim=action_dim, ratio_time=ratio_time, zero_init=zero_init)

    def embed(self, conditions: Conditions) -> ActionSignal:
        """Returns `additive` or `modulation` [b s 1 f d]."""
        vectors = self.embedding(conditions)
        return ActionSignal(**{self.signal: vectors if vectors.ndim == 5 else vectors.view(1, 1, 1, 1, -1)})


class ContextActions(ActionConditioning):
    """Base of the ways that cross-attention reads: keys of latent k have group k.

    A learned key that stands for "no action" has group 0 and is always there, so that no query is left without keys.
    Keys tell their time by a sinusoid of the pixel frame (cross-attention has no rotary positions); for the queries the
    same of their latent goes through `additive`, so that a token finds the keys of its own latent.

    Args:
        dim: width of the network; keys have it too.
        action_dim: action columns.
        ratio_time: pixel frames of a latent frame.
        prior_only: as for `ActionConditioning`.
        totals: also adds a vector of the latent's motion (`latent_motion`) to its tokens.
        pan: as for `ActionConditioning`.
    """

    signal = "context"

    def __init__(
        self,
        dim: int,
        *,
        action_dim: int | None,
        ratio_time: int,
        prior_only: bool = False,
        totals: bool = False,
        pan: bool = False,
    ) -> None:
        super().__init__(dim, action_dim=action_dim, ratio_time=ratio_time, prior_only=prior_only, pan=pan)
        self.totals = MotionEmbedding(dim, action_dim=self.action_dim, ratio_time=ratio_time) if totals else None
        self.null = nn.Parameter(torch.empty(dim))
        self.key_time = nn.Linear(dim, dim, bias=False)
        self.query_time = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def reset_parameters(self) -> None:
        """Draws the key for "no action"."""
        nn.init.normal_(self.null, std=0.02)
        for layer in (self.key_time, self.query_time):
            nn.init.normal_(layer.weight, std=0.02)

    @abstractmethod
    def keys(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys [b k n d] of latents k and, broadcastable to [b k n], which of them are real."""

    def embed(self, conditions: Conditions) -> ActionSignal:
        """Returns context, groups, mask, and `additive` that tells tokens their time."""
        if conditions.actions is None:
            context = self.norm(self.null).view(1, 1, -1)
            return ActionSignal(context=context, context_group=torch.zeros_like(context[0, :, 0], dtype=torch.int64))
        slots = conditions.actions.shape[1:3]
        actions = conditions.actions.flatten(1, 2)
        with torch.autocast(actions.device.type, enabled=False):
            keys, is_real = self.keys(actions)
            b, num_lat, n, _ = keys.shape
            latent = torch.arange(num_lat, device=keys.device)
            keys = self.norm(keys + self.key_time(self._key_times(latent, n)))
            additive = self.query_time(sinusoid(latent * self.ratio_time, self.dim, self.query_time.weight.dtype))
            additive = additive.expand(b, -1, -1)
            if self.totals is not None:
                additive = additive + self.totals(self.motion(conditions))
            null = self.norm(self.null).expand(b, 1, -1)
        mask = is_real.expand(b, num_lat, n)
        if conditions.actions_mask is not None:
            mask = mask & conditions.actions_mask.flatten(1, 2).unsqueeze(-1)
        group = latent.repeat_interleave(n)
        return ActionSignal(
            additive=additive.unflatten(1, slots).unsqueeze(2),
            context=torch.cat((null, keys.flatten(1, 2)), dim=1),
            context_group=torch.cat((group.new_zeros(1), group)),
            context_mask=torch.cat((mask.new_ones(b, 1), mask.flatten(1, 2)), dim=1),
        )

    def _key_times(self, latent: Tensor, n: int) -> Tensor:
        """Returns the sinusoid of the pixel frame that each key of each latent is of, [k n d]."""
        last = (latent * self.ratio_time).unsqueeze(-1)
        frames = last + torch.arange(1 - n, 1, device=latent.device) if n == self.ratio_time else last.expand(-1, n)
        return sinusoid(frames, self.dim, self.key_time.weight.dtype)


class CrossAttentionActions(ContextActions):
    """One key a pixel frame, of its action columns: `ratio_time` for a latent frame, one for latent 0.

    Arguments and errors as for `ContextActions`.
    """

    def __init__(
        self,
        dim: int,
        *,
        action_dim: int | None,
        ratio_time: int,
        prior_only: bool = False,
        totals: bool = False,
        pan: bool = False,
    ) -> None:
        super().__init__(
            dim, action_dim=action_dim, ratio_time=ratio_time, prior_only=prior_only, totals=totals, pan=pan
        )
        self.mlp = nn.Sequential(nn.Linear(self.action_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.reset_parameters()

    def keys(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a key a pixel frame; the places before pixel 0 are not real."""
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        frames = actions.unflatten(-1, (self.ratio_time, self.action_dim))
        is_real = torch.ones(1, *frames.shape[1:3], dtype=torch.bool, device=actions.device)
        start = 1 if self.prior_only else 0  # where latent 0 of the data went
        is_real[:, : start + 1, :-1] = False
        return self.mlp(frames.to(first.weight.dtype)), is_real


class FastActions(ContextActions):
    """One key a FAST token of the window of each latent frame (see `longtake.encoders.actions_fast`).

    What a token means depends on the tokens before it (how many coefficients they hold), so the keys of a window look
    at one another once before the network sees them.

    Args:
        dim: width of the network.
        action_dim: action columns; only checked to be there.
        ratio_time: pixel frames of a latent frame.
        vocab_size: of the FAST tokenizer.
        max_tokens: most tokens of a window.
        num_heads: of the attention inside a window.
        prior_only: as for `ActionConditioning`.
        totals: as for `ContextActions`.
        pan: as for `ActionConditioning`.

    Raises:
        ConfigError: no action columns, or a width that the heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        *,
        action_dim: int | None,
        ratio_time: int,
        vocab_size: int,
        max_tokens: int = 128,
        num_heads: int = 4,
        prior_only: bool = False,
        totals: bool = False,
        pan: bool = False,
    ) -> None:
        super().__init__(
            dim, action_dim=action_dim, ratio_time=ratio_time, prior_only=prior_only, totals=totals, pan=pan
        )
        if dim % num_heads:
            raise ConfigError(
                f"network.dim is {dim}, which {num_heads} heads do not divide; expected a multiple. Change "
                "`network.actions.num_heads`."
            )
        self.vocab_size, self.max_tokens, self.num_heads = vocab_size, max_tokens, num_heads
        self.tokens = nn.Embedding(vocab_size, dim)
        self.places = nn.Embedding(max_tokens, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.inner_norm = nn.LayerNorm(dim)
        self.reset_parameters()

    def check(self, actions: Tensor) -> None:
        """Raises ConfigError for anything but ids of the vocabulary, -1 where a window has fewer tokens."""
        if actions.is_floating_point():
            raise ConfigError(
                f"the network takes FAST tokens and was given actions of {actions.dtype}; expected integer ids. Change "
                "`encoder/actions` to fast, or `network/actions`."
            )
        if actions.shape[-1] > self.max_tokens:
            raise ConfigError(
                f"a window has up to {actions.shape[-1]} FAST tokens; the network takes at most {self.max_tokens}. "
                "Raise `network.actions.max_tokens`."
            )
        if actions.numel() and int(actions.max()) >= self.vocab_size:
            raise ConfigError(
                f"FAST tokens go up to {int(actions.max())}; the network has a vocabulary of {self.vocab_size}. Change "
                "`network.actions.vocab_size`, or the fitted tokenizer in `encoder.actions`."
            )

    def keys(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a key a token; -1 is not real."""
        is_real = actions >= 0
        x = self.tokens(actions.clamp(min=0)) + self.places.weight[: actions.shape[-1]]
        b, k, n, _ = x.shape
        qkv = self.qkv(self.inner_norm(x)).reshape(b * k, n, 3, self.num_heads, -1)
        q, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [(b k) heads n width]
        # a window without any token (prior_only: that of latent 0) sees itself, so that nothing is NaN
        mask = (is_real | ~is_real.any(dim=-1, keepdim=True)).view(b * k, 1, 1, n)
        mixed = nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask)
        return x + self.out(mixed.transpose(1, 2).reshape(b, k, n, -1)), is_real


def _one_latent_later(conditions: Conditions) -> Conditions:
    """Returns conditions whose latent k has the actions of latent k - 1, and latent 0 none."""
    actions = conditions.actions
    assert actions is not None
    mask = conditions.actions_mask
    flat = actions.flatten(1, 2)
    known = torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device) if mask is None else mask.flatten(1, 2)
    nothing = torch.zeros_like(flat[:, :1]) if actions.is_floating_point() else torch.full_like(flat[:, :1], -1)
    motion = conditions.motion
    if motion is not None:
        moved = motion.flatten(1, 2)
        motion = torch.cat((torch.zeros_like(moved[:, :1]), moved[:, :-1]), dim=1).view_as(motion)
    return dataclasses.replace(
        conditions,
        actions=torch.cat((nothing, flat[:, :-1]), dim=1).view_as(actions),
        actions_mask=torch.cat((torch.zeros_like(known[:, :1]), known[:, :-1]), dim=1).view(actions.shape[:3]),
        motion=motion,
    )
