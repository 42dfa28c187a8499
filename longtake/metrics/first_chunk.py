"""How well the first chunk is predicted: against what needs no model, and with true, shuffled and absent actions.

Every comparison is paired clip by clip, so that what makes a clip hard cancels, and has a 95 % bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from longtake.metrics.baselines import blurred, copy_last
from longtake.metrics.bootstrap import Interval, bootstrap, ratio_of_means
from longtake.metrics.frames import change, psnr, sharpness
from longtake.metrics.motion import turn_agreement


@dataclass(frozen=True)
class FirstChunks:
    """The first predicted chunk of some held-out clips. Frames are float in [0, 1].

    Attributes:
        last: last given frame of each clip, [b 1 c h w].
        truth: true frames of the chunk, [b t c h w].
        recoded: what the video encoder makes of them, as `truth`.
        samples: predictions by condition ("true", "shuffled", "absent" actions), each [samples b t c h w].
        turns: turn commanded for each frame, positive to the right, [b t]; None: no column turns.
    """

    last: Tensor
    truth: Tensor
    recoded: Tensor
    samples: Mapping[str, Tensor]
    turns: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    unit: str
    value: Interval
    num_clips: int


@dataclass
class Table:
    """The figures of `FirstChunks`."""

    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, unit: str, values: np.ndarray) -> None:
        """Adds the mean of one number a clip; clips without one (NaN) do not count."""
        kept = values[np.isfinite(values)]
        if len(kept):
            self.rows.append(Row(name, unit, bootstrap(kept), len(kept)))

    def add_ratio(self, name: str, above: np.ndarray, below: np.ndarray) -> None:
        """Adds a ratio of means over clips."""
        self.rows.append(Row(name, "ratio", ratio_of_means(above, below), len(above)))

    def __getitem__(self, name: str) -> Interval:
        """Returns the figure of a line. Raises KeyError if there is none of that name."""
        for row in self.rows:
            if row.name == name:
                return row.value
        raise KeyError(name)

    def text(self) -> str:
        """Returns the table for people."""
        width = max(len(row.name) for row in self.rows)
        return "\n".join(
            f"{row.name:<{width}}  {row.value!s:>24} {row.unit:<6} {row.num_clips:>4} clips" for row in self.rows
        )

    def to_json(self) -> dict[str, dict[str, float | int]]:
        """Returns the figures by name, plain JSON."""
        return {row.name: {**row.value.to_json(), "num_clips": row.num_clips} for row in self.rows}


def first_chunk_table(chunks: FirstChunks, blur: float, least_turn: float = 0.0) -> Table:
    """Returns the table.

    Args:
        chunks: truth and predictions.
        blur: of the blurred copy, in pixels, chosen on other clips (`baselines.best_blur`).
        least_turn: clips whose turns sum to less than this do not count for the direction.
    """
    table, truth = Table(), chunks.truth
    num_frames = truth.shape[1]
    true = chunks.samples["true"]
    baselines = {
        "copy of the last frame": copy_last(chunks.last, num_frames),
        "blurred copy": copy_last(blurred(chunks.last, blur), num_frames),
        "ceiling of the first stage": chunks.recoded,
        "one sample": true[0],
        f"mean of {len(true)} samples": true.mean(0),
    }
    psnrs = {name: psnr(pred, truth).numpy() for name, pred in baselines.items()}
    for name, values in psnrs.items():
        table.add(f"psnr, {name}", "dB", values)
    table.add("one sample - copy", "dB", psnrs["one sample"] - psnrs["copy of the last frame"])
    table.add("mean of samples - blurred copy", "dB", psnrs[f"mean of {len(true)} samples"] - psnrs["blurred copy"])
    for condition in ("shuffled", "absent"):
        if condition in chunks.samples:
            others = psnr(chunks.samples[condition][0], truth).numpy()
            table.add(f"psnr, {condition} actions", "dB", others)
            table.add(f"true - {condition} actions", "dB", psnrs["one sample"] - others)
    _add_looks(table, chunks)
    if chunks.turns is not None:
        _add_turns(table, chunks, least_turn)
    return table


def _add_looks(table: Table, chunks: FirstChunks) -> None:
    pred, truth = chunks.samples["true"][0], chunks.truth
    table.add_ratio("sharpness / true sharpness", sharpness(pred).numpy(), sharpness(truth).numpy())
    steps = [change(torch.cat([chunks.last, frames], dim=1)).numpy() for frames in (pred, truth)]
    table.add_ratio("frame change / true frame change", *steps)


def _add_turns(table: Table, chunks: FirstChunks, least_turn: float) -> None:
    assert chunks.turns is not None
    for name, frames in (("one sample", chunks.samples["true"][0]), ("truth", chunks.truth)):
        agrees = turn_agreement(torch.cat([chunks.last, frames], dim=1), chunks.turns, least_turn)
        table.add(f"moves as turned, {name}", "share", agrees.numpy())
