"""Captions -> what a network reads of them: word ids of a small vocabulary, or embeddings of a pretrained encoder."""

from __future__ import annotations

import html
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import ConfigError

logger = logging.getLogger("longtake")

PADDING, UNKNOWN, FIRST_WORD = 0, 1, 2
"""Word ids: no word, a word outside of the vocabulary, the most frequent word."""

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


class TextEncoder(ABC):
    """Base of all text encoders; called with one caption a clip. They are frozen: equal texts give equal results."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names what makes the result: results of encoders with equal fingerprints mean the same."""

    @abstractmethod
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns the text fields of `Clip` for captions, one text each (n = 1)."""


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case; "first-person" is one word, punctuation is none."""
    return _WORD.findall(text.lower())


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Returns how often each word stands in some captions."""
    return Counter(word for caption in captions for word in words_of(caption))


def ids_in(before: Sequence[str], now: Sequence[str]) -> tuple[list[int], list[str]]:
    """Where the ids of one vocabulary stand in another, so that a table of word vectors can follow.

    Args:
        before: words that the table was learnt with, in the order of their ids.
        now: words that it shall serve.

    Returns:
        For each id of `now`, padding and unknown included, the id in `before`; and the words that are not there: their
        id is that of unknown words, as which they were read so far.
    """
    places = {word: FIRST_WORD + index for index, word in enumerate(before)}
    ids = [PADDING, UNKNOWN, *(places.get(word, UNKNOWN) for word in now)]
    return ids, [word for word in now if word not in places]


class WordsEncoder(TextEncoder):
    """Ids of the words of a caption, in order. The table of embeddings is a parameter of the network.

    Args:
        words: the vocabulary, in the order of its ids; None: not known yet (`with_vocabulary`).
        vocab_size: ids there can be, padding and unknown included; the network's table has as many rows.
        max_words: words of a caption that are read; longer ones are cut, with a warning.

    Attributes:
        unknown: how often each word outside of the vocabulary was met.
        num_cut: how many captions were longer than `max_words`.
    """

    def __init__(self, words: Sequence[str] | None = None, vocab_size: int = 256, max_words: int = 32) -> None:
        if max_words < 1 or vocab_size <= FIRST_WORD:
            raise ConfigError(
                f"max_words is {max_words} and vocab_size {vocab_size}; expected at least 1 and {FIRST_WORD + 1}. "
                "Change `encoder.text.max_words` or `encoder.text.vocab_size`."
            )
        if words is not None and (len(set(words)) != len(words) or len(words) > vocab_size - FIRST_WORD):
            raise ConfigError(
                f"the vocabulary has {len(words)} words, {len(set(words))} of them different; expected different "
                f"words, {vocab_size - FIRST_WORD} at most. Change `encoder.text.words` or `encoder.text.vocab_size`."
            )
        self.words = None if words is None else list(words)
        self.vocab_size, self.max_words = vocab_size, max_words
        self.unknown: Counter[str] = Counter()
        self.num_cut = 0
        self._ids = {word: FIRST_WORD + index for index, word in enumerate(words or ())}

    def with_vocabulary(self, counts: Counter[str]) -> WordsEncoder:
        """Returns an encoder with the most frequent words of some captions, as many as `vocab_size` has room for."""
        room = self.vocab_size - FIRST_WORD
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        if len(ranked) > room:
            lost = sum(counts[word] for word in ranked[room:]) / counts.total()
            logger.warning(
                "the captions have %d different words and encoder.text.vocab_size has room for %d: %.2g %% of all "
                "words become unknown",
                len(ranked),
                room,
                100 * lost,
            )
        return WordsEncoder(ranked[:room], self.vocab_size, self.max_words)

    def node(self) -> dict[str, Any]:
        """Returns the config that builds this encoder; it travels in weights files and data sets."""
        return {
            "_target_": f"{type(self).__module__}.{type(self).__name__}",
            "words": self.words,
            "vocab_size": self.vocab_size,
            "max_words": self.max_words,
        }

    @property
    def fingerprint(self) -> str:
        from longtake.pretrained.weights_file import fingerprint

        return fingerprint(self.node(), {})

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns "text_ids" int64 [b 1 l] and "text_mask" bool [b 1 l], l = max_words.

        An empty caption is no text: its mask is False everywhere. Words outside of the vocabulary are counted in
        `unknown`, and named in the log when first met.
        """
        if self.words is None:
            raise ConfigError(
                "the words encoder has no vocabulary yet; expected one from the captions of the training split, which "
                "`python -m scripts.cache_latents` takes and stores. Make the cache, or set `encoder.text.words`."
            )
        ids = torch.full((len(captions), 1, self.max_words), PADDING, dtype=torch.int64)
        for row, caption in enumerate(captions):
            for column, word in enumerate(self._read(caption)):
                ids[row, 0, column] = self._ids.get(word, UNKNOWN)
        return {"text_ids": ids, "text_mask": ids != PADDING}

    def _read(self, caption: str) -> list[str]:
        words = words_of(caption)
        if len(words) > self.max_words:
            if self.num_cut == 0:
                logger.warning(
                    "a caption has %d words and is cut to encoder.text.max_words = %d: %r (later ones are counted)",
                    len(words),
                    self.max_words,
                    caption,
                )
            self.num_cut += 1
        words = words[: self.max_words]
        unknown = [word for word in words if word not in self._ids]
        new = sorted({word for word in unknown if word not in self.unknown})
        self.unknown.update(unknown)
        if new:
            logger.warning(
                "not in the vocabulary of %d words, read as unknown: %s", len(self._ids), ", ".join(map(repr, new))
            )
        return words


