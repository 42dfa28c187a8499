"""Writes folders in the 1X challenge's formats from tokenised clips: real input for tests and for other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.sources.onex_format import OnexClip
from datamodules.sources.onex_v1 import ACTIONS
from datamodules.sources.onex_v2 import FOLDERS, RATIO_TIME
from longtake.errors import ConfigError
from longtake.media.write import write_bytes

Layout = Literal["flat", "folders"]


def write_onex_v2(
    folder: Path, clips: Iterable[OnexClip], *, layout: Layout = "flat", clips_per_shard: int = 4096, hz: int = 30
) -> int:
    """Writes clips as a v2.0 folder, shard by shard, `metadata.json` last; returns the number of shards.

    Args:
        folder: must not exist or be empty.
        clips: with states; all of one grid and as many frames as its latent frames are made of.
        layout: "flat" as val, "folders" as train.
        clips_per_shard: clips of a shard; the last one has what is left.
        hz: frames a second.

    Raises:
        ConfigError: the folder holds something, or there is no clip.
        DataError: a file cannot be written.
        ValueError: clips that differ in shape, or have no states.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; expected a new folder. Change `output`.")
    shard: list[OnexClip] = []
    sizes: list[int] = []
    for clip in clips:
        shard.append(clip)
        if len(shard) == clips_per_shard:
            sizes.append(_write_clips(folder, len(sizes), shard, layout))
            shard = []
    if shard:
        sizes.append(_write_clips(folder, len(sizes), shard, layout))
    if not sizes:
        raise ConfigError("there is no clip to write; expected at least one. Change `input`.")
    head = {"num_shards": len(sizes), "query": "", "hz": hz, "num_images": sum(sizes)}
    write_bytes(_place(folder, "metadata", "metadata.json", layout), _json(head))
    return len(sizes)


def write_v2_shard(
    folder: Path, number: int, tokens: np.ndarray, segments: np.ndarray, states: np.ndarray, *, layout: Layout = "flat"
) -> None:
    """Writes one shard of a v2.0 folder.

    Args:
        folder: of the split.
        number: of the shard.
        tokens: integers [clips t h w]; the last clip may be partial.
        segments: integers [n], the recording of each frame.
        states: float [n s].
        layout: as for `write_onex_v2`.

    Raises:
        DataError: a file cannot be written.
        ValueError: the number of frames fits neither the clips nor the states.
    """
    length = 1 + (tokens.shape[1] - 1) * RATIO_TIME
    n = len(segments)
    if math.ceil(n / length) != len(tokens) or len(states) != n:
        raise ValueError(f"{len(tokens)} clips of {length} frames, {n} segment ids and {len(states)} states differ")
    for kind, content in (
        ("video", np.ascontiguousarray(tokens, np.int32)),
        ("segment_idx", np.ascontiguousarray(segments, np.int32)),
        ("states", np.ascontiguousarray(states, np.float32)),
    ):
        write_bytes(_place(folder, kind, f"{kind}_{number}.bin", layout), content.tobytes())
    write_bytes(_place(folder, "metadata", f"metadata_{number}.json", layout), _json({"shard_num_frames": n}))


def write_onex_v1(
    folder: Path,
    tokens: np.ndarray,
    segments: np.ndarray,
    actions: Mapping[str, np.ndarray],
    *,
    token_dtype: str = "uint32",
    hz: int = 30,
) -> None:
    """Writes frames as a v1.1 folder.

    Args:
        folder: of the split.
        tokens: integers [n s s].
        segments: integers [n].
        actions: float [n width] for each name in `onex_v1.ACTIONS`.
        token_dtype: of the file.
        hz: frames a second.

    Raises:
        DataError: a file cannot be written.
        ValueError: shapes that do not fit each other.
    """
    n = len(tokens)
    wrong = [name for name, width in ACTIONS.items() if name not in actions or actions[name].shape != (n, width)]
    if tokens.ndim != 3 or tokens.shape[1] != tokens.shape[2] or len(segments) != n or wrong:
        raise ValueError(f"tokens {tokens.shape}, {len(segments)} segment ids, actions that do not fit: {wrong}")
    write_bytes(folder / "video.bin", np.ascontiguousarray(tokens, token_dtype).tobytes())
    write_bytes(folder / "segment_ids.bin", np.ascontiguousarray(segments, np.int32).tobytes())
    for name in ACTIONS:
        content = np.ascontiguousarray(actions[name], np.float32).tobytes()
        write_bytes(folder / "actions" / f"{name}.bin", content)
    head = {"num_images": n, "s": tokens.shape[1], "token_dtype": token_dtype, "hz": hz}
    write_bytes(folder / "metadata.json", _json(head))


def _write_clips(folder: Path, number: int, clips: list[OnexClip], layout: Layout) -> int:
    """Writes whole clips as a shard; returns its pixel frames."""
    length = 1 + (clips[0].tokens.shape[0] - 1) * RATIO_TIME
    states = [clip.states for clip in clips if clip.states is not None and len(clip.states) == length]
    if len(states) != len(clips):
        raise ValueError(f"{len(clips) - len(states)} of {len(clips)} clips have no states for {length} frames")
    tokens = np.stack([clip.tokens for clip in clips])
    segments = np.repeat([clip.segment for clip in clips], length)
    write_v2_shard(folder, number, tokens, segments, np.concatenate(states), layout=layout)
    return len(segments)


def _place(folder: Path, kind: str, name: str, layout: Layout) -> Path:
    return folder / name if layout == "flat" else folder / FOLDERS[kind] / name


def _json(content: dict[str, object]) -> bytes:
    return json.dumps(content).encode("utf-8")
