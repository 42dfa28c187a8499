"""Weights files: safetensors whose header says how to build what the tensors belong to. Reading one executes nothing.

The header's metadata holds `format`, `format_version` and `header`, plain JSON. A config in a file is code, since it
names what is to be built: `build` makes only classes that are defined in this package, or in packages that the user
trusts by name. The text of a name proves nothing; what counts is the class that it leads to.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longtake.errors import ConfigError, DataError

FORMAT = "longtake-weights"
FORMAT_VERSION = 1

_PACKAGE = "longtake"
_NEVER_BUILT = ("longtake.media",)  # readers and writers of files: building one would touch the disk
_NODE_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # what torch.save and pickle.dump write


def write_weights(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a weights file that is seen whole or not at all.

    Args:
        path: the file; its folder is made.
        tensors: by name; they may lie on any device.
        header: plain JSON: what builds the model, and what is known about its training.

    Raises:
        DataError: the file cannot be written (the disk is full, no permission); nothing is left behind.
    """
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "header": json.dumps(header, allow_nan=False)}
    # Copies: safetensors refuses tensors that share memory, as tied weights and views do.
    layout = torch.contiguous_format
    plain = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in tensors.items()}
    content = save(plain, metadata)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error.strerror}). Free some space, or write elsewhere.") from error


def read_header(path: Path, key: str = "ckpt") -> dict[str, Any]:
    """Returns what a weights file says of itself.

    Args:
        path: the file.
        key: configuration key that named it, for messages.

    Raises:
        ConfigError: it is missing, damaged, a pickle, no weights file, or one of another format version.
    """
    with _opened(path, key) as file:
        return _header_of(file.metadata() or {}, path, key)


def read_tensors(path: Path, key: str = "ckpt") -> dict[str, Tensor]:
    """Returns the tensors of a weights file, on the CPU. Raises ConfigError as `read_header` does."""
    with _opened(path, key) as file:
        _header_of(file.metadata() or {}, path, key)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Returns 32 hex digits that name these weights in this configuration.

    Values count, not how they are stored: a tensor kept as float16 and the same numbers as float32 are equal.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu()
        values = (values.float() if values.is_floating_point() else values).contiguous()
        digest.update(f"\0{name}\0{list(values.shape)}\0".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def check_targets(node: Any, trust: Sequence[str] = (), key: str = "ckpt") -> None:
    """Checks every class that a config names, without building any.

    Args:
        node: mappings, lists and plain values.
        trust: packages whose classes it may name, besides this one.
        key: configuration key that named the file, for messages.

    Raises:
        ConfigError: it names something that is no class of these packages.
    """
    for target in _targets(node):
        _class_of(target, trust, key)


def build(node: Any, trust: Sequence[str] = (), key: str = "ckpt") -> Any:
    """Returns what a config from a file describes; anything but a mapping with `_target_` stays as it is.

    Args:
        node: as for `check_targets`; `_partial_: true` gives a function, `_recursive_: false` leaves inner nodes alone.
        trust: packages whose classes it may name, besides this one.
        key: configuration key that named the file, for messages.

    Raises:
        ConfigError: it names something that is no class of these packages, or arguments that the class does not take.
    """
    check_targets(node, trust, key)  # all of it first: nothing is built from a file that holds anything else
    return _built(node, trust, key)


def _built(node: Any, trust: Sequence[str], key: str) -> Any:
    if isinstance(node, Mapping):
        if "_target_" not in node:
            return {name: _built(value, trust, key) for name, value in node.items()}
        found = _class_of(node["_target_"], trust, key)
        arguments = {str(name): value for name, value in node.items() if name not in _NODE_KEYS}
        if node.get("_recursive_", True):
            arguments = {name: _built(value, trust, key) for name, value in arguments.items()}
        _check_arguments(found, arguments, bool(node.get("_partial_", False)), key)
        return functools.partial(found, **arguments) if node.get("_partial_", False) else _made(found, arguments, key)
    if isinstance(node, list | tuple):
        return [_built(value, trust, key) for value in node]
    return node


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _targets(value)


def _class_of(target: Any, trust: Iterable[str], key: str) -> type:
    """Returns the class that a name leads to. A module is imported only if it belongs to an allowed package."""
    allowed = (_PACKAGE, *trust)
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) >= 2 and all(part.isidentifier() for part in parts) and _inside(target, allowed):
        module, name = ".".join(parts[:-1]), parts[-1]
        try:
            found = vars(importlib.import_module(module)).get(name)
        except ImportError:
            found = None
        if inspect.isclass(found):
            home = found.__module__
            if _inside(home, allowed) and not _inside(home, _NEVER_BUILT):
                return found
    raise ConfigError(
        f"the weights file asks for {str(target)[:200]!r}; expected a class defined in {', '.join(allowed)}, and "
        f"nothing was executed. If you know where the file comes from, name the package in `trust`, or change `{key}`."
    )


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _made(found: type, arguments: Mapping[str, Any], key: str) -> Any:
    """Returns an object of a class. Raises ConfigError also for what its constructor stumbles over: values from a file
    are of any type."""
    try:
        return found(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"the weights file describes a {found.__name__} that cannot be built ({type(error).__name__}: {error}); "
            f"expected values of the types that it takes. Get the file again, or change `{key}`."
        ) from error


def _check_arguments(found: type, arguments: Mapping[str, Any], partial: bool, key: str) -> None:
    try:
        signature = inspect.signature(found)
        signature.bind_partial(**arguments) if partial else signature.bind(**arguments)
    except (TypeError, ValueError) as error:  # ValueError: a class whose constructor has no signature
        raise ConfigError(
            f"the weights file gives {found.__name__} other arguments than it takes ({error}); expected a file of this "
            f"version of the code. Change `{key}`."
        ) from error


@contextlib.contextmanager
def _opened(path: Path, key: str) -> Iterator[Any]:
    """Opens a safetensors file. Raises ConfigError for anything else; the content is never unpickled."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Change `{key}`.") from error
    if start.startswith(_PICKLE_STARTS) and start[8:] != b"{":  # else it is the length of a safetensors header
        raise ConfigError(
            f"{path} is a pickle, whatever its name says; expected safetensors. A pickle is never opened, since it "
            f"can run anything. Change `{key}`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors ({error}); expected a whole weights file. It may be cut off: get it "
            f"again, or change `{key}`."
        ) from error


def _header_of(metadata: Mapping[str, str], path: Path, key: str) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is a safetensors file without a header of this project; expected one that training exported. "
            f"Change `{key}`."
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ConfigError(
            f"{path} has format version {metadata.get('format_version')!r}; this code reads version {FORMAT_VERSION}. "
            f"Use the code that wrote it, or change `{key}`."
        )
    try:
        header = json.loads(metadata["header"])
        if not isinstance(header, dict):
            raise TypeError(f"it is a {type(header).__name__}")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"the header of {path} is damaged ({type(error).__name__}: {error}); expected plain JSON. Change `{key}`."
        ) from error
    return header
