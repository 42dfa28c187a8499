"""Folders of the 1X challenge for tests: tokens, states and recordings that can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datamodules.sources.onex_format import OnexClip
from datamodules.sources.onex_v1 import ACTIONS
from datamodules.sources.onex_writer import Layout, write_onex_v1, write_v2_shard

GRID = (3, 4, 4)
SETTINGS = {"grid": GRID, "vocab_size": 640}
LENGTH = 17


def clip_tokens(shard: int, clip: int) -> np.ndarray:
    """Returns tokens that no other clip has, int32 [3 4 4]."""
    return np.random.default_rng([shard, clip]).integers(0, 640, GRID).astype(np.int32)


def frame_states(shard: int, num_frames: int) -> np.ndarray:
    """Returns float32 [n 25]: the number of the frame plus a hundredth of the column, a thousand for each shard."""
    frames = np.arange(num_frames)[:, None] + np.arange(25)[None] / 100 + 1000 * shard
    return frames.astype(np.float32)


def write_v2(
    folder: Path, *, lengths: tuple[list[int], ...] = ([40, 34, 20],), layout: Layout = "flat", hz: int = 30
) -> Path:
    """Writes a v2.0 folder; `lengths` are the frames of each recording of each shard."""
    for number, recordings in enumerate(lengths):
        segments = np.repeat(np.arange(len(recordings)), recordings)
        num_clips = -(-len(segments) // LENGTH)
        tokens = np.stack([clip_tokens(number, clip) for clip in range(num_clips)])
        write_v2_shard(folder, number, tokens, segments, frame_states(number, len(segments)), layout=layout)
    head = folder / "metadata.json" if layout == "flat" else folder / "metadata" / "metadata.json"
    total = sum(map(sum, lengths))
    head.write_text(f'{{"num_shards": {len(lengths)}, "query": "", "hz": {hz}, "num_images": {total}}}')
    return folder


def write_v1(folder: Path, lengths: list[int], *, side: int = 4, token_dtype: str = "uint32") -> Path:
    """Writes a v1.1 folder; token 0 of a frame is its number, column 0 of the actions too."""
    n = sum(lengths)
    tokens = np.random.default_rng(0).integers(0, 2**18, (n, side, side))
    tokens[:, 0, 0] = np.arange(n)
    rows = {name: np.tile(np.arange(n)[:, None], (1, width)) for name, width in ACTIONS.items()}
    write_onex_v1(folder, tokens, np.repeat(np.arange(len(lengths)), lengths), rows, token_dtype=token_dtype)
    return folder


def whole_clip(number: int, segment: int = 0) -> OnexClip:
    """Returns a clip as a tokenizer would make it."""
    return OnexClip(clip_tokens(9, number), frame_states(number, LENGTH), segment, f"clip{number}")
