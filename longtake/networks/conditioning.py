"""How a network is told what it should show: noise level, frame rate, actions, text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.errors import ConfigError, unknown_choice
from longtake.types import Conditions

TIMESTEPS = 1000.0  # sigma in [0, 1] is told as a timestep in [0, 1000]


def sinusoid(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Returns [... dim]: cosines, then sines, of x times 10000^(-i / (dim/2)); angles are float64."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64, device=x.device) * (-math.log(10000.0) / half))
    angles = x.double().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


class ScalarEmbedding(nn.Sequential):
    """Linear - SiLU - Linear on the sinusoid of a number: [...] to [... d]. Runs outside of autocast.

    Args:
        dim: width.
        freq_dim: width of the sinusoid.
    """

    def __init__(self, dim: int, freq_dim: int = 256) -> None:
        super().__init__(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.freq_dim = freq_dim

    def reset_parameters(self) -> None:
        """Draws small weights, as Wan does."""
        _small(self)

    def forward(self, x: Tensor) -> Tensor:
        first: nn.Linear = self[0]  # type: ignore[assignment]
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(sinusoid(x, self.freq_dim, first.weight.dtype))


class FrameRateEmbedding(nn.Module):
    """Adds the frame rate to the modulation; nothing at init, and nothing where it is not given.

    Args:
        dim: width.
        freq_dim: width of the sinusoid.
    """

    def __init__(self, dim: int, freq_dim: int = 256) -> None:
        super().__init__()
        self.embedding = ScalarEmbedding(dim, freq_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeroes the last layer."""
        self.embedding.reset_parameters()
        last: nn.Linear = self.embedding[2]  # type: ignore[assignment]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, conditions: Conditions) -> Tensor | None:
        """Returns [b 1 1 1 d]."""
        if conditions.fps is None:
            return None
        fps = conditions.fps
        embedded = self.embedding(fps.clamp(min=0)) * (fps > 0).unsqueeze(-1)
        return embedded[:, None, None, None]