class UMT5TextEncoder(TextEncoder):
    """Embeddings of UMT5, as Wan 2.1 takes them: rows past the end of the text are zero.

    Args:
        path: local folder with the encoder and its tokenizer in the format of transformers; nothing is downloaded.
        max_length: tokens of a text, the end mark included; longer texts are cut.
        dtype: what it computes in.
        subfolder: of the weights, where the folder holds a whole pipeline.
        tokenizer_subfolder: of the tokenizer.
    """

    def __init__(
        self,
        path: str,
        max_length: int = 512,
        dtype: str = "bfloat16",
        subfolder: str = "",
        tokenizer_subfolder: str = "",
    ) -> None:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"no text encoder at {folder}; expected a local folder with UMT5 and its tokenizer. Change "
                "`encoder.text.path`."
            )
        try:
            from transformers import AutoTokenizer, UMT5EncoderModel
        except ImportError as error:
            raise ConfigError(
                "encoder/text=umt5 needs the package `transformers`, which is not installed. Install it "
                "(`pip install transformers`), or take encoder/text=words."
            ) from error
        self.max_length = max_length
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, subfolder=tokenizer_subfolder, local_files_only=True, trust_remote_code=False
            )
            self.model = UMT5EncoderModel.from_pretrained(
                folder,
                subfolder=subfolder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=getattr(torch, dtype),
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{folder} cannot be read as UMT5 ({reason}); expected config.json, safetensors and a tokenizer. "
                "Change `encoder.text.path`."
            ) from error
        self.model.eval().requires_grad_(False)
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            from longtake.pretrained.weights_file import fingerprint

            config = {"class": type(self).__name__, "max_length": self.max_length}
            self._fingerprint = fingerprint(config, self.model.state_dict())
        return self._fingerprint

    def to(self, device: torch.device | str) -> UMT5TextEncoder:
        """Moves the weights to a device. Returns itself."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns "text_emb" float32 [b 1 max_length width] and "text_mask" bool [b 1 max_length].

        An empty caption is the end mark alone: that is what Wan leads away from where nothing else is said.
        """
        tokens = self.tokenizer(
            [cleaned(caption) for caption in captions],
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self.model.device)
        mask = tokens.attention_mask
        rows = self.model(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state
        rows = rows.float() * mask.unsqueeze(-1)
        return {"text_emb": rows.unsqueeze(1), "text_mask": mask.bool().unsqueeze(1)}


def cleaned(text: str) -> str:
    """Returns a text as Wan's tokenizer gets it: html entities resolved twice, runs of white space made one space.

    Wan also repairs broken unicode (ftfy), which leaves proper text as it is.
    """
    return " ".join(html.unescape(html.unescape(text)).split())
