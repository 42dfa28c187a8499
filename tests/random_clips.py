"""A datamodule without files, for tests of everything around the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from longtake.errors import ConfigError
from longtake.types import Clip

FIRST_VAL = 10_000


class _Clips(IterableDataset):
    def __init__(self, module: RandomClips, first: int, stride: int) -> None:
        self.module, self.first, self.stride = module, first, stride

    def __iter__(self) -> Iterator[Clip]:
        position, size = self.first, self.module.batch_size
        while True:
            yield self.module.batch([position + index * self.stride for index in range(size)])
            position += size * self.stride


class RandomClips(L.LightningDataModule):
    """Clips as a pure function of (seed, position); training starts at the first position not used yet."""

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        action_dim: int,
        seed: int,
        height: int,
        width: int,
        num_frames: int,
        val_clips: int,
        limit_samples: int | None,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.action_dim, self.seed = (
            batch_size,
            num_workers,
            action_dim,
            seed,
        )
        self.size = (num_frames, 3, height, width)
        self.val_clips, self.limit_samples = val_clips, limit_samples

    def setup(self, stage: str) -> None:
        wanted = self.trainer.lightning_module.data_requirements()["action_dim"]  # type: ignore[union-attr]
        if wanted not in (None, self.action_dim):
            raise ConfigError(f"the model wants {wanted} action columns, the data has {self.action_dim}")

    def batch(self, positions: list[int]) -> Clip:
        video, actions = [], []
        for position in positions:
            sample = position % self.limit_samples if self.limit_samples else position
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + sample)
            drift = torch.rand(self.size, generator=generator) * 20
            start = torch.rand((1, *self.size[1:]), generator=generator) * 150
            video.append((start + drift.cumsum(0)).clamp(0, 255).to(torch.uint8))
            actions.append(torch.randn(self.size[0], self.action_dim, generator=generator))
        return Clip(
            video=torch.stack(video)[:, None],
            actions=torch.stack(actions),
            frame_mask=torch.ones(len(positions), self.size[0], dtype=torch.bool),
            key=[f"clip-{position}" for position in positions],
            position=torch.tensor(positions),
        )

    def train_dataloader(self) -> DataLoader:
        rank, size = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        used = self.trainer.global_step * self.batch_size * size  # type: ignore[union-attr]
        return DataLoader(_Clips(self, used + rank, size), batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The last clip only fills up: it has no real frame, as where ranks share a list that does not divide."""
        clips = [self.batch([FIRST_VAL + index]) for index in range(self.val_clips + 1)]
        clips[-1] = dataclasses.replace(clips[-1], frame_mask=torch.zeros(1, self.size[0], dtype=torch.bool))
        return DataLoader(clips, batch_size=None)  # type: ignore[arg-type]
