"""What a rollout carries from chunk to chunk: keys and values of a window, sinks, fast weights.

Values are never changed in place: a pass returns a new memory that shares what it did not touch. The branches of
guidance are stacked on the batch axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longtake.networks.layout import Slot


@dataclass(frozen=True)
class LayerMemory:
    """The memory of one layer.

    Attributes:
        slots: the committed slots whose keys are in the window, in chunk order.
        keys: keys of those slots after QK-norm, not rotated, [b m l heads hd]; None before the first commit.
        values: their values, as `keys`.
        sink_slots: the first slots of the video, where the mixer keeps sinks.
        sink_keys: their keys, as `keys`.
        sink_values: their values, as `keys`.
        fast: fast weights (and their momentum) by name, float32 or better, [b heads out in]; empty before the first
            commit, when they are still the learned initial ones.
    """

    slots: tuple[Slot, ...] = ()
    keys: Tensor | None = None
    values: Tensor | None = None
    sink_slots: tuple[Slot, ...] = ()
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None
    fast: dict[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerMemory:
        """Returns this memory with `function` applied to every tensor in it."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return {name: function(tensor) for name, tensor in value.items()} if isinstance(value, dict) else value

        return LayerMemory(**{entry.name: apply(getattr(self, entry.name)) for entry in dataclasses.fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor by name."""
        named = {name: getattr(self, name) for name in _TENSORS}
        named |= {f"fast.{name}": tensor for name, tensor in self.fast.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


_TENSORS = ("keys", "values", "sink_keys", "sink_values")


@dataclass(frozen=True)
class Memory:
    """The memory of a network: one `LayerMemory` a layer.

    Attributes:
        layers: in the order of the layers.
        committed: slots committed so far; the next one to commit is chunk `committed` of a rollout that began at 0.
    """

    layers: tuple[LayerMemory, ...]
    committed: int = 0

    @classmethod
    def empty(cls, num_layers: int) -> Memory:
        """Returns the memory at the beginning of a video."""
        return cls(tuple(LayerMemory() for _ in range(num_layers)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        """Returns this memory with `function` applied to every tensor in it."""
        return Memory(tuple(layer.map(function) for layer in self.layers), self.committed)

    def detach(self) -> Memory:
        """Returns this memory cut off from the graph that made it."""
        return self.map(lambda tensor: tensor.detach())

    def to(self, device: torch.device | str) -> Memory:
        """Returns this memory on another device."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def num_bytes(self) -> int:
        """Bytes that its tensors hold."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and plain numbers only, so that it can be saved and read back without running any code."""
        layers = [
            {
                "slots": [dataclasses.asdict(slot) for slot in layer.slots],
                "sink_slots": [dataclasses.asdict(slot) for slot in layer.sink_slots],
                "tensors": layer.tensors(),
            }
            for layer in self.layers
        ]
        return {"committed": self.committed, "layers": layers}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Memory:
        """Returns the memory that `state_dict` described."""
        layers = []
        for layer in state["layers"]:
            tensors = layer["tensors"]
            fast = {name.removeprefix("fast."): value for name, value in tensors.items() if name.startswith("fast.")}
            layers.append(
                LayerMemory(
                    slots=tuple(Slot(**slot) for slot in layer["slots"]),
                    sink_slots=tuple(Slot(**slot) for slot in layer["sink_slots"]),
                    fast=fast,
                    **{name: tensors.get(name) for name in _TENSORS},
                )
            )
        return cls(tuple(layers), state["committed"])
