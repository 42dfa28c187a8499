"""What a weights file says of itself: all that is needed to build the model again and to use it as it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longtake.errors import ConfigError
from longtake.rollout.plan import TrainedFor

KIND = "ar_diffusion"
PRECISIONS = ("float32", "bfloat16", "float16", "float64")
VIDEO_KEYS = ("fps", "height", "width", "num_frames", "chunk_lat")


@dataclass(frozen=True)
class ModelSpec:
    """Plain data only: no object, no path of the machine that trained.

    Attributes:
        video: geometry of the training clips: fps, height, width, num_frames, chunk_lat.
        network: config node of the network.
        encoder: config nodes of the frozen encoders, {"video": ..., "text": ... or None}.
        rollout: config node of the default rollout.
        solver: config node of its solver.
        trained_for: what rollouts the weights are for.
        encoder_fingerprint: of the video encoder that made the latents.
        num_context_frames: pixel frames that rollouts are given by default.
        data: what the training data was like: "name" (of the yaml in conf/data that has its pixels, or None),
            "action_names", "action_typical" (usual size of each column where it is not zero), "view_names".
        precision: of matmuls, as in training.
        seed: of the training run.
        step: optimiser steps behind these weights.
        is_average: whether they are the moving average.
        commit: of the code, if known.
    """

    video: dict[str, Any]
    network: dict[str, Any]
    encoder: dict[str, Any]
    rollout: dict[str, Any]
    solver: dict[str, Any]
    trained_for: TrainedFor
    encoder_fingerprint: str
    num_context_frames: int
    data: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    seed: int = 0
    step: int = 0
    is_average: bool = False
    commit: str | None = None

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
        return {"kind": KIND, **plain, "trained_for": self.trained_for.to_dict()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str) -> ModelSpec:
        """Returns what `to_dict` described.

        Args:
            given: from a file.
            where: name of that file, for messages.

        Raises:
            ConfigError: it describes another kind of model, or is incomplete or of other types than it should be.
        """
        if given.get("kind") != KIND:
            raise ConfigError(f"{where} holds a model of kind {given.get('kind')!r}; expected {KIND!r}. Change `ckpt`.")
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        try:
            values = {name: value for name, value in given.items() if name in fields}
            values["trained_for"] = TrainedFor.from_dict(given["trained_for"])
            spec = cls(**values)
            nodes = (spec.video, spec.network, spec.encoder, spec.rollout, spec.solver, spec.data)
            if not all(isinstance(node, dict) for node in nodes) or spec.precision not in PRECISIONS:
                raise TypeError("a node is no mapping, or the precision is unknown")
            missing = [key for key in VIDEO_KEYS if key not in spec.video]
            if missing:
                raise KeyError(f"video.{missing[0]}")
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where} does not say what is needed to rebuild its model ({type(error).__name__}: {error}); expected "
                "a file that training exported. Change `ckpt`."
            ) from error
        return spec


def without_folders(node: Any) -> Any:
    """Returns a config with paths cut to the names of files: where something lies on one machine is nobody else's."""
    if isinstance(node, Mapping):
        return {str(name): without_folders(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_folders(value) for value in node]
    if isinstance(node, str) and ("/" in node or "\\" in node):
        return node.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return node
