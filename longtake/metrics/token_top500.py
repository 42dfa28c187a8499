"""Cross entropy from the 500 best tokens only, as the 1X challenge's v2.0 takes submissions: (indices, values) a token.

The server's formula is not public. Two readings fit the format and both are computed, each under its own name:
`ce_top500_logits`    values are logits: a softmax over the tokens that are given.
`ce_top500_logprobs`  values are log probabilities of the full softmax.
A true token that is not among those given costs `floor` nats. By default that is, for logits, ln V (the uniform guess);
for log probabilities, what is left of the probability spread evenly over the tokens that are not given.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

K = 500
_LEAST = 1e-30  # log probabilities that add up to 1 leave nothing; rounding can leave less


def top_tokens(logits: Tensor, k: int = K, *, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Returns the best tokens, best first: indices int32 [... k] and their log probabilities float32 [... k].

    As values they serve both readings: a softmax over log probabilities is one over logits.

    Args:
        logits: of any float type, [... vocab]; `rows` of them at a time become float32.
        k: how many.
        rows: bounds the memory.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    indices, values = [], []
    for start in range(0, len(flat), rows):
        best = flat[start : start + rows].float().log_softmax(-1).topk(k, dim=-1)
        indices.append(best.indices.int())
        values.append(best.values)
    shape = (*logits.shape[:-1], k)
    return torch.cat(indices).reshape(shape), torch.cat(values).reshape(shape)


def top_of_product(low: Tensor, high: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """Returns the best tokens of two independent factors, without all their pairs.

    The pair of the i-th best low factor and the j-th best high one has at least (i + 1)(j + 1) - 1 pairs before it, so
    only pairs with (i + 1)(j + 1) <= k can be among the best k: 2,649 of 64,000 for k = 500 and 512 x 125.

    Args:
        low: log probabilities of the fast factor, [... a].
        high: of the slow factor, [... c]; token = low + a * high.
        k: how many.

    Returns:
        indices int32 [... k] and log probabilities float32 [... k], best first.
    """
    size = low.shape[-1]
    ordered_low, ordered_high = low.float().sort(-1, descending=True), high.float().sort(-1, descending=True)
    i, j = (torch.tensor(ranks, device=low.device) for ranks in _staircase(size, high.shape[-1], k))
    best = (ordered_low.values[..., i] + ordered_high.values[..., j]).topk(k, dim=-1)
    tokens_low = ordered_low.indices.gather(-1, i[best.indices])
    tokens_high = ordered_high.indices.gather(-1, j[best.indices])
    return (tokens_low + size * tokens_high).int(), best.values


def ce_top500_logits(
    indices: Tensor, values: Tensor, targets: Tensor, *, vocab_size: int, floor: float | None = None
) -> Tensor:
    """Returns nats of each token where values are logits, float32 [...].

    Args:
        indices: tokens that are given, [... k], all different.
        values: their logits, [... k].
        targets: true tokens, [...].
        vocab_size: of the tokenizer.
        floor: nats of a token that is not given; None: ln vocab_size.
    """
    log_probs = values.float().log_softmax(-1)
    return _scored(indices, log_probs, targets, torch.tensor(floor if floor is not None else math.log(vocab_size)))


def ce_top500_logprobs(
    indices: Tensor, values: Tensor, targets: Tensor, *, vocab_size: int, floor: float | None = None
) -> Tensor:
    """Returns nats of each token where values are log probabilities, float32 [...].

    Arguments as for `ce_top500_logits`; `floor` None spreads what is left of the probability over the other tokens.
    """
    k = values.shape[-1]
    if floor is not None:
        return _scored(indices, values.float(), targets, torch.tensor(floor))
    left = (1 - values.double().exp().sum(-1)).clamp(min=_LEAST)
    return _scored(indices, values.float(), targets, -(left / max(1, vocab_size - k)).log().float())


def hits(indices: Tensor, targets: Tensor) -> Tensor:
    """Returns whether the true token is among those given, bool [...]."""
    return (indices == targets.unsqueeze(-1)).any(-1)


def _scored(indices: Tensor, log_probs: Tensor, targets: Tensor, floor: Tensor) -> Tensor:
    is_target = indices == targets.unsqueeze(-1)
    found = -torch.where(is_target, log_probs, -torch.inf).amax(-1)
    return torch.where(is_target.any(-1), found, floor.to(found))


@lru_cache(maxsize=8)
def _staircase(num_low: int, num_high: int, k: int) -> tuple[list[int], list[int]]:
    assert num_low * num_high >= k, f"{num_low} x {num_high} tokens have no best {k}"
    pairs = [(i, j) for i in range(min(num_low, k)) for j in range(min(num_high, k // (i + 1)))]
    return [i for i, _ in pairs], [j for _, j in pairs]
