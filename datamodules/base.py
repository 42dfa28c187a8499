"""What all datamodules share: the plan over shards, exact resume, fixed validation, the checks and the summary."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.trainer.states import RunningStage

from datamodules.loading.bad_samples import BadSampleLedger
from datamodules.loading.decoding import Decoder
from datamodules.loading.loader import ClipLoader, FixedClipLoader
from datamodules.loading.pipeline import (
    FixedPositions,
    PlannedPositions,
    ResampledBatches,
    Shard,
    SplitData,
    fixed,
    planned,
)
from datamodules.loading.plan import SamplePlan
from datamodules.loading.plan_progress import PlanProgress, plan_fingerprint
from datamodules.loading.reading import SplitReader
from datamodules.loading.remote import ShardCache
from datamodules.loading.streams import StreamOptions, make_streams, report_short
from datamodules.loading.summary import check_requirements, log_summary
from datamodules.shards import DatasetInfo
from longtake.errors import ConfigError, unknown_choice
from longtake.types import Clip

log = logging.getLogger("longtake")
"""Messages of the whole project; the launcher shows those of global rank 0."""


class ClipsDataModule(L.LightningDataModule):
    """Batches of `Clip`s from one or several sets of shards.

    Training follows a plan that is a pure function of (seed, position), see `datamodules.loading.plan`. The state of
    the data is one number, the first position that no finished optimiser step has used, so a resumed run continues
    exactly, on any number of workers and ranks.

    Args:
        root: folder of the set, or None where `mix` is given.
        mix: several sets, each {"root": folder, "weight": share or absent}; without weights they are one large set.
        build: {"source": settings of the source that makes the set where `root` has none, "num_workers": processes};
            None never makes one.
        rebuild: make the set again where `root` holds one of other settings.
        batch_size: clips a rank and batch.
        num_frames: pixel frames of a clip; a list makes length buckets, each sample in the longest that it fills.
        frame_stride: take every n-th frame.
        subclips: "random" draws where a clip begins, "strided" uses all starts that are `subclip_stride` apart.
        subclip_stride: frames between the starts of strided sub-clips; None for clips that do not overlap.
        bucket_run: plan positions in a row that share a shape where there are several shapes.
        splits: which split of the set each stage reads.
        limit_samples: use only the first n training samples (None: all); for overfitting on purpose.
        val_samples: validate on this many samples, evenly spread over the split (None: all).
        val_batch_size: clips a rank and validation batch (None: as in training).
        seed: of the plan and of every draw that data needs.
        mode: "planned", or "resampled" for shards drawn with replacement (approximate: no exact resume).
        order: "samples" permutes samples, "shards" permutes shards and then samples inside blocks of them.
        shards_per_block: shards whose samples are mixed where order is "shards".
        shuffle_buffer: samples mixed where mode is "resampled".
        shard_url: where the tars lie if not beside `dataset.json`, with `{file}`.
        allow_remote: consent to open `shard_url`.
        cache_dir: folder for fetched shards.
        cache_gb: how much of them to keep.
        max_bad_fraction: share of bad samples above which the run ends.
        num_workers: loader processes a rank.
        worker_context: "fork", "spawn", "forkserver"; None for the platform's default.
        prefetch_factor: batches each worker prepares ahead.
        pin_memory: page-locked batches; None does so where there is a GPU.
        worker_timeout: seconds without a batch after which a worker counts as stuck.
        action_dim: what the model is built for, as configured; refused where the set differs. None skips this.
    """

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        mix: list[dict[str, Any]] | None = None,
        build: dict[str, Any] | None = None,
        rebuild: bool = False,
        batch_size: int = 8,
        num_frames: int | list[int] = 97,
        frame_stride: int = 1,
        subclips: str = "random",
        subclip_stride: int | None = None,
        bucket_run: int = 64,
        splits: dict[str, str] | None = None,
        limit_samples: int | None = None,
        val_samples: int | None = None,
        val_batch_size: int | None = None,
        seed: int = 0,
        mode: str = "planned",
        order: str = "samples",
        shards_per_block: int = 4,
        shuffle_buffer: int = 256,
        shard_url: str | None = None,
        allow_remote: bool = False,
        cache_dir: str | Path = "data/.cache",
        cache_gb: float = 50.0,
        max_bad_fraction: float = 0.01,
        num_workers: int = 2,
        worker_context: str | None = None,
        prefetch_factor: int = 2,
        pin_memory: bool | None = None,
        worker_timeout: float = 600.0,
        action_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.roots, self.weights = _roots(root, mix)
        self.build = build
        self.rebuild = rebuild
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.frame_stride = frame_stride
        self.streams = StreamOptions(
            num_frames=tuple(num_frames) if isinstance(num_frames, list | tuple) else (num_frames,),
            frame_stride=frame_stride,
            subclips=subclips,
            subclip_stride=subclip_stride,
            limit_samples=limit_samples,
            order=order,
            shards_per_block=shards_per_block,
        )
        self.bucket_run = bucket_run
        self.splits = {"train": "train", "val": "val", "test": "test", "predict": "long", **(splits or {})}
        self.val_samples = val_samples
        self.seed = seed
        self.mode = mode
        self.shuffle_buffer = shuffle_buffer
        self.max_bad_fraction = max_bad_fraction
        self.cache = None
        if shard_url is not None:
            self.cache = ShardCache(shard_url, Path(cache_dir), int(cache_gb * 1e9), allow_remote)
        self.num_workers = num_workers
        self._loader_options: dict[str, Any] = {
            "num_workers": num_workers,
            "context": worker_context,
            "prefetch_factor": prefetch_factor,
            "pin_memory": pin_memory,
            "timeout": worker_timeout if num_workers > 0 else 0,
        }
        self.action_dim = action_dim
        self.infos: list[DatasetInfo] = []
        self.plan: SamplePlan | None = None
        self.ledgers: dict[str, BadSampleLedger] = {}
        self._progress = PlanProgress()
        _check_choice("mode", mode, ("planned", "resampled"))
        _check_choice("worker_context", worker_context, (None, "fork", "spawn", "forkserver"))
        _check_positive(batch_size=batch_size, val_batch_size=self.val_batch_size, bucket_run=bucket_run)

    @abstractmethod
    def decoder(self, info: DatasetInfo, *, training: bool) -> Decoder:
        """Returns what turns a sample of a set into the fields of a clip; it must pickle."""

    @abstractmethod
    def shape(self, info: DatasetInfo) -> tuple[object, ...]:
        """Returns what must be equal within a batch, besides the number of frames."""

    # Setting up

    def prepare_data(self) -> None:
        """Makes the set where there is none yet. Lightning calls this on one process of each machine."""
        if self.build is None or len(self.roots) != 1:
            return
        from hydra.utils import instantiate

        from datamodules.writing.build import ensure_dataset

        ensure_dataset(
            instantiate(self.build["source"]),
            self.roots[0],
            {"source": _content(self.build["source"])},
            num_workers=self.build.get("num_workers") or os.cpu_count() or 1,
            rebuild=self.rebuild,
        )

    def setup(self, stage: str) -> None:
        """Reads what the sets say of themselves, checks it against the model, and prints the summary once."""
        if self.infos:
            return
        self.infos = [DatasetInfo.load(root) for root in self.roots]
        model: Any = self.trainer.lightning_module if self.trainer is not None else None
        wanted = dict(model.data_requirements()) if hasattr(model, "data_requirements") else {}
        if self.action_dim is not None:
            wanted.setdefault("action_dim", self.action_dim)
        check_requirements(self.infos, wanted)
        log_summary(self.infos, sorted(set(self.splits.values())))

    def description(self) -> dict[str, Any]:
        """Returns what weights should remember of this data, plain JSON; needs `setup`."""
        from datamodules.describe import describe

        return describe(self.infos[0], self.splits["train"])

    def training_actions(self, count: int = 512) -> Iterator[np.ndarray]:
        """Yields the actions [t a] of about `count` training samples, the same on every rank; needs `setup`."""
        from datamodules.describe import action_tables

        return action_tables(self.infos[0], self.splits["train"], count)

    def shard(self) -> Shard:
        """Returns this process's data-parallel rank and size; ranks of one sequence-parallel group read the same."""
        if self.trainer is None:
            return Shard(0, 1)
        group = int(getattr(self.trainer.strategy, "sequence_parallel_size", 1))
        return Shard(self.trainer.global_rank // group, self.trainer.world_size // group)

    # Loaders

    def train_dataloader(self) -> ClipLoader:
        """Returns the endless training loader; each iteration begins at the first position not used yet."""
        return self.train_loader(self.shard())

    def val_dataloader(self) -> FixedClipLoader:
        """Returns the validation loader: the same samples on each call, shared by all ranks."""
        return self.fixed_loader("val", self.shard())

    def test_dataloader(self) -> FixedClipLoader:
        """Returns the loader of the test split."""
        return self.fixed_loader("test", self.shard())

    def predict_dataloader(self) -> FixedClipLoader:
        """Returns the loader of the split that rollouts start from."""
        return self.fixed_loader("predict", self.shard())

    def train_loader(self, shard: Shard) -> ClipLoader:
        """Returns the training loader of one data-parallel rank; needs no Trainer, only `setup`."""
        split = self.splits["train"]
        data = [self._split_data(info, split, training=True) for info in self.infos]
        ledger = self._ledger(split, sum(len(item.reader) for item in data))
        if self.mode == "resampled":
            return self._make_loader(self._resampled(data, shard), ledger)
        plan = self.plan or self._make_plan(data)
        self.plan = plan
        self._progress.enter(plan_fingerprint(self.infos, plan), shard)

        def pipeline() -> Any:
            start = self._progress.next_position
            if plan.misfit(start, shard.size):
                raise ConfigError(
                    f"training stands at plan position {start}, which {shard.size} ranks cannot share in runs of "
                    f"{plan.block} "
                    "positions of one shape; expected a number of ranks that divides both. Change `trainer.devices` or "
                    "`data.bucket_run`."
                )
            return planned(PlannedPositions(plan, start, self.batch_size, shard), data)

        return self._make_loader(pipeline, ledger)

    def fixed_loader(self, stage: str, shard: Shard) -> FixedClipLoader:
        """Returns the loader of a fixed list of samples of the first set ("val", "test" or "predict")."""
        info, split = self.infos[0], self.splits[stage]
        data = self._split_data(info, split, training=False)
        lengths, wanted_px = data.reader.num_frames(), self.streams.num_frames
        filled = [count for count in wanted_px if (lengths >= self.streams.span(count)).any()]
        num_frames = max(filled, default=min(wanted_px))
        report_short(data.reader, lengths, self.streams.span(num_frames))
        usable = np.flatnonzero(lengths >= self.streams.span(num_frames)).tolist()
        available = len(usable)
        wanted = min(self.val_samples or available, available) if stage == "val" else available
        # Spread over the split: neighbours in a set often come from one recording.
        samples = [usable[index * available // wanted] for index in range(wanted)]
        positions = FixedPositions(samples, self.val_batch_size, shard)
        return self._make_loader(
            lambda: fixed(positions, data, num_frames), self._ledger(split, available), length=len(positions)
        )

    def _split_data(self, info: DatasetInfo, split: str, *, training: bool) -> SplitData:
        reader = SplitReader(info, split, self.cache)
        if len(reader) == 0:
            raise ConfigError(f"split {split!r} of {info.root} is empty; expected samples. Change `data.splits`.")
        return SplitData(reader, self.decoder(info, training=training), self.frame_stride)

    def _make_plan(self, data: list[SplitData]) -> SamplePlan:
        shapes = [self.shape(info) for info in self.infos]
        streams = make_streams([item.reader for item in data], shapes, self.weights, self.streams)
        return SamplePlan(streams, self.seed, self.bucket_run)

    def _resampled(self, data: list[SplitData], shard: Shard) -> Any:
        if len(data) != 1 or len(self.streams.num_frames) != 1 or self.cache is not None:
            raise ConfigError(
                "data.mode is 'resampled' with several sets, length buckets or a shard_url; expected one local set "
                "and one "
                "length. Change `data.mode` to planned."
            )
        paths = [str(path) for path in data[0].reader.info.shard_paths(data[0].reader.split)]
        readers = shard.size * max(1, self.num_workers)
        if len(paths) < readers:
            per_shard = max(1, len(data[0].reader) // readers)
            raise ConfigError(
                f"{self.roots[0]} has {len(paths)} training shards for {shard.size} ranks x "
                f"{max(1, self.num_workers)} workers, and "
                f"data.mode=resampled needs one each; expected {readers} or more. Make the set again with "
                f"writer.max_samples={per_shard} or less, lower `data.num_workers`, or use data.mode=planned, which "
                "needs no number."
            )
        log.warning("data.mode=resampled is approximate: samples may repeat or be missed, and resume draws afresh")
        batches = ResampledBatches(
            paths, data[0], self.streams.num_frames[0], self.batch_size, shard, self.seed, self.shuffle_buffer
        )
        from webdataset.pipeline import DataPipeline

        return lambda: DataPipeline(batches)

    def _make_loader(self, pipeline: Any, ledger: BadSampleLedger, length: int | None = None) -> Any:
        options = dict(self._loader_options)
        if options["pin_memory"] is None:
            options["pin_memory"] = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        if length is None:
            return ClipLoader(pipeline, ledger, **options)
        return FixedClipLoader(length, pipeline, ledger, **options)

    def _ledger(self, split: str, num_samples: int) -> BadSampleLedger:
        return self.ledgers.setdefault(split, BadSampleLedger(split, num_samples, self.max_bad_fraction))

    # Position and resume

    def on_before_batch_transfer(self, batch: Clip, dataloader_idx: int) -> Clip:
        """Notes which positions the coming training step uses."""
        if self.trainer is not None and self.trainer.state.stage == RunningStage.TRAINING:
            self._progress.begin(batch, self.trainer.global_step)
        return batch

    def transfer_batch_to_device(self, batch: Clip, device: Any, dataloader_idx: int) -> Clip:
        """Returns the batch on the device; pixels travel as bytes."""
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the data: the first plan position that no finished optimiser step has used."""
        step = self.trainer.global_step if self.trainer is not None else 0
        return self._progress.state(step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state, on any number of ranks and workers."""
        self._progress.restore(state_dict)


def _roots(root: str | Path | None, mix: list[dict[str, Any]] | None) -> tuple[list[Path], list[float | None]]:
    if (root is None) == (mix is None):
        raise ConfigError(f"data.root is {root} and data.mix is {mix}; expected exactly one of them.")
    if mix is None:
        return [Path(str(root))], [None]
    weights = [entry.get("weight") for entry in mix]
    given = [weight for weight in weights if weight is not None]
    if not mix or (given and (len(given) != len(mix) or min(given) <= 0)):
        raise ConfigError(
            f"data.mix has weights {weights}; expected at least one set, and a positive weight for all or for none."
        )
    return [Path(str(entry["root"])) for entry in mix], weights


def _check_choice(name: str, value: object, valid: tuple[object, ...]) -> None:
    if value not in valid:
        raise unknown_choice("choice", value, [str(choice) for choice in valid], f"data.{name}")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"data.{name} is {value}; expected 1 or more. Change `data.{name}`.")


def _content(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what decides a set's content: how many processes make the set that it is made from does not."""
    make = source.get("make")
    if not isinstance(make, Mapping) or "num_workers" not in make:
        return source
    return {**source, "make": {**make, "num_workers": None}}
