"""From hidden states to tokens: one logit a code, or factors of it, independent or a chain that keeps the joint.

FSQ packs a code as digits, the first one fastest: index = d_0 + L_0 (d_1 + L_1 (d_2 + ...)). With levels 8 8 8 5 5 5
the 64,000 codes are also 512 x 125 (index % 512, index // 512). A head predicts

    full         64,000 logits
    factorised   p(a) p(b): 637 logits; the factors are independent given the hidden state
    chain        p(d_0) p(d_1 | d_0) ...: a small network a step that is told the digits before; any joint distribution

All scores are natural logarithms in float32, whatever the network computes in.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.errors import ConfigError

CHUNK_LOGITS = 1 << 24  # logits held at once where all 64,000 of a token are needed: 64 MiB in float32

Projection = Callable[[nn.Linear], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class TokenScores:
    """What tokens scored.

    Attributes:
        log_probs: log-probability of each target in nats, float32, 0 or less.
        z: squared logsumexp of the logits (summed over factors), for a z-loss; as `log_probs`.
    """

    log_probs: Tensor
    z: Tensor


class OutputHead(nn.Module):
    """Base of the heads.

    Args:
        dim: width of the hidden states.
        vocab_size: codes.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dim, self.vocab_size = dim, vocab_size

    def log_probs_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Returns the log-probability in nats of each target, float32 [...].

        Args:
            hidden: [... d].
            targets: codes, int64 [...].
        """
        return self.score(hidden, targets).log_probs

    def score(self, hidden: Tensor, targets: Tensor) -> TokenScores:
        """Returns what each target scored; never holds 64,000 logits of more than a chunk of tokens."""
        flat, codes = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        step = max(1, CHUNK_LOGITS // self.logits_held)
        parts = []
        for start in range(0, len(flat), step):
            part = (flat[start : start + step], codes[start : start + step])
            if len(flat) > step and torch.is_grad_enabled() and flat.requires_grad:
                parts.append(checkpoint(self._score, *part, use_reentrant=False))
            else:
                parts.append(self._score(*part))
        log_probs, z = (torch.cat(column).view(targets.shape) for column in zip(*parts, strict=True))
        return TokenScores(log_probs, z)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits of all codes (their joint log-probabilities, for factors), float32 [... vocab]."""
        return self.decoder(_plain)(hidden)

    def likeliest(self, hidden: Tensor) -> Tensor:
        """Returns the code of largest probability, int64 [...] for hidden states [... d]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        step = max(1, CHUNK_LOGITS // self.vocab_size)
        best = [self.logits(flat[start : start + step]).argmax(dim=-1) for start in range(0, len(flat), step)]
        return torch.cat(best).view(hidden.shape[:-1])

    def draw(self, hidden: Tensor, uniform: Tensor) -> Tensor:
        """Returns a code drawn from the whole distribution, int64 [...].

        Args:
            hidden: [... d].
            uniform: numbers in (0, 1), float64 [... n] with n = `num_uniforms`.
        """
        flat, numbers = hidden.reshape(-1, hidden.shape[-1]), uniform.reshape(-1, self.num_uniforms)
        step = max(1, CHUNK_LOGITS // self.vocab_size)
        drawn = [
            _drawn(self.logits(flat[start : start + step]), numbers[start : start + step, 0])
            for start in range(0, len(flat), step)
        ]
        return torch.cat(drawn).view(hidden.shape[:-1])

    @property
    def num_uniforms(self) -> int:
        """Random numbers that `draw` needs for a token."""
        return 1

    def factor_logits(self, hidden: Tensor) -> tuple[Tensor, ...] | None:
        """Returns logits of factors that are independent given the hidden state, the fastest first, or None."""
        return None

    @property
    @abstractmethod
    def logits_held(self) -> int:
        """Logits that scoring one token holds."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws the weights."""

    @abstractmethod
    def decoder(self, wrap: Projection) -> Callable[[Tensor], Tensor]:
        """Returns the function that `logits` is, its projection through `wrap` (packed weights)."""

    @abstractmethod
    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and squared logsumexp, both [n]."""


class FullHead(OutputHead):
    """One logit a code."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.reset_parameters()

    @property
    def logits_held(self) -> int:
        return self.vocab_size

    def reset_parameters(self) -> None:
        """Draws a normal of deviation dim^-0.5, cut at three deviations."""
        _truncated(self.output.weight)

    def decoder(self, wrap: Projection) -> Callable[[Tensor], Tensor]:
        project = wrap(self.output)
        return lambda hidden: _outside_autocast(project, hidden, self.output.weight.dtype)

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _picked(self.logits(hidden), targets)


