"""What a weights file says of itself: all that is needed to build the model again and to use it as it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, get_args

from longtake.errors import ConfigError
from longtake.rollout.plan import RolloutKind, TrainedFor

PRECISIONS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What every kind of model says. Plain data only: no object, no path of the machine that trained.

    Attributes:
        video: geometry of the training clips, `video_keys`.
        network: config node of the network.
        encoder: config nodes of the frozen encoders, {"video": ..., "text": ..., "actions": ...}; None or absent: none.
        rollout: config node of the default rollout.
        trained_for: what rollouts the weights are for.
        encoder_fingerprint: of the video encoder that made the latents or tokens; None: it is not known.
        num_context_frames: pixel frames that rollouts are given by default.
        data: what the training data was like: "name" (of the yaml in conf/data that has its pixels, or None),
            "action_names", "action_typical" (usual size of each column where it is not zero), "view_names".
        precision: of matmuls, as in training.
        seed: of the training run.
        step: optimiser steps behind these weights.
        is_average: whether they are the moving average.
        commit: of the code, if known.
    """

    kind: ClassVar[str]
    video_keys: ClassVar[tuple[str, ...]] = ("fps", "height", "width", "num_frames")

    video: dict[str, Any]
    network: dict[str, Any]
    encoder: dict[str, Any]
    rollout: dict[str, Any]
    trained_for: TrainedFor
    encoder_fingerprint: str | None
    num_context_frames: int
    data: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    seed: int = 0
    step: int = 0
    is_average: bool = False
    commit: str | None = None

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """Config nodes from which something is built, by name."""
        return {"network": self.network, "encoder": self.encoder, "rollout": self.rollout}

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the action columns; empty where the network takes none."""
        return tuple(self.data.get("action_names", ()))

    @property
    def action_typical(self) -> tuple[float, ...]:
        """Usual size of each action column where it is not zero."""
        return tuple(self.data.get("action_typical", ())) or (1.0,) * len(self.action_names)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON."""
        plain = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {"kind": self.kind, **plain, "trained_for": self.trained_for.to_dict()}


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec(ModelSpec):
    """A network that predicts velocities of latents.

    Attributes:
        solver: config node of the solver of its default rollout.
    """

    kind = "ar_diffusion"
    video_keys = (*ModelSpec.video_keys, "chunk_lat")

    solver: dict[str, Any]

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        return {**super().nodes, "solver": self.solver}


@dataclass(frozen=True, kw_only=True)
class TokenSpec(ModelSpec):
    """A network that predicts tokens.

    Attributes:
        vocab_size: tokens are 0 to vocab_size - 1.
        grid_lat: latent frames, rows and columns of a training clip.
    """

    kind = "ar_tokens"

    vocab_size: int
    grid_lat: list[int]


KINDS: dict[str, type[ModelSpec]] = {spec.kind: spec for spec in (DiffusionSpec, TokenSpec)}


def read_spec(given: Mapping[str, Any], where: str) -> ModelSpec:
    """Returns what `to_dict` described.

    Args:
        given: from a file.
        where: name of that file, for messages.

    Raises:
        ConfigError: it describes another kind of model, or is incomplete or of other types than it should be.
    """
    kind = KINDS.get(str(given.get("kind")))
    if kind is None:
        raise ConfigError(
            f"{where} holds a model of kind {given.get('kind')!r}; expected {' or '.join(KINDS)}. Change `ckpt`."
        )
    names = {entry.name for entry in dataclasses.fields(kind)}
    try:
        values = {name: value for name, value in given.items() if name in names}
        values["trained_for"] = TrainedFor.from_dict(given["trained_for"])
        spec = kind(**values)
        _check_values(spec)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"{where} does not say what is needed to rebuild its model ({type(error).__name__}: {error}); expected "
            "a file that training exported. Change `ckpt`."
        ) from error
    return spec


def _check_values(spec: ModelSpec) -> None:
    """Raises KeyError, TypeError or ValueError where a value is not of the type that a model needs."""
    parts: dict[str, Any] = {"video": spec.video, "data": spec.data, **spec.nodes}
    wrong = [name for name, part in parts.items() if not isinstance(part, dict)]
    if wrong:
        raise TypeError(f"{', '.join(wrong)} should be a mapping")
    missing = [key for key in spec.video_keys if key not in spec.video]
    if missing:
        raise KeyError(f"video.{missing[0]}")
    trained = spec.trained_for
    names, typical = spec.data.get("action_names") or [], spec.data.get("action_typical") or []
    fits = {f"{name}._target_": "_target_" in node for name, node in spec.nodes.items() if name != "encoder"}
    fits |= {f"encoder.{name}": isinstance(node, dict | None) for name, node in spec.encoder.items()}
    fits |= {f"video.{key}": _is_whole(spec.video[key], 1) for key in spec.video_keys if key != "fps"}
    fits |= {
        "video.fps": Fraction(str(spec.video["fps"])) > 0,
        "num_context_frames": _is_whole(spec.num_context_frames, 0),
        "trained_for.rollouts": bool(trained.rollouts) and set(trained.rollouts) <= set(get_args(RolloutKind)),
        "trained_for.chunk_lat": _is_whole(trained.chunk_lat, 1),
        "trained_for.ratio": _is_whole(trained.ratio, 1),
        "trained_for.starts_lat": all(_is_whole(lat, 0) for lat in trained.starts_lat),
        "data.action_names": _is_list(names, str),
        "data.action_typical": _is_list(typical, int | float) and len(typical) in (0, len(names)),
        "precision": spec.precision in PRECISIONS,
    }
    if isinstance(spec, TokenSpec):
        fits["vocab_size"] = _is_whole(spec.vocab_size, 1)
        fits["grid_lat"] = len(spec.grid_lat) == 3 and all(_is_whole(size, 1) for size in spec.grid_lat)
    wrong = [name for name, it_does in fits.items() if not it_does]
    if wrong:
        raise ValueError(f"what it says of {', '.join(wrong)}")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def without_folders(node: Any) -> Any:
    """Returns a config with paths cut to the names of files: where something lies on one machine is nobody else's."""
    if isinstance(node, Mapping):
        return {str(name): without_folders(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_folders(value) for value in node]
    if isinstance(node, str) and ("/" in node or "\\" in node):
        return node.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return node
