"""FAST: chunks of continuous actions as a few discrete tokens (Pertsch et al. 2025), on the `tokenizers` library.

Of a chunk [T D], scaled to about [-1, 1] column by column (1st to 99th percentile, not clipped):
1. orthonormal DCT-II along time; 2. c = round(scale * coefficient), half to even; 3. flattened with all columns of
frequency 0 first, then frequency 1, ...; 4. the character of code c - min_token for each; 5. byte-level BPE.

Deviations from the published processor, whose files are read all the same (`from_tokenizer_json`):
- Coefficients are clipped at both ends of the fitted range: none is dropped in silence, and the length is always right.
- The alphabet of a fitted vocabulary holds every byte that the range can need; merges may cross what a text tokenizer
  takes for words. Inside the fitted range the round trip of the coefficients is exact.
- What cannot be decoded is an error, never zeros.
- A column that hardly ever moves is scaled by its extremes, and a constant one by 1, not by a millionth.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from longtake.errors import BadSampleError, ConfigError

PUBLISHED_SCALE, PUBLISHED_MIN_TOKEN = 10.0, -354
"""Of the released universal tokenizer."""

_FORMAT = {"format": "longtake-fast", "format_version": 1}
_SURROGATES = 0xD800  # the first code that is no character
_PROBED = 4096  # codes that are looked for in a published vocabulary
_MAX_TOKEN_LENGTH = 10_000
_MAX_FILE_BYTES = 1 << 28
_FLAT = 1e-6  # a range below this is none


@functools.lru_cache(maxsize=64)
def dct_matrix(length: int) -> np.ndarray:
    """Returns the orthonormal DCT-II as float64 [frequency time]; its transpose is its inverse."""
    k, n = np.arange(length)[:, None], np.arange(length)[None]
    matrix = np.sqrt(2 / length) * np.cos(np.pi * (2 * n + 1) * k / (2 * length))
    matrix[0] /= np.sqrt(2)
    return matrix


@dataclass(frozen=True)
class FastTokenizer:
    """A fitted tokenizer; equal chunks give equal tokens.

    Attributes:
        bpe: the byte-level BPE.
        scale: coefficients are rounded to 1 / scale.
        codes: coefficients that the vocabulary can tell, ascending int64 [n]; others become the nearest of them.
        min_token: coefficient of code 0.
        horizon: frames of a chunk; None: not fixed, `decode` has to be told.
        action_dim: columns of a chunk; None: likewise.
        low: of each column what becomes -1, float64 [D]; None: actions are scaled already.
        high: of each column what becomes 1.
    """

    bpe: Tokenizer = field(repr=False)
    scale: float
    codes: np.ndarray = field(repr=False)
    min_token: int
    horizon: int | None = None
    action_dim: int | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @classmethod
    def fit(cls, chunks: np.ndarray, *, vocab_size: int = 1024, scale: float = 10.0) -> FastTokenizer:
        """Returns a tokenizer made for chunks like these.

        Args:
            chunks: training chunks, float [n T D].
            vocab_size: most tokens; fewer where the chunks have nothing more to merge.
            scale: finer for larger values: the error of a coefficient is at most 1 / (2 scale).

        Raises:
            ConfigError: no chunks, values that are not finite, a scale that makes too wide a range, or a vocabulary
                with no room for the bytes of the range.
        """
        chunks = np.asarray(chunks, np.float64)
        if chunks.ndim != 3 or not chunks.size or not np.isfinite(chunks).all() or not scale > 0:
            raise ConfigError(
                f"FAST is fitted on finite chunks [n T D] at a scale above 0; got {list(chunks.shape)} at {scale}. "
                "Change `data`, or `encoder.actions.scale`."
            )
        low, high = _ranges(chunks.reshape(-1, chunks.shape[-1]))
        coefficients = _coefficients((chunks - low) / (high - low) * 2 - 1, scale)
        first, last = int(coefficients.min()), int(coefficients.max())
        if last - first >= _SURROGATES:
            raise ConfigError(
                f"the rounded coefficients run from {first} to {last}; expected a range below {_SURROGATES}. Lower "
                "`encoder.actions.scale`, or look for outliers in the actions."
            )
        alphabet = _alphabet(last - first + 1)
        if vocab_size < len(alphabet):
            raise ConfigError(
                f"a vocabulary of {vocab_size} has no room for the {len(alphabet)} bytes that coefficients from "
                f"{first} to {last} need. Raise `encoder.actions.vocab_size`, or lower `encoder.actions.scale`."
            )
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=alphabet,
            max_token_length=_MAX_TOKEN_LENGTH,
        )
        bpe.train_from_iterator((_text(row - first) for row in coefficients), trainer=trainer)
        codes = np.arange(first, last + 1)
        return cls(bpe, scale, codes, first, chunks.shape[1], chunks.shape[2], low, high)

    @classmethod
    def from_tokenizer_json(
        cls,
        path: str | Path,
        *,
        scale: float = PUBLISHED_SCALE,
        min_token: int = PUBLISHED_MIN_TOKEN,
        horizon: int | None = None,
        action_dim: int | None = None,
    ) -> FastTokenizer:
        """Returns the tokenizer of a published `tokenizer.json`; actions are expected in about [-1, 1].

        Args:
            path: of the file.
            scale: stated beside it, in processor_config.json.
            min_token: likewise.
            horizon: frames of a chunk, where they are fixed.
            action_dim: columns, likewise.

        Raises:
            ConfigError: it cannot be read, or it can write no coefficient at all.
        """
        bpe = _load_bpe(_read(Path(path)), str(path))
        known = np.array([code for code in range(_PROBED) if _round_trips(bpe, chr(code))], np.int64)
        if not len(known):
            raise ConfigError(
                f"{path} is a tokenizer of something else: it can write no code from 0 to {_PROBED - 1}; expected that "
                "of FAST. Change `encoder.actions.path`."
            )
        return cls(bpe, scale, known + min_token, min_token, horizon, action_dim)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; ids are below it."""
        return self.bpe.get_vocab_size()

    def quantise(self, chunks: np.ndarray) -> np.ndarray:
        """Returns the rounded coefficients of chunks [n T D] inside the range, int64 [n T*D], low frequencies first."""
        chunks = np.asarray(chunks, np.float64)
        if chunks.ndim != 3 or self.horizon not in (None, chunks.shape[1]) or self._other_columns(chunks.shape[2]):
            raise ValueError(
                f"chunks {list(chunks.shape)}; expected [n, {self.horizon or 'T'}, {self.action_dim or 'D'}]"
            )
        if not np.isfinite(chunks).all():
            raise ValueError("chunks hold NaN or infinity; expected finite actions")
        if self.low is not None and self.high is not None:
            chunks = (chunks - self.low) / (self.high - self.low) * 2 - 1
        return self._nearest(_coefficients(chunks, self.scale))

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        """Returns the tokens of each chunk, most important first; chunks differ in how many they have.

        Args:
            chunks: float [n T D], in the units that the tokenizer was fitted on.

        Raises:
            ValueError: chunks of another shape, or values that are not finite.
        """
        texts = [_text(row - self.min_token) for row in self.quantise(chunks)]
        return [encoding.ids for encoding in self.bpe.encode_batch(texts, add_special_tokens=False)]

    def decode(
        self, tokens: Sequence[Sequence[int]], *, horizon: int | None = None, action_dim: int | None = None
    ) -> np.ndarray:
        """Returns chunks, float64 [n T D].

        Args:
            tokens: of each chunk.
            horizon: T, where the tokenizer has none of its own.
            action_dim: D, likewise.

        Raises:
            BadSampleError: ids that are none, or tokens that hold another number of coefficients than a chunk has: one
                wrong token shifts all that follow.
            ValueError: T or D are not known.
        """
        length, width = horizon or self.horizon, action_dim or self.action_dim
        if length is None or width is None:
            raise ValueError(f"a chunk has {length} frames of {width} columns; expected both to be given")
        rows = [self._coefficients_of(ids, index, length * width) for index, ids in enumerate(tokens)]
        spectrum = np.array(rows, np.float64).reshape(len(rows), length, width) / self.scale
        chunks = np.einsum("kt,nkd->ntd", dct_matrix(length), spectrum)
        if self.low is not None and self.high is not None:
            chunks = (chunks + 1) / 2 * (self.high - self.low) + self.low
        return chunks

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain JSON: what `save` writes, and what can travel in a config node."""
        ranges = {name: None if (v := getattr(self, name)) is None else v.tolist() for name in ("low", "high")}
        return {
            **_FORMAT,
            "scale": self.scale,
            "min_token": self.min_token,
            "codes": _runs(self.codes),
            "horizon": self.horizon,
            "action_dim": self.action_dim,
            **ranges,
            "tokenizer": json.loads(self.bpe.to_str()),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str = "the FAST tokenizer") -> FastTokenizer:
        """Returns what `to_dict` described. Raises ConfigError for anything else."""
        try:
            if any(content[key] != value for key, value in _FORMAT.items()):
                raise ValueError(f"it is {content['format']!r} version {content['format_version']!r}")
            ranges = [
                None if content[name] is None else np.array(content[name], np.float64) for name in ("low", "high")
            ]
            codes = np.concatenate([np.arange(first, last + 1) for first, last in content["codes"]])
            return cls(
                _load_bpe(json.dumps(content["tokenizer"]), where),
                float(content["scale"]),
                codes,
                int(content["min_token"]),
                content["horizon"],
                content["action_dim"],
                *ranges,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{where} is no FAST tokenizer of Longtake ({type(error).__name__}: {error}); expected what `save` "
                "writes, format version 1. Change `encoder.actions`."
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes one .json file. Raises DataError if it cannot be written."""
        from longtake.media.write import write_bytes

        write_bytes(Path(path), json.dumps(self.to_dict(), ensure_ascii=False).encode("utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> FastTokenizer:
        """Returns what `save` wrote. Raises ConfigError if it cannot be read."""
        try:
            content = json.loads(_read(Path(path)))
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON file ({error}). Change `encoder.actions.path`.") from error
        return cls.from_dict(content, str(path))

    def _coefficients_of(self, ids: Sequence[int], index: int, count: int) -> np.ndarray:
        wrong = [token for token in ids if not 0 <= token < self.vocab_size or self.bpe.id_to_token(token) is None]
        if wrong:
            raise BadSampleError(f"chunk {index} has the FAST token {wrong[0]}; expected 0 to {self.vocab_size - 1}")
        text = self.bpe.decode(list(ids), skip_special_tokens=False)
        found = np.array([ord(character) for character in text], np.int64) + self.min_token
        if len(found) != count or not np.isin(found, self.codes).all():
            damaged = "" if len(found) != count else ", some outside of the fitted range"
            raise BadSampleError(
                f"the {len(ids)} FAST tokens of chunk {index} hold {len(found)} coefficients{damaged}; expected {count}"
            )
        return found

    def _nearest(self, coefficients: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.codes, coefficients).clip(1, len(self.codes) - 1) if len(self.codes) > 1 else 0
        below, above = self.codes[np.maximum(place - 1, 0)], self.codes[place]
        return np.where(coefficients - below <= above - coefficients, below, above)

    def _other_columns(self, width: int) -> bool:
        fitted = self.action_dim if self.low is None else len(self.low)
        return fitted not in (None, width)


def training_chunks(actions: Iterable[np.ndarray], ratio_time: int) -> np.ndarray:
    """Returns the windows of latent frames of clips, [n ratio a], as `FastActionsEncoder` cuts them.

    Args:
        actions: [t a] of each clip from a causal start on; frames beyond 1 + k * ratio are left out.
        ratio_time: pixel frames a latent frame.
    """
    windows = [
        latent_windows(table[: 1 + (len(table) - 1) // ratio_time * ratio_time], ratio_time) for table in actions
    ]
    return np.concatenate(windows)


def latent_windows(actions: np.ndarray, ratio: int) -> np.ndarray:
    """Returns what belongs to each latent frame, [k ratio a]; the one frame of latent 0 is held for a whole window."""
    assert (len(actions) - 1) % ratio == 0, f"{len(actions)} frames are no causal clip at {ratio} a latent frame"
    held = np.repeat(actions[:1], ratio, axis=0)
    return np.concatenate([held[None], actions[1:].reshape(-1, ratio, actions.shape[-1])])


def _ranges(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns what becomes -1 and 1 in each column."""
    low, high = np.quantile(rows, 0.01, axis=0), np.quantile(rows, 0.99, axis=0)
    is_flat = high - low < _FLAT
    low, high = np.where(is_flat, rows.min(axis=0), low), np.where(is_flat, rows.max(axis=0), high)
    is_flat = high - low < _FLAT
    return np.where(is_flat, low - 1, low), np.where(is_flat, low + 1, high)


def _coefficients(chunks: np.ndarray, scale: float) -> np.ndarray:
    spectrum = np.einsum("kt,ntd->nkd", dct_matrix(chunks.shape[1]), chunks)
    return np.rint(scale * spectrum).reshape(len(chunks), -1)


def _text(codes: np.ndarray) -> str:
    return "".join(map(chr, codes.astype(np.int64).tolist()))


def _alphabet(count: int) -> list[str]:
    """Returns the byte symbols that characters 0 to count - 1 are written with."""
    needed = sorted({byte for code in range(count) for byte in chr(code).encode("utf-8")})
    return [_byte_symbols()[byte] for byte in needed]


@functools.lru_cache(maxsize=1)
def _byte_symbols() -> list[str]:
    """Returns GPT-2's printable character for each byte, as the library's byte level has it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _round_trips(bpe: Tokenizer, text: str) -> bool:
    return bpe.decode(bpe.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def _runs(codes: np.ndarray) -> list[list[int]]:
    """Returns ascending integers as [first, last] of each run without a gap."""
    breaks = np.flatnonzero(np.diff(codes) != 1)
    return [[int(a), int(b)] for a, b in zip(codes[[0, *(breaks + 1)]], codes[[*breaks, -1]], strict=True)]


def _load_bpe(content: str, where: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"{where} is no tokenizer.json ({error}). Change `encoder.actions.path`.") from error


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}). Change `encoder.actions.path`.") from error
