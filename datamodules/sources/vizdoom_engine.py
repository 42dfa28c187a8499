"""One running game: starts the engine, applies one action for the tics of a frame, and reads what is seen.

The engine is a process of its own that renders in software, so no display is needed. It writes settings and
an empty folder into its working directory: both go into a temporary folder that is removed with the game.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.sources.vizdoom_worlds import World, find_wad
from longtake.errors import ConfigError, DataError

# One row of `actions`. Turning is in degrees over the whole frame, positive to the right (clockwise seen
# from above), so a positive turn moves the picture to the left and lowers the angle of the pose.
ACTION_NAMES = ("move_forward", "move_right", "turn_right_degrees", "attack", "use")
# One row of `states`: map units (a player is 32 wide, eyes 41 above z), degrees counter-clockwise from east.
STATE_NAMES = ("x", "y", "z", "angle_degrees")

ANGLE_STEP = 360.0 / 65536.0  # the engine turns by whole steps of this many degrees
MAX_PUSH = 127  # engine units in a tic; 25 walks, 50 runs
# Map units in one level of the engine's depth buffer, measured; the same at every render size.
DEPTH_UNIT = 7.1
_RENDERED = {"hud": False, "minimal_hud": False, "weapon": False, "crosshair": False, "messages": False}
_RENDERED |= {
    "decals": False,
    "particles": False,
    "screen_flashes": False,
    "effects_sprites": True,
    "corpses": True,
}
_START_TICS = 14  # the player is in place and the weapon is up
RENDER_SIZES = (
    (120, 160),
    (192, 256),
    (240, 320),
    (300, 400),
    (384, 512),
    (480, 640),
    (600, 800),
    (768, 1024),
)


class EngineStopped(RuntimeError):
    """The engine's process ended by itself; the caller may start the same game again."""


@dataclass(frozen=True)
class Thing:
    """An object in view: its category and name, and its box in the render, in pixels."""

    value: int
    category: str
    name: str
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Observation:
    """What one frame shows, at render size.

    Attributes:
        rgb: uint8 [h w 3].
        depth: uint8 [h w], levels of about 7.1 map units along the viewing direction, capped (`depth_cap`).
        labels: uint8 [h w], 0 walls and sky, 1 floors and ceilings, else the `value` of a thing.
        things: the objects in view.
        pose: float64 [4], columns as in STATE_NAMES.
    """

    rgb: np.ndarray
    depth: np.ndarray
    labels: np.ndarray
    things: tuple[Thing, ...]
    pose: np.ndarray


def depth_cap(render_height: int) -> int:
    """Returns the level at which the depth of walls and sky saturates; it depends on the render's rows."""
    return min(255, int(255 * render_height / 480))