class FactorisedHead(OutputHead):
    """Factors of the code, independent given the hidden state.

    Args:
        dim: width of the hidden states.
        vocab_size: codes.
        factors: sizes, the first one fastest; their product is `vocab_size`.

    Raises:
        ConfigError: it is not.
    """

    def __init__(self, dim: int, vocab_size: int, *, factors: Sequence[int] = (512, 125)) -> None:
        super().__init__(dim, vocab_size)
        self.factors = checked_factors(factors, vocab_size, "network.head.factors")
        self.output = nn.Linear(dim, sum(self.factors))
        self.reset_parameters()

    @property
    def logits_held(self) -> int:
        return sum(self.factors)

    def reset_parameters(self) -> None:
        """Draws as for the full head; no code is preferred at first."""
        _truncated(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def decoder(self, wrap: Projection) -> Callable[[Tensor], Tensor]:
        def joint(hidden: Tensor) -> Tensor:
            *before, last = (part.log_softmax(dim=-1) for part in self.factor_logits(hidden))
            for part in reversed(before):  # the first factor is the fastest, so it comes last in memory
                last = (last.unsqueeze(-1) + part.unsqueeze(-2)).flatten(-2)
            return last

        return joint

    def likeliest(self, hidden: Tensor) -> Tensor:
        return code_of([logits.argmax(dim=-1) for logits in self.factor_logits(hidden)], self.factors)

    @property
    def num_uniforms(self) -> int:
        return len(self.factors)

    def draw(self, hidden: Tensor, uniform: Tensor) -> Tensor:
        pairs = zip(self.factor_logits(hidden), uniform.unbind(-1), strict=True)
        return code_of([_drawn(logits, numbers) for logits, numbers in pairs], self.factors)

    def factor_logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Returns logits of the factors, the fastest first, float32 or better [... L_i]."""
        return _outside_autocast(self.output, hidden, self.output.weight.dtype).split(self.factors, dim=-1)

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        digits = digits_of(targets, self.factors)
        pairs = [_picked(logits, digit) for logits, digit in zip(self.factor_logits(hidden), digits, strict=True)]
        log_probs, z = zip(*pairs, strict=True)
        return torch.stack(log_probs).sum(dim=0), torch.stack(z).sum(dim=0)


class ChainHead(OutputHead):
    """Digits of the code one after another, each told the ones before: keeps their joint distribution.

    Step k is a hidden layer A_k h + sum of E_kj[d_j] over j < k, SiLU, and a projection to L_k logits.

    Args:
        dim: width of the hidden states.
        vocab_size: codes.
        factors: sizes of the digits, the first one fastest; their product is `vocab_size`.
        width: of the hidden layers.

    Raises:
        ConfigError: the product is another.
    """

    def __init__(
        self, dim: int, vocab_size: int, *, factors: Sequence[int] = (8, 8, 8, 5, 5, 5), width: int = 64
    ) -> None:
        super().__init__(dim, vocab_size)
        self.factors = checked_factors(factors, vocab_size, "network.head.factors")
        self.width = width
        self.hidden = nn.Linear(dim, len(self.factors) * width)
        # row (j, digit) of table k is E_kj[digit]; the rows of later digits are never read
        self.told = nn.ModuleList(nn.Embedding(sum(self.factors[:k]), width) for k in range(1, len(self.factors)))
        self.output = nn.ModuleList(nn.Linear(width, size) for size in self.factors)
        self.reset_parameters()

    @property
    def logits_held(self) -> int:
        return sum(self.factors) + (len(self.factors) + 1) * self.width

    def reset_parameters(self) -> None:
        """Draws hidden layers of unit scale; no digit is preferred at first."""
        _truncated(self.hidden.weight)
        nn.init.zeros_(self.hidden.bias)
        for table in self.told:
            nn.init.normal_(table.weight, std=0.5)  # type: ignore[arg-type]
        for linear in self.output:
            _truncated(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def decoder(self, wrap: Projection) -> Callable[[Tensor], Tensor]:
        return self._joint

    def _joint(self, hidden: Tensor) -> Tensor:
        """Runs every step on every prefix: 15,945 of them for 64,000 codes, so a few tokens at a time."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        step = max(1, CHUNK_LOGITS // (math.prod(self.factors[:-1]) * self.width))
        joint = [self._joint_of(flat[start : start + step]) for start in range(0, len(flat), step)]
        return torch.cat(joint).view(*hidden.shape[:-1], self.vocab_size)

    def _joint_of(self, hidden: Tensor) -> Tensor:
        states = self._states(hidden)
        joint = states.new_zeros(len(states), 1)
        for k in range(len(self.factors)):
            prefixes = torch.arange(joint.shape[1], device=hidden.device)
            told = self._told(k, digits_of(prefixes, self.factors[:k]))
            state = states[:, k, None] + (0 if told is None else told)
            step = self.output[k](F.silu(state)).log_softmax(dim=-1)  # [n prefixes L_k]
            joint = (joint.unsqueeze(1) + step.mT).flatten(1)  # the newest digit is the slowest
        return joint

    @property
    def num_uniforms(self) -> int:
        return len(self.factors)

    def draw(self, hidden: Tensor, uniform: Tensor) -> Tensor:
        states = self._states(hidden)
        digits: list[Tensor] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for k in range(len(self.factors)):
                told = self._told(k, digits)
                state = states[..., k, :] if told is None else states[..., k, :] + told
                digits.append(_drawn(self.output[k](F.silu(state)), uniform[..., k]))
        return code_of(digits, self.factors)

    def _states(self, hidden: Tensor) -> Tensor:
        """Returns A_k h of all steps, float32 or better, [n k width]."""
        states = _outside_autocast(self.hidden, hidden, self.hidden.weight.dtype)
        return states.unflatten(-1, (len(self.factors), self.width))

    def _told(self, k: int, digits: list[Tensor]) -> Tensor | None:
        if k == 0:
            return None
        offsets = [sum(self.factors[:j]) for j in range(k)]
        rows = torch.stack([digit + offset for digit, offset in zip(digits, offsets, strict=True)])
        return F.embedding(rows, self.told[k - 1].weight).sum(dim=0)  # type: ignore[arg-type]

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        digits = digits_of(targets, self.factors)
        states = self._states(hidden)
        log_probs, z = torch.zeros_like(states[:, 0, 0]), torch.zeros_like(states[:, 0, 0])
        with torch.autocast(hidden.device.type, enabled=False):
            for k, digit in enumerate(digits):
                told = self._told(k, digits[:k])
                state = states[:, k] if told is None else states[:, k] + told
                picked, squared = _picked(self.output[k](F.silu(state)), digit)
                log_probs, z = log_probs + picked, z + squared
        return log_probs, z


def digits_of(codes: Tensor, factors: Sequence[int]) -> list[Tensor]:
    """Returns the digits of codes, the fastest first, each shaped as `codes`."""
    digits = []
    for size in factors:
        digits.append(codes % size)
        codes = codes // size
    return digits


def code_of(digits: Sequence[Tensor], factors: Sequence[int]) -> Tensor:
    """Returns the codes of digits, the fastest first; undoes `digits_of`."""
    code = torch.zeros_like(digits[0])
    for digit, size in zip(reversed(digits), reversed(factors), strict=True):
        code = code * size + digit
    return code


def checked_factors(factors: Sequence[int], vocab_size: int, key: str) -> list[int]:
    """Returns the factors as a list.

    Raises:
        ConfigError: their product is not the vocabulary.
    """
    sizes = [int(size) for size in factors]
    if not sizes or min(sizes) < 1 or math.prod(sizes) != vocab_size:
        raise ConfigError(
            f"{key} is {sizes}, a product of {math.prod(sizes)}; expected factors of the vocabulary of {vocab_size}. "
            f"Change `{key}` or `network.vocab_size`."
        )
    return sizes


def _picked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    total = logits.logsumexp(dim=-1)
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - total, total.square()


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Returns a place in each row of logits [... k] by inversion of the distribution function, int64 [...]."""
    total = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    wanted = uniform.to(total).unsqueeze(-1) * total[..., -1:]
    return torch.searchsorted(total, wanted, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _outside_autocast(project: Callable[[Tensor], Tensor], hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns logits in float32 or better; float32 weights also multiply in float32 when the network runs in less."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = project(hidden.to(dtype))
    return logits if logits.dtype == torch.float64 else logits.float()


def _plain(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return linear


def _truncated(weight: Tensor) -> None:
    std = weight.shape[1] ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
