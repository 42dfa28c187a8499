"""Muon for the matrices of a network's blocks, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix. Its steps are scaled to the size of AdamW's (Liu et
al. 2025, arXiv 2502.16982), so that learning rates and weight decay of both mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from longtake.errors import ConfigError

HIDDEN = "hidden"  # key of a parameter group: matrices inside of a network's blocks


class MuonAdamW(Optimizer):
    """Takes parameter groups; those with `hidden: True` hold matrices that Muon updates, AdamW has the others.

    Args:
        params: groups of parameters.
        lr: of Muon.
        adamw_lr_scale: factor on `lr` for AdamW's groups.
        momentum: of Muon.
        newton_schulz_steps: iterations of the orthogonalisation.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of both; a group may have its own.

    Raises:
        ConfigError: there is no group for Muon, or a value makes no sense.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 8e-3,
        *,
        adamw_lr_scale: float = 0.25,
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        groups = [dict(group) for group in params]
        if not any(group.get(HIDDEN) for group in groups):
            raise ConfigError(
                "this model names no hidden matrices that Muon could update; expected a transformer with blocks. "
                "Change `optimizer` (for example optimizer=adamw)."
            )
        for name, value in (("lr", lr), ("adamw_lr_scale", adamw_lr_scale)):
            if not value > 0:
                raise ConfigError(f"optimizer.{name} is {value}; expected more than 0. Change `optimizer.{name}`.")
        if not 0 <= momentum < 1:
            raise ConfigError(
                f"optimizer.momentum is {momentum}; expected 0 or more and less than 1. Change `optimizer.momentum`."
            )
        for group in groups:
            group[HIDDEN] = bool(group.get(HIDDEN))
            group.setdefault("lr", lr if group[HIDDEN] else lr * adamw_lr_scale)
        # made once on parameters of their own: they fill in and check what a group of theirs needs
        muon = Muon(
            [torch.zeros(1, 1, requires_grad=True)],
            lr=lr,
            momentum=momentum,
            ns_steps=newton_schulz_steps,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = AdamW(
            [torch.zeros(1, requires_grad=True)], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        for group in groups:
            defaults = (muon if group[HIDDEN] else adamw).defaults
            group |= {name: value for name, value in defaults.items() if name not in group}
        self._parts: tuple[Optimizer, Optimizer] = (muon, adamw)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, hidden in zip(self._parts, (True, False), strict=True):
            part.param_groups = [group for group in self.param_groups if group[HIDDEN] == hidden]
            part.state = self.state
            part.step()
        return loss
