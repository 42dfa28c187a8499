"""One episode: starts a game at an open place, lets the wanderer play, and cuts what is seen into clips."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from datamodules.sources.base import RawSample, Skipped
from datamodules.sources.vizdoom_captions import categories_in_view, make_captions
from datamodules.sources.vizdoom_engine import ACTION_NAMES, Game, Observation
from datamodules.sources.vizdoom_frames import to_depth, to_labels, to_rgb
from datamodules.sources.vizdoom_policy import Wanderer, clearance
from datamodules.sources.vizdoom_rig import Residual, Rig, View, merge_residuals
from datamodules.sources.vizdoom_worlds import World, find_wad, item_spots

_SETTLE_TICS = 8
_MAX_SPOTS = 12  # places tried for a start that is not a closet
_OPEN = 170.0  # map units: mean reach of an open direction
_TURN = ACTION_NAMES.index("turn_right_degrees")
_CONTROLS = {"depth": to_depth, "labels": to_labels}


@dataclass(frozen=True)
class EpisodeSettings:
    """What all episodes of a source share."""

    size: tuple[int, int]
    render_size: tuple[int, int]
    tics_per_frame: int
    move_speed: float
    views: tuple[View, ...]
    is_rig: bool
    control_types: tuple[str, ...]


@dataclass
class _Take:
    """The frames of a clip as they come."""

    views: dict[str, list[np.ndarray]]
    control: dict[str, dict[str, list[np.ndarray]]]
    actions: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    in_view: list[frozenset[str]] = field(default_factory=list)
    residuals: list[Residual] = field(default_factory=list)


class Episode:
    """A running game and its wanderer. Use it as a context manager."""

    def __init__(self, world: World, map_name: str, seed: int, settings: EpisodeSettings) -> None:
        self._world = world
        self._map_name = map_name
        self._seed = seed
        self._settings = settings
        self._rng = np.random.default_rng(seed)
        self._spots = item_spots(find_wad(world.iwad, "source.worlds"), map_name) if world.scatter else []
        self._game = Game(
            world,
            map_name,
            seed=seed,
            render_size=settings.render_size,
            tics_per_frame=settings.tics_per_frame,
            move_speed=settings.move_speed,
        )
        self._game.command("god")  # this one toggles: once a game
        self._game.command("give all")
        self._rig: Rig | None = None
        self._wanderer: Wanderer | None = None
        self._action = np.zeros(len(ACTION_NAMES))
        self._num_frames = 0  # since the start that the next clip belongs to

    def __enter__(self) -> Episode:
        return self

    def __exit__(self, *_: object) -> None:
        self._game.close()

    def record(self, key: str, episode: str, num_frames: int) -> RawSample | Skipped:
        """Plays on and returns the next clip, or Skipped when the episode ends before it is whole."""
        if self._wanderer is None or self._world.scatter:
            self._start()
        first_frame = self._num_frames
        names = [view.name for view in self._settings.views]
        take = _Take(
            views={name: [] for name in names},
            control={kind: {name: [] for name in names} for kind in self._settings.control_types},
        )
        for index in range(num_frames):
            seen = self._next_frame(take)
            if seen is None:
                return Skipped(key, f"the player died or left the map after {index} of {num_frames} frames")
            self._action = self._choose(seen)
        return self._to_sample(take, key, episode, first_frame)

    def _start(self) -> None:
        """Brings the player to an open place, facing where there is something to see."""
        game = self._game
        if self._rig is not None:
            self._rig.release()
        game.idle(_SETTLE_TICS)
        for _ in range(_MAX_SPOTS if self._spots else 1):
            if self._spots:
                x, y = self._spots[int(self._rng.integers(len(self._spots)))]
                game.command(f"warp {x} {y}")
                game.idle(_SETTLE_TICS)
            reaches = self._look_around()
            if sum(reach > _OPEN for reach in reaches) >= 2:
                break
        best = float(np.argmax(np.array(reaches) * self._rng.uniform(0.5, 1.0, len(reaches))))
        game.turn(best * 360.0 / len(reaches) + float(self._rng.uniform(-20.0, 20.0)))
        self._wanderer = Wanderer(self._rng, fights=self._world.monsters)
        self._action = np.zeros(len(ACTION_NAMES))
        self._num_frames = 0
        self._rig = Rig(game, list(self._settings.views)) if self._settings.is_rig else None

    def _look_around(self) -> list[float]:
        """Returns how far the view reaches in four directions; the player faces the first again."""
        reaches = []
        for _ in range(4):
            seen = self._game.look()
            reaches.append(0.0 if seen is None else float(clearance(seen.depth).columns.mean()))
            self._game.turn(90.0)
        return reaches

    def _next_frame(self, take: _Take) -> Observation | None:
        """Plays one frame with the chosen action, adds it to the take and returns what the player sees."""
        views = self._settings.views
        if self._rig is None:
            if self._num_frames > 0:
                self._game.act(self._action)
            front = self._game.look()
            seen = {} if front is None else {views[0].name: front}
            pose = None if front is None else front.pose
        else:
            self._rig.advance(self._action)
            shot = self._rig.shoot()
            front = None if shot is None else shot.front
            seen, pose = ({}, None) if shot is None else (shot.seen, shot.front.pose)
            if shot is not None:
                take.residuals.append(shot.residual)
        if front is None or pose is None:
            return None
        for view in views:
            take.views[view.name].append(to_rgb(seen[view.name], self._settings.size, view.fov))
            for kind, frames in take.control.items():
                frames[view.name].append(_CONTROLS[kind](seen[view.name], self._settings.size, view.fov))
        take.actions.append(self._action)
        take.states.append(pose)
        take.in_view.append(categories_in_view(front))
        self._num_frames += 1
        return front

    def _choose(self, seen: Observation) -> np.ndarray:
        assert self._wanderer is not None, "choose before start"
        action = self._wanderer.choose(seen)
        action[_TURN] = self._game.whole_turn(action[_TURN])
        return action

    def _to_sample(self, take: _Take, key: str, episode: str, first_frame: int) -> RawSample:
        actions = np.array(take.actions, dtype=np.float32)
        meta = {
            "world": self._world.name,
            "map": self._map_name,
            "seed": self._seed,
            "first_frame": first_frame,
            "tics_per_frame": self._settings.tics_per_frame,
        }
        if take.residuals:
            meta["rig_residual"] = merge_residuals(take.residuals)
        return RawSample(
            key=key,
            episode=episode,
            views={name: np.stack(frames) for name, frames in take.views.items()},
            control={
                kind: {name: np.stack(frames) for name, frames in by_view.items()}
                for kind, by_view in take.control.items()
            },
            actions=actions,
            states=np.array(take.states, dtype=np.float32),
            captions=make_captions(self._world.place, actions, take.in_view),
            meta=meta,
            num_frames=len(actions),
        )