class Game:
    """A game that runs, advanced a frame at a time. Use it as a context manager: the process ends with it."""

    def __init__(
        self,
        world: World,
        map_name: str,
        *,
        seed: int,
        render_size: tuple[int, int],
        tics_per_frame: int,
        move_speed: float,
    ) -> None:
        """Starts the engine.

        Args:
            world: where to play.
            map_name: one of its maps.
            seed: seed of everything random in the game.
            render_size: (height, width), one of RENDER_SIZES.
            tics_per_frame: game tics (1/35 s) for which an action is applied.
            move_speed: engine units of a full step forward or sideways (25 walks, 50 runs).
        """
        self.tics_per_frame = tics_per_frame
        self._move_speed = move_speed
        self._folder = tempfile.TemporaryDirectory(prefix="longtake-doom-")
        try:
            self._game = _configure(world, map_name, seed=seed, render_size=render_size, folder=Path(self._folder.name))
            # The engine inherits the working directory.
            with _engine_errors(), contextlib.chdir(self._folder.name):
                self._game.init()
            self.tic: int = self._game.get_episode_time()  # of the episode, counted on by every advance
            self.command("turbo 255")  # lifts the limit of a push from 50 to MAX_PUSH
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Game:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine's process and removes its temporary folder."""
        try:
            self._game.close()
        finally:
            self._folder.cleanup()

    @property
    def finished(self) -> bool:
        """Returns whether the episode has ended (the player died or left the map)."""
        with _engine_errors():
            return self._game.is_episode_finished() or self._game.is_player_dead()

    def command(self, text: str) -> None:
        """Sends a console command; it acts at the next tic."""
        with _engine_errors():
            self._game.send_game_command(text)

    def act(self, action: np.ndarray, *, tics: int | None = None, render: bool = True) -> None:
        """Applies an action, columns as in ACTION_NAMES, for a frame or for part of it; renders the last."""
        forward, right, turn, attack, use = (float(value) for value in action)
        pushes = [round(forward * self._move_speed), round(right * self._move_speed)]
        steps = round(turn / self.tics_per_frame / ANGLE_STEP)
        self._advance([*pushes, steps, attack > 0.5, use > 0.5], tics or self.tics_per_frame, render)

    def turn(self, degrees: float, *, render: bool = True) -> None:
        """Turns to the right by the whole steps nearest to `degrees`, in one tic."""
        self._advance([0, 0, round(degrees / ANGLE_STEP), False, False], 1, render)

    def push(self, forward: int, right: int) -> None:
        """Pushes the player for one tic by engine units, MAX_PUSH at most; nothing is rendered."""
        self._advance([forward, right, 0, False, False], 1, False)

    def idle(self, tics: int) -> None:
        """Lets some tics pass without an action; nothing is rendered."""
        self._advance([0, 0, 0, False, False], tics, False)

    def _advance(self, buttons: list[int], tics: int, render: bool) -> None:
        forward, right, steps, attack, use = buttons
        # The engine rounds down to whole units and whole steps of an angle.
        values = [forward + 0.5, right + 0.5, (steps + 0.5) * ANGLE_STEP, float(attack), float(use)]
        with _engine_errors():
            self._game.set_action(values)
            self._game.advance_action(tics, render)
        self.tic += tics

    @property
    def angle(self) -> float:
        """Returns where the player faces, degrees counter-clockwise from east, as of the last render."""
        return self._variable("ANGLE")

    @property
    def velocity(self) -> np.ndarray:
        """Returns how far the player moves in a tic now along x, y, z, in map units, as of the last render."""
        return np.array([self._variable(f"VELOCITY_{axis}") for axis in "XYZ"])

    @property
    def eye_height(self) -> float:
        """Returns the height of the eye in the map, as of the last render; it follows a stair with a delay."""
        return self._variable("CAMERA_POSITION_Z")

    @property
    def is_weapon_ready(self) -> bool:
        """Returns whether the weapon is neither firing nor being changed, as of the last render."""
        return self._variable("ATTACK_READY") > 0

    def _variable(self, name: str) -> float:
        import vizdoom

        with _engine_errors():
            return float(self._game.get_game_variable(getattr(vizdoom.GameVariable, name)))

    def whole_turn(self, degrees: float) -> float:
        """Returns the turn nearest to `degrees` that one frame can make exactly."""
        step = ANGLE_STEP * self.tics_per_frame
        return round(degrees / step) * step

    def look(self) -> Observation | None:
        """Returns what is seen now, or None when the episode has ended."""
        if self.finished:
            return None
        with _engine_errors():
            state = self._game.get_state()
        if state is None:
            return None
        things = tuple(
            Thing(
                label.value,
                label.object_category,
                label.object_name,
                label.x,
                label.y,
                label.width,
                label.height,
            )
            for label in state.labels
        )
        return Observation(
            rgb=state.screen_buffer,
            depth=np.minimum(state.depth_buffer, depth_cap(state.depth_buffer.shape[0])),
            labels=state.labels_buffer,
            things=things,
            pose=np.array(state.game_variables),
        )


def _configure(world: World, map_name: str, *, seed: int, render_size: tuple[int, int], folder: Path) -> Any:
    """Returns a game that is set up but not started."""
    import vizdoom  # only workers load the engine

    game = vizdoom.DoomGame()
    game.set_doom_config_path(str(folder / "engine.ini"))
    game.set_doom_game_path(str(find_wad(world.iwad, f"source.worlds.{world.name}.iwad")))
    if world.wad is not None:
        game.set_doom_scenario_path(str(find_wad(world.wad, f"source.worlds.{world.name}.wad")))
    game.set_doom_map(map_name)
    game.set_doom_skill(world.skill)
    game.set_seed(seed)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_episode_timeout(0)
    game.set_episode_start_time(_START_TICS)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    height, width = render_size
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{width}X{height}"))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_labels_buffer_enabled(True)
    for part, shown in _RENDERED.items():
        getattr(game, f"set_render_{part}")(shown)
    buttons = (
        "MOVE_FORWARD_BACKWARD_DELTA",
        "MOVE_LEFT_RIGHT_DELTA",
        "TURN_LEFT_RIGHT_DELTA",
        "ATTACK",
        "USE",
    )
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
    variables = ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE")
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in variables])
    game.add_game_args("+sv_cheats 1 +sv_infiniteammo 1 +cl_showsecretmessage 0 +con_midtime 0")
    return game


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turns the engine's own errors into ours."""
    import vizdoom

    try:
        yield
    except vizdoom.FileDoesNotExistException as error:
        raise ConfigError(f"the engine cannot open a file: {error}. Change `source.worlds`.") from error
    except (vizdoom.ViZDoomUnexpectedExitException, vizdoom.ViZDoomErrorException) as error:
        raise EngineStopped(str(error).rstrip(".")) from error
    except vizdoom.ViZDoomIsNotRunningException as error:
        raise EngineStopped("the engine is not running") from error
    except vizdoom.MessageQueueException as error:
        raise EngineStopped(str(error)) from error
    except vizdoom.SharedMemoryException as error:
        raise DataError(
            f"the engine gets no shared memory: {error}. Free some under /dev/shm, or lower the number of workers."
        ) from error
