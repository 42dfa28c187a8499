"""Files of trained first stages: where they lie, and the network that one holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.pretrained.weights_file import build, read_header, read_tensors

SHIPPED = Path(__file__).resolve().parents[2] / "weights"

_KEY = "encoder.video.weights"
N = TypeVar("N", bound=nn.Module)


def find_weights(name: str) -> Path:
    """Returns the file of shipped weights, or of a path (as given, or below the project). Raises ConfigError."""
    given = Path(name).expanduser()
    tried = [given, SHIPPED.parent / given] if given.suffix else [SHIPPED / f"{name}.safetensors"]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.safetensors"))) or "none"
        raise ConfigError(
            f"no first stage {name!r}; expected the name of one in {SHIPPED} ({shipped}), or the path of a "
            f".safetensors file. Change `{_KEY}`."
        )
    return found


def load_network(weights: str, kind: str, network_class: type[N]) -> tuple[N, dict[str, Any]]:
    """Returns the network of a file with its weights, in float32, and the config node that builds it.

    Args:
        weights: name of a shipped file (without its ending), or a path.
        kind: what the file has to say that it is.
        network_class: what it has to build.

    Raises:
        ConfigError: there is no such file, it holds something else, or its tensors do not fit its own network.
    """
    path = find_weights(weights)
    header = read_header(path, _KEY)
    if header.get("kind") != kind:
        raise ConfigError(f"{path} holds a {header.get('kind')!r}; expected a {kind!r}. Change `{_KEY}`.")
    network = build(header.get("network"), key=_KEY)
    if not isinstance(network, network_class):
        raise ConfigError(
            f"{path} builds a {type(network).__name__}; expected a {network_class.__name__}. Change `{_KEY}`."
        )
    _fill(network, read_tensors(path, _KEY), path)
    return network, header["network"]


def _fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own = network.state_dict()
    wrong = [
        name
        for name in sorted(own.keys() | tensors.keys())
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"{path} does not fit the network that it describes in {len(wrong)} tensors, the first of them "
            f"{wrong[0]!r}; expected a file as it was exported. Change `{_KEY}`."
        )
    network.load_state_dict({name: value.float() for name, value in tensors.items()})
