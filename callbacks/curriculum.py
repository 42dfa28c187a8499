"""Settings that change while training: piecewise schedules by step over keys of the config.

Values are a pure function of the number of optimiser steps, so a resumed run has the same ones. Validation is not
touched: its figures stay comparable from the first step to the last.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from longtake.errors import ConfigError, unknown_choice

logger = logging.getLogger("longtake")

LIVE = ("objective", "optimizer")
"""Nodes of the config whose values may change while training."""


@dataclass(frozen=True)
class Schedule:
    """One value by step.

    Attributes:
        points: (step, value) with rising steps; before the first and after the last its value holds.
        kind: "constant" keeps a value until the next point, "linear" goes straight to it.
    """

    points: tuple[tuple[int, Any], ...]
    kind: Literal["constant", "linear"] = "constant"

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Schedule:
        """Returns the schedule that a yaml node {key, kind, points} describes. Raises ConfigError for anything else."""
        where = "callbacks.curriculum.schedules"
        if (
            not isinstance(node, Mapping)
            or not isinstance(node.get("key"), str)
            or set(node) - {"key", "kind", "points"}
        ):
            raise ConfigError(f"{where} holds {node!r}; expected {{key, kind, points}}. Change `{where}`.")
        kind, key = node.get("kind", "constant"), node["key"]
        if kind not in ("constant", "linear"):
            raise unknown_choice(f"kind of schedule (of {key})", kind, ["constant", "linear"], where)
        points = node.get("points") or []
        points = points if isinstance(points, list | tuple) else [points]
        steps = [point[0] for point in points if isinstance(point, list | tuple) and len(point) == 2]
        whole = all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps)
        rising = all(a < b for a, b in zip(steps, steps[1:], strict=False))
        if not steps or len(steps) != len(points) or not whole or not rising:
            raise ConfigError(
                f"the schedule of {key} has points {points}; expected [[step, value], ...] with rising steps from 0 "
                f"on. Change `{where}`."
            )
        values = [value for _, value in points]
        if kind == "linear" and not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ConfigError(f"the schedule of {key} is linear between {values}; expected numbers. Change `{where}`.")
        return cls(tuple((step, value) for step, value in points), kind)

    def at(self, step: int) -> Any:
        """Returns the value of optimiser step `step`, counted from 0."""
        steps = [point[0] for point in self.points]
        index = bisect.bisect_right(steps, step) - 1
        if index < 0:
            return self.points[0][1]
        begin, value = self.points[index]
        if self.kind == "constant" or index + 1 == len(self.points):
            return value
        end, following = self.points[index + 1]
        return value + (following - value) * (step - begin) / (end - begin)

    @property
    def is_whole(self) -> bool:
        """Whether it goes through whole numbers only, as a number of chunks does."""
        return all(isinstance(value, int) for _, value in self.points)


class Curriculum(Callback):
    """Sets scheduled values before each training step.

    Args:
        schedules: a list of {key, kind, points}; key is a dotted key of the config, as in objective.num_chunks.
        enabled: false leaves every value as configured.
    """

    def __init__(self, schedules: Sequence[Mapping[str, Any]] = (), enabled: bool = True) -> None:
        self.schedules: dict[str, Schedule] = {}
        for node in schedules if enabled else ():
            schedule, key = Schedule.of(node), str(node["key"])
            if key in self.schedules:
                raise ConfigError(
                    f"callbacks.curriculum has two schedules of {key}; expected one. Change "
                    "`callbacks.curriculum.schedules`."
                )
            self.schedules[key] = schedule
        self._values: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = getattr(pl_module, "run_config", {})
        if stage == "fit" and config:
            check_schedules(self.schedules, config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._values = {}
        if "optimizer.lr" in self.schedules:
            for entry in trainer.lr_scheduler_configs:
                if not isinstance(entry.scheduler, LambdaLR):
                    kind = type(entry.scheduler).__name__
                    raise ConfigError(
                        f"callbacks.curriculum schedules optimizer.lr, but scheduler={kind} is not given as factors of "
                        "a rate; expected a LambdaLR. Change `scheduler` or leave out that schedule."
                    )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        changed = {}
        for path, schedule in self.schedules.items():
            value = schedule.at(step)
            if path == "optimizer.lr":
                _set_rate(trainer, float(value))
            else:
                value = _set(trainer, pl_module, path, value, schedule.is_whole)
            if path not in self._values or self._values[path] != value:
                changed[path] = value
        self._values |= changed
        if changed:
            self._tell(trainer, step, changed)

    def _tell(self, trainer: Trainer, step: int, changed: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        numbers = {f"curriculum/{path}": float(v) for path, v in changed.items() if isinstance(v, int | float)}
        for sink in trainer.loggers:
            sink.log_metrics(numbers, step=step)
        begins = {path: value for path, value in changed.items() if self._begins(path, step)}
        if begins:
            logger.info(
                "curriculum at step %d: %s", step, ", ".join(f"{path}={value}" for path, value in begins.items())
            )

    def _begins(self, path: str, step: int) -> bool:
        """A linear schedule changes at every step; only its corners are worth a line."""
        schedule = self.schedules[path]
        return schedule.kind == "constant" or step in {point[0] for point in schedule.points}


def check_schedules(schedules: Mapping[str, Schedule], config: Mapping[str, Any]) -> None:
    """Checks that every scheduled key is there and may change, and that its values can be constructed.

    Args:
        schedules: by dotted key.
        config: the resolved config as plain containers.

    Raises:
        ConfigError: for an unknown key, with the nearest ones, or a value that its owner refuses.
    """
    known = {path for root in LIVE for path, _ in _flat(config.get(root), root) if path.rpartition(".")[2][0] != "_"}
    for path, schedule in schedules.items():
        if path not in known:
            raise unknown_choice("key to schedule", path, known, "callbacks.curriculum.schedules")
        root, _, rest = path.partition(".")
        for _, value in schedule.points:
            if root == "optimizer":
                if not isinstance(value, int | float) or value < 0:
                    raise ConfigError(
                        f"callbacks.curriculum schedules {path}={value!r}; expected a number of 0 or more. Change "
                        "`callbacks.curriculum.schedules`."
                    )
            else:
                _construct(config[root], rest, value)


def _construct(node: Mapping[str, Any], path: str, value: Any) -> None:
    """Builds an object with one value changed, so that its own checks see it."""
    from hydra.utils import instantiate

    def changed(node: Any, names: list[str]) -> Any:
        return {**node, names[0]: changed(node[names[0]], names[1:])} if names else value

    try:
        instantiate(changed(node, path.split(".")))
    except Exception as error:  # Hydra wraps what the constructor raises
        found = error
        while found is not None and not isinstance(found, ConfigError):
            found = found.__cause__
        if found is None:
            raise
        raise ConfigError(f"a schedule of callbacks.curriculum cannot work: {found}") from error


def _set(trainer: Trainer, pl_module: LightningModule, path: str, value: Any, is_whole: bool) -> Any:
    """Sets a value where it lives and returns it, rounded where it replaces a whole number, or nothing by one."""
    root, *names, last = path.split(".")
    if root == "optimizer":
        for group in trainer.optimizers[0].param_groups:
            if last == "weight_decay" and group[last] == 0:
                continue  # parameters that are never decayed
            group[last] = value
        return value
    owner: Any = getattr(pl_module, root)
    for name in names:
        owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    old = owner[last] if isinstance(owner, dict) else getattr(owner, last)
    counts = is_whole if old is None else isinstance(old, int) and not isinstance(old, bool)
    if isinstance(value, float) and counts:
        value = round(value)
    if isinstance(owner, dict):
        owner[last] = value
    else:
        setattr(owner, last, value)
    return value


def _set_rate(trainer: Trainer, rate: float) -> None:
    """Makes `rate` what the schedule's factors (warm-up, decay) and the groups' multipliers apply to."""
    groups = trainer.optimizers[0].param_groups
    rates = [rate * group.get("lr_scale", 1.0) for group in groups]
    factors = [1.0] * len(groups)
    for entry in trainer.lr_scheduler_configs:
        scheduler = entry.scheduler
        assert isinstance(scheduler, LambdaLR), type(scheduler)
        scheduler.base_lrs = rates
        factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
    for group, base, factor in zip(groups, rates, factors, strict=True):
        group["initial_lr"], group["lr"] = base, base * factor


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for name, child in node.items():
            yield from _flat(child, f"{prefix}.{name}")
    else:
        yield prefix, node