class ActionEmbedding(nn.Module):
    """Actions of each latent frame through a small MLP. Absent and dropped ones are a learned vector.

    Args:
        dim: width.
        action_dim: action columns.
        ratio_time: pixel frames of a latent frame; what comes in has action_dim x ratio_time numbers a latent frame.
        into: "modulation" adds to the noise level's embedding, so that actions set shift, scale and gate of every
            block; "tokens" adds to the tokens that enter the first block.
        totals: also tells the sums of each column from the slot's first frame on: how far the camera has turned since
            the last clean chunk is then an input, not something to be added up by attention.
        zero_init: starts without any effect, for a pretrained network.
    """

    def __init__(
        self,
        dim: int,
        *,
        action_dim: int | None,
        ratio_time: int = 1,
        into: Literal["modulation", "tokens"] = "modulation",
        totals: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if into not in ("modulation", "tokens"):
            raise unknown_choice("place for actions", into, ("modulation", "tokens"), "network.actions.into")
        if not action_dim:
            raise ConfigError(
                f"the data has {action_dim or 'no'} action columns, and the network takes actions. Change `data`, or "
                "set `network.actions=null`."
            )
        self.inputs, self.into, self.zero_init = action_dim * ratio_time, into, zero_init
        self.ratio_time, self.totals = ratio_time, totals
        self.mlp = nn.Sequential(nn.Linear(self.inputs + totals * action_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.null = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeroes the null vector, and with `zero_init` the last layer."""
        nn.init.zeros_(self.null)
        if self.zero_init:
            last: nn.Linear = self.mlp[2]  # type: ignore[assignment]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, conditions: Conditions) -> Tensor:
        """Returns [b s 1 f d], or the null vector [d] where there are no actions at all."""
        actions = conditions.actions
        if actions is None:
            return self.null
        if actions.shape[-1] != self.inputs:
            raise ConfigError(
                f"a latent frame brings {actions.shape[-1]} action numbers, the network takes {self.inputs}. Change "
                "`network.actions.action_dim`, `network.actions.ratio_time` or `data`."
            )
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        with torch.autocast(actions.device.type, enabled=False):
            actions = actions.to(first.weight.dtype)
            embedded = self.mlp(torch.cat([actions, self._totals(actions)], dim=-1) if self.totals else actions)
        if conditions.actions_mask is not None:
            embedded = torch.where(conditions.actions_mask.unsqueeze(-1), embedded, self.null)
        return embedded.unsqueeze(2)

    def _totals(self, actions: Tensor) -> Tensor:
        """Returns running sums [b s f a] of a slot's actions [b s f r*a], divided by its pixel frames."""
        frames = actions.unflatten(-1, (self.ratio_time, -1)).mean(dim=-2)
        return frames.cumsum(dim=-2) / actions.shape[-2]


class TextEmbedding(nn.Module):
    """Text tokens to the width of the network: Linear - GELU(tanh) - Linear, as in Wan.

    Args:
        dim: width.
        text_dim: width of the embeddings that come in, or of the table of word vectors.
        vocab_size: takes word ids and embeds them with a table of its own; None takes embeddings.
        text_len: pads embeddings with zero rows to this length first; None: no padding.
        attends_padding: Wan's way: padding is zero rows that attention sees like any other, and a text that was
            dropped is the embedding of an empty one. False masks padding out and has a learned vector for "no text".
    """

    def __init__(
        self,
        dim: int,
        *,
        text_dim: int,
        vocab_size: int | None = None,
        text_len: int | None = None,
        attends_padding: bool = False,
    ) -> None:
        super().__init__()
        self.text_dim, self.text_len, self.attends_padding = text_dim, text_len, attends_padding
        self.words = nn.Embedding(vocab_size, text_dim) if vocab_size is not None else None
        self.mlp = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.null = None if attends_padding else nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the null vector and the table of words, and small weights, as Wan does."""
        _small(self.mlp)
        if self.null is not None:
            nn.init.normal_(self.null, std=0.02)
        if self.words is not None:
            nn.init.normal_(self.words.weight, std=1.0)

    @torch.no_grad()
    def take_words(self, ids: Sequence[int]) -> None:
        """Puts the vectors of words in another order: the word of id i gets that of id `ids[i]` until now."""
        assert self.words is not None, "embeddings have no table of words"
        self.words.weight[: len(ids)] = self.words.weight[list(ids)]

    def forward(self, conditions: Conditions, batch: int) -> tuple[Tensor, Tensor | None]:
        """Returns text tokens [b n l d] and which of them are real, bool [b n l] (None: all)."""
        if conditions.text_emb is None and conditions.text_ids is None:
            return self._no_text(batch), None
        rows = self._rows(conditions)
        mask = conditions.text_mask
        if self.attends_padding:
            if mask is not None:
                rows = rows * mask.unsqueeze(-1)
            if self.text_len is not None and rows.shape[2] > self.text_len:
                raise ConfigError(
                    f"texts have {rows.shape[2]} embeddings, the network takes {self.text_len}; expected no more. "
                    "Change `encoder.text.max_length` or `network.text.text_len`."
                )
            if self.text_len is not None:
                rows = F.pad(rows, (0, 0, 0, self.text_len - rows.shape[2]))
            return self.mlp(rows), None
        text = self.mlp(rows)
        if mask is None or self.null is None:
            return text, mask
        is_empty = ~mask.any(dim=-1, keepdim=True)  # then the first row stands for "no text"
        first = torch.zeros_like(mask)
        first[..., 0] = True
        null = first & is_empty
        return torch.where(null.unsqueeze(-1), self.null.to(text.dtype), text), mask | null

    def _rows(self, conditions: Conditions) -> Tensor:
        if self.words is not None:
            if conditions.text_ids is None:
                raise ConfigError("the network takes word ids, the data has text embeddings. Change `encoder/text`.")
            return self.words(conditions.text_ids)
        if conditions.text_emb is None:
            raise ConfigError("the network takes text embeddings, the data has word ids. Change `encoder/text`.")
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        return conditions.text_emb.to(first.weight.dtype)

    def _no_text(self, batch: int) -> Tensor:
        if self.null is None:
            raise ConfigError(
                "the network was made for texts and has no vector for none; expected text embeddings (of an empty "
                "text, if there is none). Change `encoder/text`."
            )
        return self.null.expand(batch, 1, 1, -1)


def _small(mlp: nn.Sequential) -> None:
    for module in mlp:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
