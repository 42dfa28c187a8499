"""Actions and observations of a gymnasium environment as one row of named numbers.

Discrete(n), each part of MultiDiscrete    one column a choice, 1 for the one taken
MultiBinary(n)                             one column a switch, 0 or 1
Box                                        its components as they are
Dict, Tuple                                their parts one after the other, names joined with "_"
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from longtake.errors import ConfigError

_MOST_COLUMNS = 4096


def column_names(space: spaces.Space, prefix: str, key: str) -> list[str]:
    """Returns the names of the columns of a space.

    Args:
        space: an action or observation space.
        prefix: what the names begin with.
        key: configuration key to name in the error.

    Raises:
        ConfigError: the space cannot be written as a row of numbers (text, graphs, sequences, or thousands of
            numbers).
    """
    names = _names(space, prefix, key)
    if len(names) > _MOST_COLUMNS:
        raise ConfigError(
            f"a space of {len(names)} numbers is too large for one row; expected up to {_MOST_COLUMNS}. Change `{key}`."
        )
    return names


def flatten(space: spaces.Space, value: Any) -> np.ndarray:
    """Returns a value of a space as one row, float32 [columns], in the order of `column_names`."""
    if isinstance(space, spaces.Discrete):
        return _one_hot(int(value) - int(space.start), int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        choices = (np.asarray(value) - space.start).ravel()
        return np.concatenate([_one_hot(int(c), int(n)) for c, n in zip(choices, space.nvec.ravel(), strict=True)])
    if isinstance(space, spaces.Dict):
        return np.concatenate([flatten(part, value[name]) for name, part in space.spaces.items()])
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flatten(part, item) for part, item in zip(space.spaces, value, strict=True)])
    return np.asarray(value, np.float32).reshape(-1)


def _names(space: spaces.Space, prefix: str, key: str) -> list[str]:
    if isinstance(space, spaces.Discrete):
        return [f"{prefix}_{index}" for index in range(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return [f"{prefix}_{part}_{index}" for part, n in enumerate(space.nvec.ravel()) for index in range(int(n))]
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return [f"{prefix}_{index}" for index in range(int(np.prod(space.shape)))]
    if isinstance(space, spaces.Dict):
        return [name for part, inner in space.spaces.items() for name in _names(inner, f"{prefix}_{part}", key)]
    if isinstance(space, spaces.Tuple):
        return [name for part, inner in enumerate(space.spaces) for name in _names(inner, f"{prefix}_{part}", key)]
    raise ConfigError(
        f"a space of type {type(space).__name__} has no fixed row of numbers; expected Discrete, "
        f"MultiDiscrete, MultiBinary, Box, or a Dict or Tuple of these. Change `{key}`."
    )


def _one_hot(choice: int, count: int) -> np.ndarray:
    row = np.zeros(count, np.float32)
    row[choice] = 1
    return row
