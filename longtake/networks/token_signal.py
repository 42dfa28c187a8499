"""What a token network is told besides its tokens, laid out by row of the sequence: text, actions, adaLN.

A token is told what belongs to the latent that it predicts, which for the last token of a latent is the next one: so
the tokens of latent k know the actions of latents <= k, the first of them included, and no later ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.networks.action_conditioning import ActionSignal
from longtake.networks.layout import Grid
from longtake.types import Conditions


@dataclass(frozen=True)
class TokenSignal:
    """Signals of a whole sequence.

    Attributes:
        grid: views, latent frames, rows and columns of the sequence.
        bov: whether a begin-of-video token comes first.
        additive: added to the embedded tokens, [b or 1, g or 1, d], g = latent frames x views; None: nothing.
        modulation: what adaLN is made of, as `additive`.
        context: what cross-attention reads, [b or 1, m, d]; None: nothing.
        visible_from: latent from which on each context token may be seen, int64 [m]; None: always.
        context_mask: True where a context token is real, bool [b or 1, m]; None: all are.
        shift: how far the rotary rows and columns of each latent frame are moved, [b or 1, t, 2]; None: not at all.
    """

    grid: Grid
    bov: bool
    additive: Tensor | None = None
    modulation: Tensor | None = None
    context: Tensor | None = None
    visible_from: Tensor | None = None
    context_mask: Tensor | None = None
    shift: Tensor | None = None

    def rows(self, places: Tensor) -> Tensor:
        """Returns the row g of `additive` and `modulation` for places of the sequence, int64, shaped as `places`."""
        frame = self.grid.height * self.grid.width
        return self._predicted(places, frame, self.grid.views * self.grid.frames)

    def added(self, rows: Tensor) -> Tensor | None:
        """Returns what is added to tokens with these rows [n] or [b n]: [b or 1, n or 1, d]."""
        if self.additive is None or self.additive.shape[1] == 1:
            return self.additive
        if rows.ndim == 1:
            return self.additive.index_select(1, rows)
        table = self.additive.expand(len(rows), -1, -1)
        return table[torch.arange(len(rows), device=rows.device)[:, None], rows]

    def cross_mask(self, places: Tensor) -> Tensor | None:
        """Returns which context tokens the tokens at `places` [n] or [b n] may see, bool [b or 1, 1, n or 1, m]."""
        if self.context is None or (self.visible_from is None and self.context_mask is None):
            return None
        if self.visible_from is None:
            assert self.context_mask is not None
            return self.context_mask[:, None, None]
        frame = self.grid.views * self.grid.height * self.grid.width
        latent = self._predicted(places, frame, self.grid.frames)
        signal = ActionSignal(context_group=self.visible_from, context_mask=self.context_mask)
        return signal.visible(latent)

    def _predicted(self, places: Tensor, size: int, count: int) -> Tensor:
        """What comes after the last latent of the sequence is told as that one; its prediction is never used."""
        return ((places + int(not self.bov)) // size).clamp_(max=count - 1)


def token_signal(
    conditions: Conditions, grid: Grid, *, bov: bool, actions: nn.Module | None, context_dim: int | None, padding: bool
) -> TokenSignal:
    """Returns the signals of a sequence.

    Args:
        conditions: text and actions; the slots of the actions are the latents from the first one on.
        grid: views, latent frames, rows and columns of the sequence.
        bov: whether BOV comes first.
        actions: `ActionConditioning`; None: actions are ignored.
        context_dim: width of what cross-attention reads; None: there is none, and text is ignored.
        padding: whether the padding of a text is zero rows that attention sees, as in Cosmos.

    Raises:
        ConfigError: cross-attention has nothing to read; several texts; text of another width; too few actions.
    """
    told = ActionSignal() if actions is None else actions(conditions)
    signal = TokenSignal(
        grid,
        bov,
        additive=_by_group(told.additive, grid, "additive"),
        modulation=_by_group(told.modulation, grid, "modulation"),
        context=told.context,
        visible_from=told.context_group,
        context_mask=told.context_mask,
        shift=told.shift,
    )
    if context_dim is None:
        return signal
    if conditions.text_emb is None:
        if told.context is None:
            raise ConfigError(
                "the network has cross-attention, but there are neither text embeddings nor actions for it to read; "
                "expected one of them. Change `encoder/text`, `network.actions` or `network.cross_attn_every`."
            )
        return signal
    return _with_text(signal, conditions, context_dim, padding)


def _with_text(signal: TokenSignal, conditions: Conditions, context_dim: int, padding: bool) -> TokenSignal:
    text, mask = conditions.text_emb, conditions.text_mask
    assert text is not None
    if text.shape[1] != 1 or text.shape[-1] != context_dim:
        raise ConfigError(
            f"there are {text.shape[1]} texts of width {text.shape[-1]} a clip; expected one of width {context_dim}. "
            "Change `encoder/text` or `network.context_dim`."
        )
    text, mask = text[:, 0], None if mask is None else mask[:, 0]
    if mask is not None:
        text = text * mask.unsqueeze(-1)
        # without any word left, the zero rows themselves stand for "no text"
        mask = None if padding else mask | ~mask.any(dim=-1, keepdim=True)
    if signal.context is None:
        return dataclasses.replace(signal, context=text, context_mask=mask)
    assert signal.visible_from is not None
    b = len(text)
    context = signal.context.expand(b, -1, -1)
    masks = [
        text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask,
        torch.ones(context.shape[:2], dtype=torch.bool, device=text.device)
        if signal.context_mask is None
        else signal.context_mask.expand(b, -1),
    ]
    groups = torch.cat((signal.visible_from.new_zeros(text.shape[1]), signal.visible_from))
    return dataclasses.replace(
        signal,
        context=torch.cat((text.to(context.dtype), context), dim=1),
        visible_from=groups,
        context_mask=torch.cat(masks, dim=1),
    )


def _by_group(values: Tensor | None, grid: Grid, what: str) -> Tensor | None:
    """[b s v f d] to [b g d], g = (s v f); v may be 1 where it is equal for all views."""
    if values is None:
        return None
    b, s, v, f, d = values.shape
    if s * f == 1:
        return values.reshape(b, -1, d)[:, :1]
    if s * f < grid.frames or v not in (1, grid.views):
        raise ConfigError(
            f"the {what} signal covers {s * f} latent frames of {v} views; expected {grid.frames} of {grid.views}. "
            "Give actions for every frame (`actions`), or lower `num_frames`."
        )
    return values.expand(b, s, grid.views, f, d).flatten(1, 3)
