"""Loaders: batches from worker processes, in order, with what went wrong told to the main process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader
from webdataset.pipeline import DataPipeline

from datamodules.loading.bad_samples import BadSampleLedger
from datamodules.loading.pipeline import Delivery
from longtake.errors import DataError
from longtake.types import Clip

PipelineMaker = Callable[[], DataPipeline]


class ClipLoader:
    """Yields the batches of a pipeline as `Clip`s; endless pipelines have no length.

    Args:
        make_pipeline: called at the start of each iteration, so that a training loader begins where training stands.
        ledger: told of every bad sample; ends the run when there are too many.
        num_workers: worker processes; 0 decodes in this process.
        context: "fork", "spawn", "forkserver" or None for the platform's default.
        prefetch_factor: batches each worker prepares ahead.
        pin_memory: whether batches arrive in page-locked memory.
        timeout: seconds without a batch after which a worker counts as stuck; 0 waits for ever.

    Attributes:
        waited_s: seconds that the process has waited for batches so far.
    """

    def __init__(
        self,
        make_pipeline: PipelineMaker,
        ledger: BadSampleLedger,
        *,
        num_workers: int,
        context: str | None = None,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        timeout: float = 0,
    ) -> None:
        self.make_pipeline = make_pipeline
        self.ledger = ledger
        self.waited_s = 0.0
        self._options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "timeout": timeout,
        }
        if num_workers > 0:
            self._options |= {"multiprocessing_context": context, "prefetch_factor": prefetch_factor}

    def __iter__(self) -> Iterator[Clip]:
        """Yields batches. Raises DataError for a failure in a worker or for too many bad samples."""
        pipeline: Any = self.make_pipeline()  # torch's types know neither webdataset's pipelines nor unbound methods
        packed_whole: Any = Delivery.packed
        batches = iter(DataLoader(pipeline, collate_fn=packed_whole, **self._options))
        while True:
            begin = time.perf_counter()
            packed = next(batches, None)
            self.waited_s += time.perf_counter() - begin
            if packed is None:
                return
            delivery = packed.unpacked()
            self.ledger.add(delivery.num_drawn, delivery.bad)
            if delivery.failure is not None:
                raise DataError(delivery.failure)
            if delivery.clip is not None:
                yield delivery.clip

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the datamodule keeps the position. Tells Lightning that resuming in an epoch is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing; see `state_dict`."""


class FixedClipLoader(ClipLoader):
    """A loader of a known number of batches, the same on every rank (validation).

    Args:
        length: number of batches.
        *args: as for `ClipLoader`.
        **kwargs: as for `ClipLoader`.
    """

    def __init__(self, length: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.length = length

    def __len__(self) -> int:
        return self.length
