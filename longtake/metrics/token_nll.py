"""Cross entropy of token models: four numbers that look alike and are not, always from float32 logits, in nats.

`nll_full_tf`        every token given all true tokens before it, also those of its own latent frame: the negative log
                     likelihood, the only code length of a causal model (full teacher forcing).
`nll_parallel`       all tokens of a latent frame at once, given true earlier frames: also a code length, of models that
                     predict a frame in parallel. Not defined for causal ones.
`ce_sampled_prefix`  the true token scored by a model that continues its own samples. No likelihood of any sequence: it
                     depends on temperature, top-p and seed, so it is a mean and a standard deviation over seeds. Logits
                     are scored before truncation.
`ce_greedy_rollout`  the same with the most probable token fed back in place of a sample.

The first token of a rollout is scored under a true prefix in all of them. 1 bit is ln 2 nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("nll_full_tf", "nll_parallel", "ce_sampled_prefix", "ce_greedy_rollout")
_MIN_SEEDS = 3


@torch.no_grad()
def token_nats(logits: Tensor, targets: Tensor, *, rows: int = 1024) -> Tensor:
    """Returns -log p(target) of each token in nats, float32 [...].

    Args:
        logits: of any float type, [... vocab]; `rows` of them at a time become float32.
        targets: int64 [...].
        rows: bounds the memory, rows x vocab x 4 bytes.
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    assert len(flat) == len(wanted), f"logits of {len(flat)} tokens and {len(wanted)} targets"
    parts = [
        F.cross_entropy(flat[i : i + rows].float(), wanted[i : i + rows], reduction="none")
        for i in range(0, len(flat), rows)
    ]
    return torch.cat(parts).reshape(targets.shape) if parts else torch.zeros(targets.shape)


def split_factors(tokens: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Returns the factors of tokens, the fastest first: token = f0 + sizes[0] * (f1 + sizes[1] * (...))."""
    factors = []
    for size in sizes:
        factors.append(tokens % size)
        tokens = tokens // size
    return factors


def factored_nats(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Returns -log p(target) of independent factors: the sum of their cross entropies, float32 [...].

    1xgpt's official figure for v1.x has two factors of 512, the low one first.

    Args:
        logits: of each factor, [... size], the fastest first.
        targets: int64 [...].
    """
    factors = split_factors(targets, [each.shape[-1] for each in logits])
    nats = [token_nats(each, factor) for each, factor in zip(logits, factors, strict=True)]
    return torch.stack(nats).sum(0)


def bits(nats: float) -> float:
    """Returns nats as bits."""
    return nats / math.log(2)


def bits_per_pixel(nats_per_token: float, num_tokens: int, num_frames: int, height: int, width: int) -> float:
    """Returns the code length of a clip over its pixels."""
    return bits(nats_per_token) * num_tokens / (num_frames * height * width)


@dataclass
class TokenScores:
    """Adds up the nats (and hits) of predicted tokens over batches.

    Attributes:
        name: one of `NAMES`, or of a baseline.
        first_lat: latent index of the first one that is scored, for the curves.
    """

    name: str
    first_lat: int = 0
    _sums: Tensor | None = field(default=None, repr=False)
    _hits: Tensor | None = field(default=None, repr=False)
    _count: int = 0
    _hit_count: int = 0

    def update(self, nats: Tensor, hits: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            nats: of the scored latents, [b v t h w].
            hits: True where the predicted token is the true one, bool [b v t h w]; or None.
        """
        summed = nats.detach().double().sum(0).cpu()
        self._sums = summed if self._sums is None else self._sums + summed
        self._count += len(nats)
        if hits is not None:
            right = hits.detach().double().sum(0).cpu()
            self._hits = right if self._hits is None else self._hits + right
            self._hit_count += len(hits)

    @property
    def mean(self) -> float:
        """Nats a token, over all that was added."""
        return float(self._means().mean())

    def metrics(self) -> dict[str, float]:
        """Returns `<name>` in nats, with bits a token, perplexity, bits a latent frame of a view, and accuracy."""
        nats = self.mean
        tokens_of_frame = self._means()[0, 0].numel()
        found = {
            self.name: nats,
            f"{self.name}_bits_per_token": bits(nats),
            f"{self.name}_perplexity": math.exp(nats) if nats < 700 else math.inf,
            f"{self.name}_bits_per_latent": bits(nats) * tokens_of_frame,
        }
        if self._hits is not None:
            found[f"{self.name}_accuracy"] = float(self._hits.mean()) / self._hit_count
        return found

    def per_latent(self) -> dict[int, float]:
        """Returns nats a token of each scored latent."""
        curve = self._means().mean(dim=(0, 2, 3)).tolist()
        return {self.first_lat + index: value for index, value in enumerate(curve)}

    def per_position(self) -> list[float]:
        """Returns nats a token at each place of the raster, over views and latents."""
        return self._means().mean(dim=(0, 1)).flatten().tolist()

    def _means(self) -> Tensor:
        assert self._sums is not None, f"{self.name} was computed on nothing"
        return self._sums / self._count


def over_seeds(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns `<name>_mean`, `<name>_std` (of the sample, n - 1) and `<name>_seeds` of one value a seed.

    Raises:
        ValueError: fewer than 3 seeds, which say nothing about spread.
    """
    if len(values) < _MIN_SEEDS:
        raise ValueError(f"{name} is given for {len(values)} seeds; expected {_MIN_SEEDS} or more")
    spread = torch.tensor(values, dtype=torch.float64)
    return {
        f"{name}_mean": float(spread.mean()),
        f"{name}_std": float(spread.std()),
        f"{name}_seeds": float(len(values)),
    }
