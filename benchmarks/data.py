"""Clips a second of the datamodule against a plain torch Dataset with decord, memory over epochs, time to first batch.

Both read the same clips with the same number of workers into batches of uint8 [b t c h w]: ours from shards in plan
order, the peer from loose mp4 files in random order. Measured in turn in one process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import decord
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.report import paired, write_result
from datamodules.loading.pipeline import Shard
from datamodules.shards import DatasetInfo, iterate_entries, read_member
from datamodules.video import VideoDataModule


class LooseClips(Dataset):
    """The peer: one mp4 a clip, decoded by decord, a random sub-clip each time."""

    def __init__(self, paths: list[str], num_frames: int) -> None:
        self.paths = paths
        self.num_frames = num_frames

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        reader = decord.VideoReader(self.paths[index], num_threads=1)
        start = int(np.random.default_rng().integers(len(reader) - self.num_frames + 1))
        frames = reader.get_batch(range(start, start + self.num_frames)).asnumpy()
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


def extract(root: Path, folder: Path) -> list[str]:
    """Writes every training clip of a set as a loose mp4. Returns the paths."""
    paths = []
    for shard, entry in iterate_entries(DatasetInfo.load(root), "train"):
        member = next(name for name in entry.members if name.endswith("mp4") and not name.startswith("control."))
        with shard.open("rb", buffering=0) as file:
            path = folder / f"{entry.key}.mp4"
            path.write_bytes(read_member(file, entry, member))
        paths.append(str(path))
    return paths


def make_module(root: Path, num_frames: int, options: argparse.Namespace) -> VideoDataModule:
    """Returns the datamodule to measure: pixels and whatever else its samples hold, except control videos."""
    data = VideoDataModule(
        root=root, batch_size=options.batch_size, num_frames=num_frames, num_workers=options.workers, views=None
    )
    data.setup("fit")
    return data


def clips_per_second(batches: Iterable[object], num_batches: int, batch_size: int) -> float:
    """Returns the rate over `num_batches` batches after the first two, which include the start of the workers."""
    iterator = iter(batches)
    for _ in islice(iterator, 2):
        pass
    begin = time.perf_counter()
    count = sum(1 for _ in islice(iterator, num_batches))
    return count * batch_size / (time.perf_counter() - begin)


def first_batch_seconds(batches: Iterable[object]) -> float:
    """Returns how long the first batch takes, workers' start included."""
    begin = time.perf_counter()
    next(iter(batches))
    return time.perf_counter() - begin


def memory_mib() -> float:
    """Returns the proportional set size of this process and its children."""
    total = 0
    for pid in [os.getpid(), *_children(os.getpid())]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # a worker that has just ended
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def _children(pid: int) -> list[int]:
    direct = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return direct + [grandchild for child in direct for grandchild in _children(child)]


def memory_by_epoch(root: Path, num_frames: int, options: argparse.Namespace) -> list[float]:
    """Returns the memory at the end of each of three epochs of one uninterrupted iteration."""
    data = make_module(root, num_frames, options)
    iterator = iter(data.train_loader(Shard(0, 1)))
    per_epoch = DatasetInfo.load(root).split("train").num_samples // options.batch_size
    marks = []
    for _ in range(3):
        for _ in islice(iterator, per_epoch):
            pass
        marks.append(memory_mib())
    return marks


def run(argv: list[str]) -> int:
    """Runs the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("data/doom"), help="a single-view set of shards")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=40, help="batches a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[97, 33], help="pixel frames of a clip")
    parser.add_argument("--output", type=Path, default=None, help="write the figures there as JSON")
    options = parser.parse_args(argv)
    figures: dict[str, object] = {"workers": options.workers, "batch_size": options.batch_size}
    print(f"{'':34} {'longtake':>10} {'decord':>10}")
    with tempfile.TemporaryDirectory() as folder:
        paths = extract(options.root, Path(folder))
        for num_frames in options.lengths:
            data = make_module(options.root, num_frames, options)
            peer = DataLoader(
                LooseClips(paths, num_frames),
                batch_size=options.batch_size,
                num_workers=options.workers,
                sampler=_Endless(len(paths)),
            )
            rate = paired(
                lambda data=data: clips_per_second(data.train_loader(Shard(0, 1)), options.batches, options.batch_size),
                lambda peer=peer: clips_per_second(peer, options.batches, options.batch_size),
                options.rounds,
            )
            print(rate.row(f"{num_frames} frames", "clips/s"))
            figures[f"clips_per_second_{num_frames}"] = rate.to_json()
            first = paired(
                lambda data=data: first_batch_seconds(data.train_loader(Shard(0, 1))) * 1000,
                lambda peer=peer: first_batch_seconds(peer) * 1000,
                options.rounds,
            )
            print(first.row("  time to first batch", "ms"))
            figures[f"first_batch_ms_{num_frames}"] = first.to_json()
    marks = memory_by_epoch(options.root, options.lengths[0], options)
    print("memory after epoch 1, 2, 3 (MiB)   " + "  ".join(f"{mark:.0f}" for mark in marks))
    figures["memory_mib_by_epoch"] = marks
    write_result("data", figures, options.output)
    return 0


class _Endless(torch.utils.data.Sampler):
    """Random order without end, so that the peer does not pay for new workers each epoch."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):  # noqa: ANN204
        while True:
            yield from torch.randperm(self.size).tolist()
