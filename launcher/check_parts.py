"""Rules of `check_config` that build parts of a training: what their constructors refuse is found before a run folder
is made, any data is read or any memory is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launcher.signatures import check_targets
from longtake.errors import ConfigError

_NO_SENSE = (TypeError, ValueError, LookupError, ArithmeticError)  # what constructors of others raise for bad values


def complaints(check: Callable[[], None], what: str = "") -> Iterator[str]:
    """Yields what a check raises as ConfigError, also where Hydra has wrapped it.

    Args:
        check: raises.
        what: key of what is built; with it other errors that bad values lead to count too, and name this key.
    """
    try:
        check()
    except Exception as error:
        causes = list(_causes(error))
        found = next((cause for cause in causes if isinstance(cause, ConfigError)), None)
        if found is not None:
            yield str(found)
        elif what and isinstance(causes[-1], _NO_SENSE):
            reason = str(causes[-1]).strip().splitlines() or [""]
            yield f"`{what}` cannot be built ({type(causes[-1]).__name__}: {reason[0]}). Change `{what}`."
        else:
            raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def network(cfg: DictConfig) -> Iterator[str]:
    """The network must be one that can be; it is built without memory."""
    node = cfg.module.get("network")
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return
    import torch

    if OmegaConf.select(node, "mixer.window") == 0:
        yield (
            "network.mixer.window is 0, smaller than a chunk, so no chunk would see the one before it; expected 1 "
            "chunk or more. Change `network.mixer.window`."
        )

    def check() -> None:
        try:
            with torch.device("meta"):
                _built(_plain(node))
        except Exception as error:
            cause = list(_causes(error))[-1]
            if isinstance(cause, RuntimeError) and "negative dimension" in str(cause):
                raise ConfigError("a size of the network is negative; expected 1 or more. Change `network`.") from error
            if isinstance(cause, RuntimeError | NotImplementedError):
                return  # something that cannot be built without memory; whether it can with it, is seen later
            raise

    yield from complaints(check, "network")


def optimisation(cfg: DictConfig) -> Iterator[str]:
    """Optimiser and schedule are tried on one small matrix."""
    if not all(isinstance(cfg.get(name), DictConfig) for name in ("optimizer", "scheduler")):
        return
    if not 0 < cfg.optimizer.get("lr", 1.0) < float("inf"):
        return  # said elsewhere
    import torch

    from longtake.optimizers import HIDDEN

    made: list[Any] = []

    def optimizer() -> None:
        group = {"params": [torch.zeros(2, 2, requires_grad=True)], HIDDEN: True}
        made.append(_built(_plain(cfg.optimizer))([group]))

    def scheduler() -> None:
        _built(_plain(cfg.scheduler))(made[0])

    yield from complaints(optimizer, "optimizer")
    if made:
        yield from complaints(scheduler, "scheduler")


def callbacks(cfg: DictConfig) -> Iterator[str]:
    """Every callback is built once; the curriculum has a rule of its own."""
    for name, node in cfg.callbacks.items():
        if isinstance(node, DictConfig) and name not in ("curriculum", "best"):
            yield from complaints(lambda node=node: _built(_plain(node)), f"callbacks.{name}")


def curriculum(cfg: DictConfig) -> Iterator[str]:
    """Scheduled keys must be there, and each of their values as possible as if it had been set from the beginning."""
    node = cfg.callbacks.get("curriculum")
    if node is None or not node.get("enabled", True):
        return
    from callbacks.curriculum import check_schedules
    from launcher.check_model import diffusion

    made: list[Any] = []
    yield from complaints(lambda: made.append(_built(_plain(node))))
    for path, schedule in made[0].schedules.items() if made else ():
        known = OmegaConf.select(cfg, path, default=_ABSENT) is not _ABSENT and "._" not in path
        for _, value in schedule.points if known else ():
            changed = copy.deepcopy(cfg)
            OmegaConf.update(changed, path, value, merge=False)
            root = path.partition(".")[0]
            problems = check_targets(_plain(changed[root]), root) or list(diffusion(changed))
            if problems:
                yield f"callbacks.curriculum schedules {path}={value!r}, which cannot work: {problems[0]}"
                return
    if made:
        yield from complaints(lambda: check_schedules(made[0].schedules, _plain(cfg)))


def loop(cfg: DictConfig) -> Iterator[str]:
    """What Lightning would find after the run folder was made, or not at all."""
    every, limit, longest = (cfg.trainer.get(key) for key in ("val_check_interval", "limit_train_batches", "max_time"))
    whole = isinstance(every, int) and not isinstance(every, bool) and every >= 1
    if every is not None and not whole and not _is_duration(every):
        yield (
            f"trainer.val_check_interval is {every!r}; expected a whole number of training batches of 1 or more, or "
            "DD:HH:MM:SS. Change `trainer.val_check_interval`."
        )
    if limit is not None and not (isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1):
        yield (
            f"trainer.limit_train_batches is {limit!r}; expected a whole number of 1 or more, or null. Change "
            "`trainer.limit_train_batches`."
        )
    part = cfg.trainer.get("limit_val_batches")
    if isinstance(part, int | float) and part < 0:
        yield (
            f"trainer.limit_val_batches is {part!r}; expected a number of batches, a share from 0 to 1, or null. "
            "Change `trainer.limit_val_batches`."
        )
    if longest is not None and not _is_duration(longest):
        yield f"trainer.max_time is {longest!r}; expected DD:HH:MM:SS above zero, or null. Change `trainer.max_time`."


def _is_duration(value: Any) -> bool:
    try:
        days, hours, minutes, seconds = (int(part) for part in str(value).split(":"))
        return timedelta(days, seconds, 0, 0, minutes, hours) > timedelta(0)
    except (ValueError, OverflowError):
        return False


_ABSENT = object()


def _built(node: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all")


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


PART_RULES = [network, optimisation, callbacks, curriculum, loop]
