"""Actions of pixel frames -> what a network reads of a latent frame: for now, FAST tokens of its window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.encoders.actions_fast import FastTokenizer, latent_windows, training_chunks
from longtake.errors import ConfigError

PADDING = -1
"""Id in the places of a window after its last token."""


class FastActionsEncoder:
    """FAST tokens of the window of each latent frame, so that latent k is told nothing that comes after it.

    A window is the `ratio_time` pixel frames of a latent frame; the one of latent 0 holds its single frame for as long.
    Frozen: equal actions give equal tokens.

    Args:
        path: of a fitted tokenizer (`FastTokenizer.save`), or of a published tokenizer.json; None: `tokenizer` has it,
            or it is still to be fitted (`fitted`).
        tokenizer: content of a fitted tokenizer (`FastTokenizer.to_dict`); it travels in weights files.
        vocab_size: most tokens; the network's table has as many rows.
        scale: of a tokenizer that is to be fitted, or of a published one.
        ratio_time: pixel frames of a latent frame.
        max_tokens: most tokens of a window that the network takes.

    Raises:
        ConfigError: the tokenizer cannot be read, or has more tokens than `vocab_size`.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        vocab_size: int = 1024,
        scale: float = 10.0,
        ratio_time: int = 8,
        max_tokens: int = 128,
    ) -> None:
        self.vocab_size, self.scale, self.ratio_time, self.max_tokens = vocab_size, scale, ratio_time, max_tokens
        self.tokenizer = self._read(path, tokenizer)
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the FAST tokenizer has {self.tokenizer.vocab_size} tokens, `vocab_size` is {vocab_size}; "
                "expected as many at least. Change `encoder.actions.vocab_size`."
            )

    def fitted(self, actions: Iterable[np.ndarray]) -> FastActionsEncoder:
        """Returns an encoder fitted on the actions of training clips, float [t a] each."""
        chunks = training_chunks(actions, self.ratio_time)
        found = FastTokenizer.fit(chunks, vocab_size=self.vocab_size, scale=self.scale)
        settings = {name: getattr(self, name) for name in ("vocab_size", "scale", "ratio_time", "max_tokens")}
        return FastActionsEncoder(tokenizer=found.to_dict(), **settings)

    def node(self) -> dict[str, Any]:
        """Returns the config that builds this encoder, with the tokenizer in it and without paths."""
        return {
            "_target_": f"{type(self).__module__}.{type(self).__name__}",
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_dict(),
            "vocab_size": self.vocab_size,
            "scale": self.scale,
            "ratio_time": self.ratio_time,
            "max_tokens": self.max_tokens,
        }

    @property
    def fingerprint(self) -> str:
        """Names what makes the result."""
        from longtake.pretrained.weights_file import fingerprint

        return fingerprint(self.node(), {})

    def __call__(self, actions: Tensor) -> Tensor:
        """Returns tokens int64 [b t' n], `PADDING` after the last one of a window; n is that of the longest window.

        Args:
            actions: [b t a], t = 1 + k * ratio_time pixel frames from a causal start on.

        Raises:
            ConfigError: there is no tokenizer yet, other columns than it was fitted on, or a window of more than
                `max_tokens` tokens.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "the FAST encoder has no tokenizer yet; expected one fitted on the actions of the training split. Give "
                "`encoder.actions.path`."
            )
        tables = actions.detach().cpu().double().numpy()
        windows = np.concatenate([latent_windows(table, self.ratio_time) for table in tables])
        try:
            tokens = self.tokenizer.encode(windows)
        except ValueError as error:
            raise ConfigError(
                f"the actions do not fit the FAST tokenizer: {error}. Change `encoder.actions`."
            ) from error
        longest = max(map(len, tokens))
        if longest > self.max_tokens:
            raise ConfigError(
                f"a window has {longest} FAST tokens; expected at most {self.max_tokens}. Raise "
                "`encoder.actions.max_tokens`."
            )
        padded = torch.full((len(tokens), longest), PADDING, dtype=torch.int64)
        for row, ids in enumerate(tokens):
            padded[row, : len(ids)] = torch.tensor(ids)
        return padded.reshape(len(tables), -1, longest).to(actions.device)

    def _read(self, path: str | None, content: Mapping[str, Any] | None) -> FastTokenizer | None:
        if content is not None:
            return FastTokenizer.from_dict(dict(content))
        if path is None:
            return None
        if Path(path).name == "tokenizer.json":
            return FastTokenizer.from_tokenizer_json(path, scale=self.scale)
        return FastTokenizer.load(path)
