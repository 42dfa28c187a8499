"""Actions that come while a video is made: a key a chunk, from a keyboard or from anything else that gives keys.

A rollout asks for the actions of a chunk right before it predicts it, so whoever gives them has seen the chunk before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from longtake.actions import held_row
from longtake.errors import ConfigError
from longtake.geometry import group_by_latent
from longtake.rollout.plan import RolloutPlan
from longtake.types import Conditions

KEYS = {"w": "forward", "s": "backward", "a": "left", "d": "right"}
_STILL, _END = " ", "q"


class VideoEnded(Exception):
    """Whoever gives the actions wants no further chunk."""


@runtime_checkable
class ActionSource(Protocol):
    """Gives the actions of a video chunk by chunk."""

    def rows(self, start: int, stop: int, given: int) -> np.ndarray:
        """Returns what led to the frames [start, stop), float32 [t a], in order, each chunk once.

        Args:
            start: number of the first frame.
            stop: one past the last one.
            given: frames of the video that are given; nobody needs to be asked about those.

        Raises:
            VideoEnded: the video shall end before these frames.
        """
        ...


class KeyActions:
    """Turns keys into actions: one is held for a whole chunk.

    Args:
        names: of the action columns.
        typical: usual magnitude of each column where it is not zero.
        read: asks with a prompt and returns a key, or None where there are no more.
        known: what led to the given frames, [t a]; None: nothing is known of it.

    Raises:
        ConfigError: no column says what moves, so that keys mean nothing.
    """

    def __init__(
        self,
        names: Sequence[str],
        typical: Sequence[float],
        read: Callable[[str], str | None],
        known: np.ndarray | None = None,
    ) -> None:
        if not names:
            raise ConfigError("actions were given, but these weights were trained without any. Leave out `actions`.")
        self._read, self._known = read, known
        self._rows = {_STILL: np.zeros(len(names), np.float32)}
        missing: ConfigError | None = None
        for key, mode in KEYS.items():
            try:
                self._rows[key] = held_row(mode, names, typical)
            except ConfigError as error:
                missing = error
        if missing is not None and len(self._rows) == 1:
            raise missing

    def rows(self, start: int, stop: int, given: int) -> np.ndarray:
        """See `ActionSource`."""
        table = np.zeros((stop - start, len(self._rows[_STILL])), np.float32)
        if self._known is not None:
            known = self._known[start : min(stop, given)]
            table[: len(known)] = known
        if stop > given:
            table[max(given, 1) - start if start < max(given, 1) else 0 :] = self._asked(start, stop)
        return table

    def _asked(self, start: int, stop: int) -> np.ndarray:
        offered = " ".join(key for key in self._rows if key != _STILL)
        while True:
            key = self._read(f"frames {start} to {stop - 1}: {offered}, space = stand still, {_END} = end > ")
            if key is None or key.lower() == _END:
                raise VideoEnded
            if key.lower() in self._rows:
                return self._rows[key.lower()]


def live_conditions(
    told: Conditions, source: ActionSource, plan: RolloutPlan, count: int, device: torch.device | str
) -> Callable[[int], Conditions]:
    """Returns what gives the conditions of one chunk, asking for its actions then.

    Args:
        told: everything else, of one slot.
        source: of the actions.
        plan: of the rollout.
        count: samples, which are all told the same actions.
        device: of the conditions.
    """
    trained = plan.trained

    def of_chunk(chunk: int) -> Conditions:
        start, stop = (trained.pixels((chunk + more) * trained.chunk_lat) for more in (0, 1))
        rows = torch.from_numpy(source.rows(start, stop, plan.start_px))[None].to(device)
        if chunk == 0 or trained.own_starts:
            grouped = group_by_latent(rows, trained.ratio)
        else:  # the encoding goes on: every latent frame has as many pixel frames as the next
            grouped = rows.reshape(1, trained.chunk_lat, -1)
        return dataclasses.replace(told, actions=grouped[:, None].expand(count, -1, -1, -1))

    return of_chunk
