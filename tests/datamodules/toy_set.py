"""Small sets of shards for tests: every sample knows its own number, so that what was loaded can be told."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np

from datamodules.shards import DATASET_FILE, DatasetInfo, SampleEntry, SplitInfo
from datamodules.sources.base import SourceInfo, VideoSpec
from datamodules.writing.shard_writer import ShardWriter, pack_sample

TOKENS = {"vocab_size": 100_000, "grid": [3, 2, 2], "ratio_time": 4, "tokenizer": "toy"}


def toy_info(**changes: object) -> SourceInfo:
    """Returns what is true of the toy set."""
    settings: dict[str, object] = {
        "name": "toy",
        "licence": "CC0-1.0",
        "origin": "made by a test",
        "video": VideoSpec(Fraction(35, 3), 48, 64),
        "action_names": ("number", "row"),
        "tokens": TOKENS,
    }
    return SourceInfo(**{**settings, **changes})  # type: ignore[arg-type]


def npy(array: np.ndarray) -> bytes:
    """Returns an array as the bytes of an .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def toy_members(number: int, num_frames: int = 9) -> dict[str, bytes]:
    """Returns the members of sample `number`: every token is the number, actions hold (number, row)."""
    tokens = np.full((1, 1 + (num_frames - 1) // 4, 2, 2), number, dtype=np.int32)
    actions = np.stack([np.full(num_frames, number), np.arange(num_frames)], axis=1).astype(np.float32)
    return {"tokens.npy": npy(tokens), "actions.npy": npy(actions), "txt": f"clip {number}\nno. {number}\n".encode()}


def make_toy_set(
    root: Path,
    *,
    num_samples: int = 40,
    per_shard: int = 7,
    lengths: list[int] | None = None,
    info: SourceInfo | None = None,
    members: dict[int, dict[str, bytes]] | None = None,
    splits: tuple[str, ...] = ("train", "val"),
) -> Path:
    """Writes a set in which split "train" has samples 0, 1, ... and every other split the same ones.

    Args:
        root: folder to make.
        num_samples: samples a split.
        per_shard: samples a shard.
        lengths: pixel frames of each sample; 9 if not given.
        info: what is true of the set.
        members: members of some samples by number, in place of the usual ones.
        splits: names of the splits.
    """
    root.mkdir(parents=True)
    made = {}
    for split in splits:
        shards = []
        for first in range(0, num_samples, per_shard):
            writer = ShardWriter(root / f"{split}-{len(shards):06d}.tar")
            for number in range(first, min(first + per_shard, num_samples)):
                num_frames = lengths[number] if lengths else 9
                content, spans = pack_sample(
                    f"{split}_{number}", (members or {}).get(number) or toy_members(number, num_frames)
                )
                key = f"{split}_{number}"
                writer.add(SampleEntry(key, key, num_frames, 0, len(content), spans), content)
            shards.append(writer.close())
        made[split] = SplitInfo(tuple(shards))
    dataset = DatasetInfo(root, info or toy_info(), made, {"toy": num_samples}, f"toy{num_samples}", {"count": 0})
    (root / DATASET_FILE).write_text(dataset.to_json())
    return root


def damage(root: Path, split: str, number: int, member: str = "tokens.npy") -> None:
    """Flips a byte of one member of one sample, so that its checksum no longer fits."""
    info = DatasetInfo.load(root)
    from datamodules.shards import iterate_entries

    path, entry = list(iterate_entries(info, split))[number]
    offset, num_bytes, _ = entry.members[member]
    content = bytearray(path.read_bytes())
    content[offset + num_bytes - 1] ^= 0xFF
    path.write_bytes(content)
