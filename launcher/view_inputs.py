"""What several views start from and are told: frames, texts, embeddings of texts, from files that are not trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.errors import BadSampleError, ConfigError, unknown_choice
from longtake.media.grid import fitted
from longtake.media.read import probe_video, read_video

EMBEDDINGS = (".safetensors", ".pt")
_PICKLES = (".pkl", ".pickle", ".npy", ".npz", ".joblib")
LAYOUTS = ("time", "vertical", "horizontal")
_MAX_TEXT_BYTES = 1 << 24


def is_text_file(value: str) -> bool:
    """Returns whether a prompt is the path of a file and no text."""
    return Path(value).suffix.lower() in (".txt", *EMBEDDINGS, *_PICKLES) and "\n" not in value


def read_prompt_lines(path: Path, views: Sequence[str], key: str) -> list[str]:
    """Returns a text for each view: the one line of a file, or its lines, one a view.

    Raises:
        ConfigError: it cannot be read, or has another number of lines.
    """
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key} {path} cannot be read ({reason}). Change `{key}`.") from error
    lines = [line for line in lines if line]
    if len(lines) not in (1, len(views)):
        raise ConfigError(
            f"{key} {path} has {len(lines)} lines; expected one for all views, or one for each of the {len(views)} "
            f"({', '.join(views)}). Change `{key}`."
        )
    return lines if len(lines) == len(views) else lines * len(views)


def text_of_views(
    prompt: str | None, names: Sequence[str], model: Any, *, default: str | None = None, key: str = "prompt"
) -> tuple[tuple[tuple[str, ...], ...] | None, Tensor | None]:
    """Returns the texts of each view, one a chunk, or the embeddings of one text a view.

    Args:
        prompt: a text, or the path of a file of texts or embeddings; None: `default`.
        names: of the views.
        model: what they are for.
        default: a text for weights that take any; None: no text.
        key: configuration key that holds the prompt, for messages.

    Raises:
        ConfigError: a file cannot be read, or does not fit the views or the weights.
    """
    if prompt is None:
        prompt = default if model.text_encoder is not None else None
        return (None if prompt is None else ((prompt,),) * len(names)), None
    if not is_text_file(prompt):
        return ((prompt,),) * len(names), None
    path = Path(prompt)
    if path.suffix.lower() != ".txt":
        return None, read_prompt_embeddings(path, len(names), key, getattr(model.network, "text", None))
    return tuple((line,) for line in read_prompt_lines(path, names, key)), None


def control_weight(value: Any) -> float | dict[str, float]:
    """Returns how much control counts, of all types or by type; None is 1.

    Raises:
        ConfigError: no number from 0 to 1, nor such numbers by type.
    """
    if value is None:
        return 1.0
    by_type = dict(value) if isinstance(value, Mapping) else {"": value}
    for kind, weight in by_type.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            what = f"control_weight{f' of {kind}' if kind else ''}"
            raise ConfigError(
                f"{what} is {weight!r}; expected a number from 0 to 1, or one for each type such as "
                "{depth: 1, labels: 0.5}. Change `control_weight`."
            )
    if not isinstance(value, Mapping):
        return float(value)
    return {str(kind): float(weight) for kind, weight in by_type.items()}


def read_prompt_embeddings(path: Path, views: int, key: str, text: Any) -> Tensor:
    """Returns the embeddings of one text a view, float32 [v l d].

    Args:
        path: .safetensors with one tensor, or .pt with one tensor, [1, v*l, d] or [v, l, d].
        views: number of views.
        key: configuration key that holds the path, for messages.
        text: the network's text embedding, which says what it takes; None: the network takes no text.

    Raises:
        ConfigError: a pickle, which could run code; a damaged file; another shape; or not what the network takes.
    """
    if path.suffix.lower() in _PICKLES:
        raise ConfigError(
            f"{key} is {path}, and files of that kind can run code when they are opened; expected .safetensors or .pt. "
            "Convert it where you trust it: torch.save(torch.as_tensor(embeddings), 'prompt.pt'), with embeddings as "
            f"it was loaded there. Change `{key}`."
        )
    try:
        tensor = _one_tensor(path)
    except Exception as error:  # damaged files make both readers raise whatever the damage leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{key} {path} cannot be read ({reason}); expected one tensor and nothing else in it. Change `{key}`."
        ) from error
    shape = tuple(tensor.shape)
    if len(shape) == 3 and shape[0] == 1 and shape[1] % views == 0:
        tensor = tensor[0].unflatten(0, (views, -1))
    if tensor.ndim != 3 or len(tensor) != views or not tensor.is_floating_point() or tensor.shape[1] == 0:
        raise ConfigError(
            f"{key} {path} holds {tensor.dtype} {list(shape)}; expected floating point [1, {views}*l, d], l rows a "
            f"view (512 x 1024 for T5). Change `{key}`."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"{key} {path} holds values that are not finite; expected numbers. Change `{key}`.")
    _check_embeddings(tensor, f"{key} {path}", key, text)
    return tensor.float()


def _check_embeddings(tensor: Tensor, where: str, key: str, text: Any) -> None:
    """Refuses embeddings [v l d] that the network does not take."""
    rows, width = tensor.shape[1:]
    if text is None or text.words is not None:
        taken = "words, and no embeddings: expected a text" if text is not None else "no text. Leave it out"
        raise ConfigError(f"{where} holds embeddings of texts, and these weights take {taken}. Change `{key}`.")
    if width != text.text_dim:
        raise ConfigError(
            f"{where} holds embeddings of {width} numbers a row; these weights take {text.text_dim}, those of the text "
            f"encoder that they were trained with. Change `{key}`."
        )
    if text.text_len is not None and rows > text.text_len:
        raise ConfigError(
            f"{where} holds {rows} rows a view; these weights take at most {text.text_len}. Change `{key}`."
        )


def _one_tensor(path: Path) -> Tensor:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        content = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, Tensor):
        found = f"{len(content)} entries" if isinstance(content, dict) else type(content).__name__
        raise TypeError(f"it holds {found}")
    return content


def start_frames(
    path: Path, count: int, size: tuple[int, int], *, key: str, first: int = 0, stride: int = 1
) -> np.ndarray:
    """Returns the frames that a view is given, uint8 [t h w c].

    Raises:
        ConfigError: the video is damaged or too short.
    """
    wanted = [first + stride * index for index in range(count)]
    try:
        there = probe_video(path).num_frames
        if wanted[-1] >= there:
            raise ConfigError(
                f"{key} is {path} with {there} frames; {count} are to be given (every {stride} from {first} on). "
                f"Change `{key}` or `num_conditional_frames`."
            )
        frames = read_video(path, frames=wanted)
    except BadSampleError as error:
        raise ConfigError(f"{error}; expected a video. Change `{key}`.") from error
    return frames if frames.shape[1:3] == size else fitted(frames, *size)


def split_views(frames: np.ndarray, views: int, layout: str) -> np.ndarray:
    """Returns the views [v t h w c] of one video [t h w c] that holds them all.

    Args:
        frames: of the video.
        views: how many it holds, in rig order.
        layout: "time" (one after another), "vertical" (one above the other) or "horizontal" (side by side).

    Raises:
        ConfigError: it does not divide into so many.
    """
    if layout not in LAYOUTS:
        raise unknown_choice("layout of views in a video", layout, LAYOUTS, "input_layout")
    axis = {"time": 0, "vertical": 1, "horizontal": 2}[layout]
    length = frames.shape[axis]
    if length % views:
        what = ("frames", "rows", "columns")[axis]
        raise ConfigError(
            f"the video has {length} {what}, which do not divide into {views} views (input_layout={layout}); expected "
            f"a multiple of {views}. Change `n_views` or `input_layout`."
        )
    return np.stack(np.split(frames, views, axis=axis))
