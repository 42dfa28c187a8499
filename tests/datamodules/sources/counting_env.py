"""An environment and policies for tests: every picture spells the number of its step."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.datamodules.sources.numbered_clips import numbered_frame

ACTIONS = {
    "discrete": spaces.Discrete(3, start=1),
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "multi": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(2),
    "dict": spaces.Dict({"move": spaces.Discrete(2), "look": spaces.Box(-5, 5, (2,), np.float32)}),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(1))),
    "text": spaces.Text(5),
}


class CountingEnv(gymnasium.Env):
    """Counts its steps; an episode ends after `length` of them."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, *, length: int = 100, actions: str = "discrete") -> None:
        self.render_mode, self.length = render_mode, length
        self.action_space = ACTIONS[actions]
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.offset = 0, int(self.np_random.integers(0, 100))
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self._observation(), 0.0, self.steps >= self.length, False, {}

    def render(self) -> np.ndarray:
        return numbered_frame(self.steps)

    def _observation(self) -> np.ndarray:
        return np.array([self.steps, self.offset], np.float64)


class StepPolicy:
    """Answers with what it was given, so that a test can tell which step an action belongs to."""

    def __init__(self, observation_space: Any, action_space: Any, seed: int, scale: float = 1.0) -> None:
        assert observation_space.shape == (2,)
        assert action_space.shape == (2,)
        self.scale = scale

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        return np.array([observation[0] + 1, 1], np.float32) * self.scale


gymnasium.register("Counting-v0", entry_point=CountingEnv, disable_env_checker=True, order_enforce=False)
