"""A network of a few lines that obeys the contract of the real ones: every slot's velocity is a simple function of its
own latents, noise level, text and actions, and of the slots that its layout lets it see, in the pass or in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.networks.layout import ChunkLayout, Grid
from longtake.networks.memory import LayerMemory, Memory
from longtake.objectives.flow_matching import noised
from longtake.rollout.solvers import Schedule
from longtake.types import Conditions


class Forced:
    """A solver that goes to the noise level `sigma` of the true chunk, and then to the true chunk, in two steps."""

    def __init__(self, latents: Tensor, noises: list[Tensor], sigma: float) -> None:
        self.schedule = Schedule((1.0, sigma, 0.0), (1.0, sigma))
        self.latents, self.noises = latents, noises
        self.sigma = torch.tensor(sigma, dtype=latents.dtype)
        self.chunk, self.index = -1, 0

    def begin(self, num_steps: int | None) -> Forced:
        return self

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        self.chunk += self.index == 0
        self.index = 1 - self.index
        frames = x.shape[2]
        truth = self.latents[:, :, frames * self.chunk : frames * (self.chunk + 1)]
        return noised(truth, self.noises[self.chunk], self.sigma) if self.index else truth


class StandIn:
    """Counts its calls in `calls` as (number of slots, batch size) and keeps what it was told last."""

    streams = True

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.sigmas: list[Tensor] = []
        self.xs: list[Tensor] = []
        self.layouts: list[ChunkLayout] = []

    def grid(self, shape: tuple[int, ...]) -> Grid:
        views, frames, _, height, width = shape[-5:]
        return Grid(views, frames, height // 2, width // 2)

    def empty_memory(self) -> Memory:
        return Memory.empty(1)

    def __call__(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, layout: ChunkLayout, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        self.calls.append((x.shape[1], len(x)))
        self.sigmas.append(sigma)
        self.xs.append(x)
        self.layouts.append(layout)
        level = sigma[..., None, None, None].expand(*x.shape[:4], 1, 1, 1)
        told = self._told(x, conditions)
        feature = (x * (1 - level)).mean(dim=(2, 3, 5, 6)) + told[..., None]  # [b s c]
        kept = memory.layers[0] if memory is not None else LayerMemory()
        outputs = []
        for index, slot in enumerate(layout.slots):
            available = [*kept.slots, *layout.slots[:index]]
            features = [kept.keys[:, i, 0, 0] for i in range(len(kept.slots))] if kept.keys is not None else []
            features += [feature[:, i] for i in range(index)]
            seen = feature[:, index] * 0.1
            for other in layout.visible(index, available):
                seen = seen + features[other] / (1 + slot.chunk - available[other].chunk)
            own = torch.tanh(x[:, index]) * (0.5 + level[:, index]) - 0.3 * x[:, index]
            outputs.append(own + 0.2 * seen[:, None, None, :, None, None] + 0.01 * slot.start_lat)
        return torch.stack(outputs, dim=1), self._after(feature, layout, memory)

    def _told(self, x: Tensor, conditions: Conditions) -> Tensor:
        told = x.new_zeros(x.shape[:2])
        if conditions.text_ids is not None:
            mask = conditions.text_mask if conditions.text_mask is not None else torch.ones_like(conditions.text_ids)
            told = told + (conditions.text_ids * mask).sum(dim=(1, 2))[:, None].to(x.dtype) * 0.1
        if conditions.actions is not None:
            actions = conditions.actions
            if conditions.actions_mask is not None:
                actions = actions * conditions.actions_mask[..., None]
            told = told + actions.to(x.dtype).mean(dim=(2, 3))
        return told

    def _after(self, feature: Tensor, layout: ChunkLayout, memory: Memory | None) -> Memory | None:
        seen = [index for index, slot in enumerate(layout.slots) if slot.seen]
        if memory is None or not seen:
            return memory
        layer = memory.layers[0]
        new = feature[:, seen][:, :, None, None]
        keys = new if layer.keys is None else torch.cat([layer.keys, new], dim=1)
        slots = (*layer.slots, *(layout.slots[index] for index in seen))
        return Memory((LayerMemory(slots=slots, keys=keys, values=keys),), memory.committed + len(seen))
