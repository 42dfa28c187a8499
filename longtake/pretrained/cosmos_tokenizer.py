"""Reads released Cosmos discrete video tokenizers into a `CosmosNetwork`, strictly.

The releases are TorchScript archives: `encoder.jit` (encoder, quant_conv, quantizer), `decoder.jit` (inverse quantiser,
post_quant_conv, decoder) and `autoencoder.jit` (both). Their tensors have the names that our network has, besides
constants of the wavelet and the quantiser, which are checked where they say something, and left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longtake.errors import ConfigError

logger = logging.getLogger("longtake")

_KEY = "encoder.video.path"
_CONSTANTS = re.compile(r"(^|\.)((un)?patcher3d\.(wavelets|_arange|patch_size_buffer)|quantizer\.\w+)$")
_SAMPLER = re.compile(r"^(encoder\.down|decoder\.up)\.(\d+)\.(?:down|up)sample\.(conv[123])\.")
_SHOWN = 12


def open_jit(path: str | Path, part: str) -> torch.jit.ScriptModule:
    """Returns the program in `<path>/<part>.jit`, on the CPU. Raises ConfigError where there is none.

    It is TorchScript: loading it runs no Python, and what it can do when called is what torch offers.
    """
    file = Path(path).expanduser() / f"{part}.jit"
    try:
        return torch.jit.load(str(file), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if file.is_file() else "there is no such file"
        raise ConfigError(
            f"{file} cannot be read as TorchScript ({reason}); expected the folder of a released tokenizer, with "
            f"encoder.jit and decoder.jit. Change `{_KEY}`."
        ) from error


def read_tokenizer(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a released tokenizer by their names in the network, constants included.

    Args:
        path: folder with `encoder.jit` and `decoder.jit`, or with `autoencoder.jit`; or a .safetensors or .pt file.

    Raises:
        ConfigError: nothing can be read there.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix != ".jit":
        return _read_file(folder)
    if folder.is_file():
        return dict(open_jit(folder.parent, folder.stem).state_dict())
    whole = (folder / "autoencoder.jit").is_file() and not (folder / "encoder.jit").is_file()
    parts = ("autoencoder",) if whole else ("encoder", "decoder")
    return {name: tensor for part in parts for name, tensor in open_jit(folder, part).state_dict().items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # zip, pickle, OS and format errors alike: the file is not what it should be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"no tensors can be read from {path} ({reason}); expected a .safetensors or .pt file, or the folder of a "
            f"released tokenizer. Change `{_KEY}`."
        ) from error


def find_legacy(tensors: Mapping[str, Tensor], path: str | Path) -> bool:
    """Returns whether the decoder doubles frames at its lowest resolution, as those trained before 2024-09 do.

    The names tell: a convolution over time after the lowest resolution, or after a later one.

    Raises:
        ConfigError: they do not tell.
    """
    levels = sorted({int(found[2]) for name in tensors if (found := re.match(r"(decoder\.up)\.(\d+)\.", name))})
    over_time = [level for level in levels if f"decoder.up.{level}.upsample.conv1.conv3d.weight" in tensors]
    if len(over_time) > 1:
        raise ConfigError(
            f"{path} has convolutions over time at each of the resolutions {over_time} of the decoder, so its names do "
            "not tell which of them it uses. Say `encoder.video.legacy=true` (trained before 2024-09) or `false`."
        )
    return bool(over_time) and over_time[0] == levels[-1]


def fit(network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Puts the tensors of a release into a network of the same sizes: all of them, and nothing else.

    Raises:
        ConfigError: a tensor is missing, is left over or has another shape, by name; or other quantiser levels.
    """
    own = network.state_dict()
    _check_levels(network, tensors, path)
    given = {name: tensor for name, tensor in tensors.items() if not _CONSTANTS.search(name)}
    unused = _unused_samplers(given, own)
    if unused:
        logger.info("%s: %d tensors of resolutions that stay as they are were left out", path, len(unused))
    given = {name: tensor for name, tensor in given.items() if name not in unused}
    problems = {
        "missing": sorted(own.keys() - given.keys()),
        "left over": sorted(given.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
            for name in sorted(own.keys() & given.keys())
            if own[name].shape != given[name].shape
        ],
    }
    if any(problems.values()):
        raise ConfigError(
            f"{path} does not fit this tokenizer. {' '.join(_named(k, v) for k, v in problems.items() if v)} Expected "
            "the release that the settings describe: change `encoder/video`, or `encoder.video.ratio_time`, "
            f"`ratio_space`, `patch_size`, `z_channels`, `legacy`, or `{_KEY}`."
        )
    network.load_state_dict({name: tensor.float() for name, tensor in given.items()})


def _check_levels(network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    expected = list(network.quantizer.levels)  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if name.endswith("quantizer._levels") and tensor.flatten().tolist() != expected:
            raise ConfigError(
                f"{path} quantises to the levels {tensor.flatten().tolist()}, the settings say {expected}. Change "
                "`encoder.video.levels`."
            )


def _unused_samplers(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> set[str]:
    """Returns tensors that the older code made for every resolution, also where nothing is halved or doubled.

    Only if the file has all three convolutions at every resolution: else a tensor too many means a wrong setting.
    """
    last = max((int(match[1]) for name in given if (match := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    places = [("encoder.down", level) for level in range(last)] + [("decoder.up", level + 1) for level in range(last)]
    found = {(match[1], int(match[2]), match[3]) for name in given if (match := _SAMPLER.match(name))}
    if any((*place, convolution) not in found for place in places for convolution in ("conv1", "conv2", "conv3")):
        return set()
    return {name for name in given if _SAMPLER.match(name) and name not in own}


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensors are {what}: {', '.join(names[:_SHOWN])}{more}."
