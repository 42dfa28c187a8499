"""What modules with one network and a moving average of its weights have in common."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import BaseModule, built, read_weights
from longtake.errors import ConfigError
from longtake.loading import network_tensors

logger = logging.getLogger("longtake")


class AveragedModule(BaseModule):
    """A network, and its average where the EMA callback wants one.

    Args:
        network: config node of the network; it is built in `configure_model`.
        seed: of the weights and of every draw.
        **kwargs: optimiser and schedule, as for `BaseModule`.

    Attributes:
        network: what is trained.
        ema_network: its average; None where none is wanted.
        wants_ema: set by the EMA callback before `configure_model`.
        ema_updates: updates of the average so far.
    """

    def __init__(self, *, network: Mapping[str, Any], seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network_node, self.seed = network, seed
        self.network: Any = None
        self.ema_network: Any = None
        self.wants_ema, self.ema_updates = False, 0

    def configure_model(self) -> None:
        """Builds what is missing: the network, and its average where one is wanted."""
        if self.network is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)  # the weights depend on the seed and on nothing that was drawn before
                self.network = built(self.network_node)
            assert isinstance(self.network, nn.Module), f"{type(self.network)} is no network"
        if self.wants_ema and self.ema_network is None:
            self.ema_network = copy.deepcopy(self.network).requires_grad_(False)

    @property
    def eval_network(self) -> Any:
        """The network of validation, rollouts and export: the average once it was updated."""
        network = self.ema_network if self.ema_network is not None and self.ema_updates > 0 else self.network
        assert network is not None, "configure_model comes first"
        return network

    @property
    def exports_average(self) -> bool:
        """Whether the weights that are exported are the average."""
        return self.eval_network is self.ema_network

    def export_tensors(self) -> dict[str, Tensor]:
        """Returns the weights that an exported file holds: those of `eval_network`."""
        return {name: tensor.detach() for name, tensor in self.eval_network.state_dict().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ema_updates"] = self.ema_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ema_updates = checkpoint["ema_updates"]

    def load_released(self, given: dict[str, Tensor], path: Path) -> bool:
        """Takes released weights with names of their own; returns whether `given` were such."""
        return False

    def initialise_from(self, path: str | Path) -> None:
        """Takes the network's weights from an exported file, a checkpoint, or released weights.

        What a pretrained network lacks (`new_parameter_names`) keeps its initial values where the file has none.

        Raises:
            ConfigError: the file cannot be read, or its weights do not fit; what differs is named.
        """
        self.configure_model()
        assert self.network is not None
        given, own = network_tensors(read_weights(Path(path))), self.network.state_dict()
        if given.keys() & own.keys() != own.keys() and self.load_released(given, Path(path)):
            return
        new = getattr(self.network, "new_parameter_names", set[str])()
        kept = (own.keys() - given.keys()) & new
        names = sorted((own.keys() | given.keys()) - kept)
        wrong = [name for name in names if _shape(own, name) != _shape(given, name)]
        if wrong:
            name = wrong[0]
            raise ConfigError(
                f"{path} does not fit this network in {len(wrong)} tensors: it holds {_shape(given, name)} for "
                f"{name!r}, the network has {_shape(own, name)}. Change `init_from` or `network`."
            )
        self.network.load_state_dict({**own, **given})
        if kept and hasattr(self.network, "begin_new"):
            self.network.begin_new(kept)
        if kept:
            logger.info("%s: %d tensors keep their initial values (not in the file)", path, len(kept))


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "nothing"
