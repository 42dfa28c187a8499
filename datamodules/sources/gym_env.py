"""Clips recorded in any gymnasium environment that draws itself, with the actions of a seeded policy.

A task plays one environment from its own seed and cuts whole clips out of its episodes, so the same request
gives the same frames on any number of workers. `actions[t]` is what the policy chose to get from frame t-1 to
frame t, and the first row of an episode is zeros. No clip straddles a reset.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from datamodules.sources.base import RawSample, Skipped, Source, SourceInfo, Task
from datamodules.sources.clip_settings import positive_int, video_spec
from datamodules.sources.gym_spaces import column_names, flatten
from datamodules.sources.naming import plain, slug
from datamodules.sources.resize import RESIZE_MODES, fit_frame
from longtake.errors import BadSampleError, ConfigError, unknown_choice

log = logging.getLogger("longtake")
_FRUITLESS_EPISODES = 200  # in a row, each too short for a clip, before a task gives up


class GymnasiumSource(Source):
    """Clips of an environment under a policy; see `conf/source/gymnasium.yaml`."""

    def __init__(
        self,
        *,
        env_id: str | None,
        env_kwargs: dict[str, Any] | None,
        policy: str,
        policy_kwargs: dict[str, Any] | None,
        hold_frames: list[int],
        frame_skip: int,
        ignore_render_fps: bool,
        record_observations: bool,
        fps: Any,
        height: int,
        width: int,
        resize: str,
        clip_frames: int,
        num_clips: int | None,
        num_val_clips: int | None,
        num_test_clips: int | None,
        clips_per_task: int,
        caption: str | None,
        action_names: list[str] | None,
        seed: int,
        name: str | None,
        licence: str,
        origin: str | None,
    ) -> None:
        if not env_id:
            raise ConfigError("no environment was named; expected an id such as CartPole-v1. Change `source.env_id`.")
        if resize not in RESIZE_MODES:
            raise unknown_choice("resize mode", resize, RESIZE_MODES, "source.resize")
        hold = plain(hold_frames)
        if not isinstance(hold, list) or len(hold) != 2 or not 1 <= hold[0] <= hold[1]:
            raise ConfigError(
                f"hold_frames={hold!r}; expected [least, most] frames, from 1 on. Change `source.hold_frames`."
            )
        self._env_id, self._env_kwargs = env_id, plain(env_kwargs) or {}
        self._policy, self._policy_kwargs, self._hold = policy, plain(policy_kwargs) or {}, (hold[0], hold[1])
        self._frame_skip = positive_int(frame_skip, "source.frame_skip")
        self._ignore_render_fps, self._record_observations = ignore_render_fps, record_observations
        self._video, self._resize = video_spec(fps, height, width), resize
        self._clip_frames = positive_int(clip_frames, "source.clip_frames")
        self._clips_per_task = positive_int(clips_per_task, "source.clips_per_task")
        self._counts = _clip_counts(num_clips, num_val_clips, num_test_clips)
        self._caption, self._action_names, self._seed = caption, plain(action_names), seed
        self._name, self._licence = name, licence
        self._origin = origin or f"recorded in the gymnasium environment {env_id}, policy {policy}"

    def info(self) -> SourceInfo:
        env = self._make()
        try:
            names = column_names(env.action_space, "action", "source.env_id")
            states = (
                column_names(env.observation_space, "obs", "source.record_observations")
                if self._record_observations
                else []
            )
            self._check_fps(env)
            env.reset(seed=self._seed)
            self._render(env)
            self._make_policy(env, self._seed)
        finally:
            env.close()
        if self._action_names is not None and len(self._action_names) != len(names):
            raise ConfigError(
                f"{len(self._action_names)} action names were given, the actions of {self._env_id} have "
                f"{len(names)} columns ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}). Change "
                "`source.action_names`."
            )
        return SourceInfo(
            name=self._name or slug(self._env_id),
            licence=self._licence,
            origin=self._origin,
            video=self._video,
            action_names=tuple(self._action_names or names),
            state_names=tuple(states),
        )

    def tasks(self) -> list[Task]:
        tasks = []
        for split, count in self._counts.items():
            for number, first in enumerate(range(0, count, self._clips_per_task)):
                clips = min(self._clips_per_task, count - first)
                tasks.append(
                    Task(
                        f"{split}-{number:05d}",
                        split,
                        {"clips": clips, "seed": self._task_seed(split, number)},
                    )
                )
        if self._licence == "unspecified":
            log.info(
                "the licence of %s is recorded as unspecified; state it with `source.licence=...`",
                self._env_id,
            )
        return tasks

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        env = self._make()
        try:
            yield from self._play(env, task)
        finally:
            env.close()

    def _play(self, env: Any, task: Task) -> Iterator[RawSample | Skipped]:
        seed = task.payload["seed"]
        policy = self._make_policy(env, seed)
        made = fruitless = longest = number = 0
        while made < task.payload["clips"]:
            before, length = made, 0
            episode = f"{slug(self._env_id)}-{task.id}-e{number:04d}"
            try:
                for clip in self._episode(env, policy, (seed + number) % 2**31):
                    length += len(clip.frames)
                    if len(clip.frames) == self._clip_frames:
                        yield self._sample(clip, episode, made - before, (seed + number) % 2**31)
                        made += 1
                        if made == task.payload["clips"]:
                            return
            except BadSampleError as error:
                yield Skipped(episode, str(error))
            fruitless = 0 if made > before else fruitless + 1
            longest, number = max(longest, length), number + 1
            if fruitless == _FRUITLESS_EPISODES:
                yield Skipped(
                    task.id,
                    f"{fruitless} episodes in a row ended before a clip was whole; the longest had "
                    f"{longest} frames, a clip has {self._clip_frames} (source.clip_frames, "
                    "source.frame_skip, source.policy)",
                )
                return

    def _episode(self, env: Any, policy: Callable[[Any], Any], seed: int) -> Iterator[_Clip]:
        """Yields one episode in pieces of a clip each; the last piece may be shorter."""
        observation, _ = env.reset(seed=seed)
        if hasattr(policy, "reset"):
            policy.reset(seed)  # type: ignore[attr-defined]
        row = np.zeros(len(column_names(env.action_space, "action", "source.env_id")), np.float32)
        clip, over = _Clip(0), False
        while True:
            clip.frames.append(self._render(env))
            clip.actions.append(row)
            if self._record_observations:
                clip.states.append(flatten(env.observation_space, observation))
            if over or len(clip.frames) == self._clip_frames:
                yield clip
                clip = _Clip(clip.first + len(clip.frames))
            if over:
                return
            action = policy(observation)
            row = flatten(env.action_space, action)
            if not np.isfinite(row).all():
                raise BadSampleError("the policy gave an action that is not finite")
            for _ in range(self._frame_skip):
                observation, _, terminated, truncated, _ = env.step(action)
                over = bool(terminated or truncated)
                if over:
                    break

    def _sample(self, clip: _Clip, episode: str, number: int, seed: int) -> RawSample:
        return RawSample(
            key=f"{episode}_{number:03d}",
            episode=episode,
            views={"main": np.stack(clip.frames)},
            actions=np.stack(clip.actions),
            states=np.stack(clip.states) if clip.states else None,
            captions=[self._caption] if self._caption else [],
            meta={"env_id": self._env_id, "seed": seed, "first_frame": clip.first, "policy": self._policy},
            num_frames=len(clip.frames),
        )

    def _make(self) -> Any:
        import gymnasium

        if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame complains of a missing screen that nobody needs
        try:
            return gymnasium.make(self._env_id, **{**self._env_kwargs, "render_mode": "rgb_array"})
        except (
            gymnasium.error.Error,
            ImportError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"gymnasium cannot make {self._env_id!r} with render_mode rgb_array "
                f"({type(error).__name__}: {reason}); expected an installed environment, '<module>:<id>' "
                "for one of your own. Change `source.env_id` or `source.env_kwargs`."
            ) from error

    def _make_policy(self, env: Any, seed: int) -> Callable[[Any], Any]:
        if self._policy == "random":
            return RandomPolicy(
                env.observation_space, env.action_space, seed, hold_frames=self._hold, **self._policy_kwargs
            )
        module, _, name = self._policy.rpartition(".")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"the policy {self._policy!r} cannot be imported ({error}); expected 'random' or the dotted "
                "path of a class that is called with (observation_space, action_space, seed). Change "
                "`source.policy`."
            ) from error
        policy = factory(env.observation_space, env.action_space, seed, **self._policy_kwargs)
        if not callable(policy):
            raise ConfigError(
                f"{self._policy} gave a {type(policy).__name__}; expected a callable policy(observation). "
                "Change `source.policy`."
            )
        return policy

    def _render(self, env: Any) -> np.ndarray:
        picture = env.render()
        if (
            not isinstance(picture, np.ndarray)
            or picture.dtype != np.uint8
            or picture.ndim != 3
            or picture.shape[2] != 3
        ):
            got = (
                f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
            )
            raise ConfigError(
                f"{self._env_id} renders {got}; expected a uint8 picture [height, width, 3] (render_mode "
                "rgb_array). Change `source.env_id`."
            )
        image = Image.fromarray(np.ascontiguousarray(picture))
        return fit_frame(image, height=self._video.height, width=self._video.width, mode=self._resize)

    def _check_fps(self, env: Any) -> None:
        render_fps = env.metadata.get("render_fps")
        if self._ignore_render_fps or not isinstance(render_fps, (int, float)) or render_fps <= 0:
            return
        shown = Fraction(render_fps).limit_denominator(1000) / self._frame_skip
        if abs(shown / self._video.fps - 1) > Fraction(1, 100):
            raise ConfigError(
                f"{self._env_id} runs at {render_fps} fps, which with frame_skip {self._frame_skip} gives "
                f"{float(shown):g} fps, and video.fps is {float(self._video.fps):g}; expected the same. "
                f"Change `video.fps` (to {shown}) or `source.frame_skip`, or record it as it is with "
                "`source.ignore_render_fps=true`."
            )

    def _task_seed(self, split: str, number: int) -> int:
        digest = hashlib.sha256(f"{self._seed}/{self._env_id}/{split}/{number}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 2**31


@dataclass
class _Clip:
    first: int
    frames: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)


class RandomPolicy:
    """Draws actions from the action space and holds each for a random number of frames."""

    def __init__(self, observation_space: Any, action_space: Any, seed: int, *, hold_frames: tuple[int, int]) -> None:
        del observation_space  # a random policy does not look
        self._space, self._hold = action_space, hold_frames
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Starts a new episode: what follows is a pure function of the seed."""
        self._space.seed(seed)
        self._random = np.random.default_rng(seed)
        self._left, self._action = 0, None

    def __call__(self, observation: Any) -> Any:
        """Returns the action for the next frame."""
        if self._left == 0:
            self._action = self._space.sample()
            self._left = int(self._random.integers(self._hold[0], self._hold[1] + 1))
        self._left -= 1
        return self._action


def _clip_counts(train: int | None, val: int | None, test: int | None) -> dict[str, int]:
    """Returns the number of clips of each split that has any."""
    counts = {"train": 200 if train is None else train}
    counts["val"] = max(1, counts["train"] // 20) if val is None else val
    counts["test"] = test or 0
    for split, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            key = "num_clips" if split == "train" else f"source.num_{split}_clips"
            raise ConfigError(f"{count!r} is not a number of clips; expected a whole number from 0 on. Change `{key}`.")
    if not any(counts.values()):
        raise ConfigError("no clip was asked for in any split. Change `num_clips`.")
    return {split: count for split, count in counts.items() if count}
