"""Where training stands in the plan, across steps, checkpoints and changes of the number of ranks."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import numpy as np

from datamodules.loading.pipeline import Shard
from datamodules.loading.plan import SamplePlan
from datamodules.shards import DatasetInfo
from longtake.errors import ConfigError
from longtake.types import Clip

log = logging.getLogger("longtake")


class PlanProgress:
    """Where training stands in the plan.

    Attributes:
        next_position: the first position that no batch handed to the model has used.
    """

    def __init__(self) -> None:
        self.next_position = 0
        self._finished = 0
        self._step = 0
        self._fingerprint: str | None = None
        self._shard = Shard(0, 1)
        self._saved: dict[str, Any] = {}

    def enter(self, fingerprint: str, shard: Shard) -> None:
        """Checks a restored state against the plan, and says what differs. Raises ConfigError for another plan."""
        saved = self._saved
        if saved and saved["plan"] != fingerprint:
            raise ConfigError(
                f"the checkpoint was trained on another plan of data ({saved['plan']}, now {fingerprint}): the sets, "
                "the "
                "lengths or data.seed differ; expected the same. Restore them, or start a new run with "
                "`init_from=<checkpoint>`."
            )
        if saved and saved["world_size"] != shard.size:
            log.info(
                "data: saved on %d data-parallel ranks, resumed on %d; from plan position %d on each is used once",
                saved["world_size"],
                shard.size,
                self.next_position,
            )
        self._saved = {}
        self._fingerprint, self._shard = fingerprint, shard

    def begin(self, batch: Clip, step: int) -> None:
        """Notes that a training step begins with this batch while `step` optimiser steps are finished."""
        if step != self._step:
            self._finished, self._step = self.next_position, step
        assert batch.position is not None, "a training batch knows its plan positions"
        last_of_rank = int(batch.position[-1])
        self.next_position = last_of_rank - self._shard.rank + self._shard.size

    def state(self, step: int) -> dict[str, Any]:
        """Returns the position behind the last finished optimiser step, of which there are `step`."""
        finished = self.next_position if step != self._step else self._finished
        return {"position": finished, "world_size": self._shard.size, "plan": self._fingerprint, "step": step}

    def restore(self, state: dict[str, Any]) -> None:
        """Begins where a saved state ended."""
        self.next_position = self._finished = int(state["position"])
        self._step = int(state["step"])
        self._saved = dict(state) if state["plan"] is not None else {}


def plan_fingerprint(infos: list[DatasetInfo], plan: SamplePlan) -> str:
    """Returns a short hash of all that decides what stands at a plan position."""
    streams = [(s.name, s.dataset, s.num_frames, s.groups, _digest(s.samples, s.starts)) for s in plan.streams]
    content = [[info.fingerprint for info in infos], streams, plan.counts, plan.block, plan.seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _digest(samples: np.ndarray, starts: np.ndarray | None) -> str:
    digest = hashlib.sha256(samples.tobytes())
    digest.update(b"" if starts is None else starts.tobytes())
    return digest.hexdigest()
