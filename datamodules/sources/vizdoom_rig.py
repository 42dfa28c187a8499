"""Several views of one instant of the game: time stands still while the player turns from view to view.

Time is stopped by giving the player the engine's time freezer. Given before a tic that starts at an odd
time it acts one tic later, which is what is done here, before the last tic of a frame; at an even time it acts
at once. (The `freeze` command also stops time, but the engine obeys it at every fourth tic only, so frames of
three tics could not be cut with it.) The player does not freeze and would slide on for some forty tics, so it
is pushed back until it stands: every frame starts at rest, and all views have the same eye. Scripts of a map,
lifts and flickering lights do not freeze either. They go on for the ten tics or so that a shot takes, so each
shot looks forward once more at its end and reports what has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.sources.vizdoom_engine import ACTION_NAMES, MAX_PUSH, Game, Observation
from datamodules.sources.vizdoom_frames import RENDER_FOV
from longtake.errors import ConfigError

_MAX_REST_TICS = 240  # a player who falls from high needs many
_MAX_PUSHES = 8
_MAX_FLASH_TICS = 60
_DAZE_TICS = 24
_ATTACK = ACTION_NAMES.index("attack")
_PUSH_UNITS, _FRICTION, _STOP_SPEED = 32.0, 0.90625, 0.0625  # of the engine: v' = (v + push / 32) * friction
_FREEZE, _UNFREEZE = "give PowerTimeFreezer", "take PowerTimeFreezer"


@dataclass(frozen=True)
class View:
    """One camera: turned by `yaw` degrees to the right of the player, `fov` degrees wide (at most 90)."""

    name: str
    yaw: float
    fov: float


@dataclass(frozen=True)
class Residual:
    """How far the views of one instant are from being taken by one eye at one time.

    Attributes:
        position: largest distance in map units between the player's positions in two views.
        angle: largest difference in degrees between a view's direction and what its yaw asks for.
        changed: mean difference, in levels of 0..255, between the forward view and the same seen again
            after all others.
        rest_tics: tics that passed, in frozen time, until the player was at rest.
    """

    position: float
    angle: float
    changed: float
    rest_tics: int


@dataclass(frozen=True)
class Shot:
    """All views of one instant.

    Attributes:
        seen: what each view sees, by its name; views of one direction share it.
        front: what the player sees, which is what a view at yaw 0 sees.
        residual: how well the views fit together.
    """

    seen: dict[str, Observation]
    front: Observation
    residual: Residual


def merge_residuals(residuals: Sequence[Residual]) -> dict[str, float]:
    """Returns the worst of each residual over the frames of a clip, with units in the names."""
    changed = [residual.changed for residual in residuals]
    return {
        "position_map_units": max(residual.position for residual in residuals),
        "angle_degrees": max(residual.angle for residual in residuals),
        "front_view_changed_levels_max": max(changed),
        "front_view_changed_levels_mean": sum(changed) / len(changed),
        "rest_tics": max(residual.rest_tics for residual in residuals),
    }


def parse_views(rig: Mapping[str, Any]) -> list[View]:
    """Returns the views of a rig in its order. Raises ConfigError naming the key that cannot be."""
    views: list[View] = []
    places: list[tuple[int, int]] = []
    for name, settings in dict(rig["views"]).items():
        key = f"source.rig.views.{name}"
        if not str(name).replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"view name {name!r} is not made of letters, digits, - and _. Change `{key}`.")
        if not settings or settings.get("yaw") is None:
            raise ConfigError(f"view {name} has no yaw; expected degrees to the right of forward. Change `{key}.yaw`.")
        fov = float(settings.get("fov", RENDER_FOV))
        if not 1.0 <= fov <= RENDER_FOV:
            raise ConfigError(f"view {name} has fov {fov:g}; expected 1 to {RENDER_FOV:g} degrees. Change `{key}.fov`.")
        place = settings.get("place")
        if not isinstance(place, Sequence) or len(place) != 2 or min(int(index) for index in place) < 0:
            raise ConfigError(f"view {name} has place {place!r}; expected [row, column]. Change `{key}.place`.")
        places.append((int(place[0]), int(place[1])))
        if places.count(places[-1]) > 1:
            raise ConfigError(f"two views are at place {places[-1]}; expected one each. Change `{key}.place`.")
        views.append(View(str(name), float(settings["yaw"]) % 360.0, fov))
    if not views:
        raise ConfigError("the rig has no views; expected at least one. Change `source.rig.views`.")
    return views


class Rig:
    """Advances a game by frames of which each is seen by all views."""

    def __init__(self, game: Game, views: list[View]) -> None:
        self._game = game
        self._yaws = sorted({view.yaw for view in views})
        self._views = views
        self._frozen = False
        self._fires = False

    def advance(self, action: np.ndarray) -> None:
        """Applies an action for one frame and stops time at its end."""
        tics = self._game.tics_per_frame
        if (self._game.tic + tics) % 2:
            self._game.idle(1)
        self.release()
        if tics > 1:
            self._game.act(action, tics=tics - 1, render=False)
        self._fires = bool(action[_ATTACK] > 0.5)
        self._game.command(_FREEZE)
        self._game.act(action, tics=1)  # rendered, so that the velocity can be read
        self._frozen = True

    def release(self) -> None:
        """Lets time run again."""
        if self._frozen:
            self._game.command(_UNFREEZE)
            self._frozen = False

    def shoot(self) -> Shot | None:
        """Returns all views of the stopped instant, or None when the episode ended."""
        front, rest_tics = self._come_to_rest()
        if front is None:
            return None
        shot = self._turn_around(front, rest_tics)
        if shot is not None and shot.residual.angle > 1.0:  # one who was just teleported cannot turn
            self._game.idle(_DAZE_TICS)
            seen = self._turn_to(front.pose[3])
            shot = None if seen is None else self._turn_around(seen, rest_tics + _DAZE_TICS)
        return shot

    def _turn_around(self, front: Observation, rest_tics: int) -> Shot | None:
        heading = front.pose[3]
        by_yaw: dict[float, Observation] = {}
        for yaw in self._yaws:
            seen = front if yaw == 0.0 else self._turn_to(heading - yaw)
            if seen is None:
                return None
            by_yaw[yaw] = seen
        again = self._turn_to(heading)
        if again is None:
            return None
        poses = np.array([seen.pose for seen in by_yaw.values()])
        asked = (heading - np.array(list(by_yaw)) - poses[:, 3] + 180.0) % 360.0 - 180.0
        eyes = poses[:, :3]
        residual = Residual(
            position=float(np.linalg.norm(eyes[:, None] - eyes[None], axis=-1).max()),
            angle=float(np.abs(asked).max()),
            changed=float(np.abs(again.rgb.astype(np.int16) - front.rgb).mean()),
            rest_tics=rest_tics,
        )
        return Shot(seen={view.name: by_yaw[view.yaw] for view in self._views}, front=front, residual=residual)

    def _come_to_rest(self) -> tuple[Observation | None, int]:
        """Waits until body, eye and weapon are at rest; returns what is seen then, and the tics it took."""
        tics, eye_height = 0, np.nan
        while True:
            tics += self._push_back(self._game.velocity)
            self._game.turn(0.0)  # a tic without a push stops what is slow; what is read is read anew
            tics += 1
            seen = self._game.look()
            is_flashing = self._fires and not self._game.is_weapon_ready and tics < _MAX_FLASH_TICS
            is_still = self._game.eye_height == eye_height and not self._game.velocity.any()
            if seen is None or (is_still and not is_flashing) or tics > _MAX_REST_TICS:
                return seen, tics
            if is_still:
                self._game.idle(2)  # the flash of the weapon lights the room
                tics += 2
            eye_height = self._game.eye_height

    def _push_back(self, velocity: np.ndarray) -> int:
        """Pushes against a velocity until it should be gone; returns the tics used."""
        heading = np.radians(self._game.angle)
        forward = np.array([np.cos(heading), np.sin(heading)])
        axes = np.stack([forward, [forward[1], -forward[0]]])  # forward and right, by rows
        speed, tics = axes @ velocity[:2], 0
        while np.abs(speed).max() > _STOP_SPEED / 2 and tics < _MAX_PUSHES:
            push = np.clip(np.rint(-speed * _PUSH_UNITS), -MAX_PUSH, MAX_PUSH)
            self._game.push(int(push[0]), int(push[1]))
            speed = (speed + push / _PUSH_UNITS) * _FRICTION
            tics += 1
        return tics

    def _left_to(self, angle: float) -> float:
        """Returns the turn to the right, in degrees, that makes the player face `angle`."""
        return (self._game.angle - angle + 180.0) % 360.0 - 180.0

    def _turn_to(self, angle: float) -> Observation | None:
        self._game.turn(self._left_to(angle), render=True)
        return self._game.look()
