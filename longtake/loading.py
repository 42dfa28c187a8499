"""Finds and reads what a run left behind: its folder, its exported weights, or one of its checkpoints."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.generate import VideoModel
from longtake.generate_diffusion import DiffusionModel
from longtake.generate_tokens import TokenModel
from longtake.model_spec import DiffusionSpec, ModelSpec, TokenSpec, read_spec
from longtake.pretrained.weights_file import build, check_targets, read_header, read_tensors

WEIGHTS = "weights.safetensors"
CHECKPOINTS = "checkpoints"


def load(
    path: str | Path,
    trust: Sequence[str] = (),
    device: str | torch.device = "cpu",
    *,
    encoder: Mapping[str, Any] | None = None,
) -> VideoModel:
    """Returns the model of a run folder, a .safetensors file that training exported, or a .ckpt; ready to generate.

    Args:
        path: of one of these.
        trust: packages whose classes the file may name, besides longtake itself.
        device: where to put it.
        encoder: config nodes {"video": ..., "text": ...} to take instead of those in the file, which know no folders.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it names something that it may not.
    """
    file = find_weights(path)
    spec, tensors = _read(file, trust)
    if encoder is not None:
        given = {name: node for name, node in encoder.items() if node}
        spec = dataclasses.replace(spec, encoder={**spec.encoder, **given})
    _check(spec, trust)
    network = build(spec.network, trust)
    if not isinstance(network, nn.Module):
        raise _no_part(file, "network", network)
    _fill(network, tensors, file)
    encoders = {name: build(node, trust) for name, node in spec.encoder.items() if node}
    model = _model(spec, network, encoders, trust, file)
    found = None if model.video_encoder is None else model.video_encoder.fingerprint
    if None not in (found, spec.encoder_fingerprint) and found != spec.encoder_fingerprint:
        raise ConfigError(
            f"{file} was trained on the codes of encoder {spec.encoder_fingerprint}, here is encoder {found}; expected "
            "the same weights of the first stage. Take the ones of that training, or other weights (`ckpt`)."
        )
    return model.to(device)


def _model(spec: ModelSpec, network: Any, encoders: dict[str, Any], trust: Sequence[str], file: Path) -> VideoModel:
    rollout = build(spec.rollout, trust)
    if not hasattr(rollout, "kind"):
        raise _no_part(file, "rollout", rollout)
    if isinstance(spec, DiffusionSpec):
        solver = build(spec.solver, trust)
        if not hasattr(solver, "begin"):
            raise _no_part(file, "solver", solver)
        if not hasattr(encoders.get("video"), "decode_stream"):
            raise _no_part(file, "encoder.video", encoders.get("video"))
        return DiffusionModel(spec, network, encoders, rollout, solver)
    assert isinstance(spec, TokenSpec), f"{type(spec)} is no known kind of model"
    _check_vocabulary(spec, encoders)
    return TokenModel(spec, network, encoders, rollout)


def _no_part(file: Path, name: str, found: Any) -> ConfigError:
    return ConfigError(
        f"{file} describes as its {name} {'nothing' if found is None else f'a {type(found).__name__}'}, with which "
        "nothing can be rolled out; expected a file that training exported. Change `ckpt`."
    )


def _check_vocabulary(spec: TokenSpec, encoders: dict[str, Any]) -> None:
    geometry = encoders["video"].geometry if "video" in encoders else None
    if geometry is not None and geometry.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"the video tokenizer has {geometry.vocab_size} tokens, the weights were trained on {spec.vocab_size}; "
            "expected the same number. Change `encoder/video` or `ckpt`."
        )


def load_spec(path: str | Path, trust: Sequence[str] = ()) -> ModelSpec:
    """Returns what weights say of themselves, checked, without loading them. Raises ConfigError as `load` does."""
    return _spec(find_weights(path), trust)


def find_weights(path: str | Path) -> Path:
    """Returns the file that a path stands for: itself, or the newest weights of a run folder.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"ckpt is {path!r}; expected the path of a run folder or a weights file. Change `ckpt`.")
    path = Path(path)
    if path.is_dir():
        names = (WEIGHTS, f"{CHECKPOINTS}/best.ckpt", f"{CHECKPOINTS}/last.ckpt")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise ConfigError(
                f"{path} is no run folder with weights; expected one of {', '.join(names)} in it. Change `ckpt`."
            )
        return found
    if not path.is_file():
        raise ConfigError(
            f"no weights at {path}; expected a run folder, a .safetensors file or a .ckpt. Change `ckpt`."
        )
    if path.suffix not in (".safetensors", ".ckpt"):
        raise ConfigError(
            f"{path} ends in {path.suffix!r}; expected .safetensors or .ckpt (a pickle is never opened). Change `ckpt`."
        )
    return path


def _read(file: Path, trust: Sequence[str]) -> tuple[ModelSpec, dict[str, Tensor]]:
    if file.suffix == ".safetensors":
        return _spec(file, trust), read_tensors(file)
    content = _read_checkpoint(file)
    return _spec_of_checkpoint(content, file, trust), network_tensors(content["state_dict"])


def _spec(file: Path, trust: Sequence[str]) -> ModelSpec:
    if file.suffix == ".safetensors":
        return _checked_spec(read_header(file), file, trust)
    return _spec_of_checkpoint(_read_checkpoint(file), file, trust)


def _spec_of_checkpoint(content: dict[str, Any], file: Path, trust: Sequence[str]) -> ModelSpec:
    if not isinstance(content.get("spec"), dict):
        raise ConfigError(f"{file} is no checkpoint of a generative model (it has no spec). Change `ckpt`.")
    return _checked_spec(content["spec"], file, trust)


def _checked_spec(header: dict[str, Any], file: Path, trust: Sequence[str]) -> ModelSpec:
    """Returns what a header says. A class that may not be built is refused wherever it stands, also where none is."""
    check_targets(header, trust)
    return read_spec(header, str(file))


def _read_checkpoint(file: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint: tensors and plain containers; anything else is refused, never executed."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise TypeError("it holds no state_dict")
        return content
    except Exception as error:  # torch raises whatever the damage leads to: zip, pickle, runtime, OS and key errors
        raise ConfigError(
            f"{file} cannot be read as a checkpoint ({unread(error)}); expected a .ckpt of a run, whole and with "
            "nothing in it but tensors and plain values. Change `ckpt`."
        ) from error


def unread(error: Exception) -> str:
    """Returns why a checkpoint was not read; torch's own advice would be to run what it holds."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):
        return "it is none, or it holds an object that would have to be executed"
    if "_use_new_zipfile_serialization" in text:
        return "it is a bare pickle, or cut off"
    return text.splitlines()[0] if text else type(error).__name__


def network_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the network in a state dict: of a module's the average where there is one."""
    for prefix in ("ema_network.", "network."):
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(state)


def _check(spec: ModelSpec, trust: Sequence[str]) -> None:
    for node in spec.nodes.values():
        check_targets(node, trust)


def _fill(network: Any, tensors: dict[str, Tensor], file: Path) -> None:
    own = network.state_dict()
    wrong = [name for name in sorted(own.keys() | tensors.keys()) if _shape(own, name) != _shape(tensors, name)]
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{file} does not fit the network that it describes in {len(wrong)} tensors, the first of them {name!r}: "
            f"it holds {_shape(tensors, name)}, the network has {_shape(own, name)}. Export the weights again."
        )
    network.load_state_dict({name: value.to(own[name].dtype) for name, value in tensors.items()})


def _shape(state: dict[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "nothing"
