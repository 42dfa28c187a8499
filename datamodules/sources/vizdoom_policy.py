"""A seeded wanderer: walks, turns, looks around, finds doorways, keeps off walls, shoots at monsters.

What it does next is drawn at random for a few frames at a time, so that the next second cannot be told from
the last one without the actions. Turns speed up and slow down over a few frames. Long looks to the side and
back, and turns right round, bring into view again what was seen before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from datamodules.sources.vizdoom_engine import DEPTH_UNIT, Observation

# Map units to what is ahead. A player who stops pushing slides on for three times what a frame moved.
_TIGHT, _NEAR, _FREE = 36.0, 80.0, 120.0  # below: go backwards; turn elsewhere; slow down
_HALF_BODY = 14.0  # map units to either side that must be free to walk through (a wall can be 16 away)
_STUCK_STEP = 3.0  # map units; a frame of walking that moves less is stuck
_MAX_TURN_CHANGE = 3.0  # degrees a frame, from one frame to the next
_TURN_SPEEDS = ((0.25, 0.0, 0.0), (0.50, 1.0, 4.0), (0.25, 4.0, 7.0))  # share, least and most degrees a frame
_BINS = 72  # headings for which the wanderer remembers how far it could see


@dataclass
class _Plan:
    """What the wanderer is doing: speeds held for some frames, then the next plan."""

    frames: int
    forward: float = 0.0
    right: float = 0.0
    turn: float = 0.0
    bold: bool = False  # walk on until something is very near
    then: _Plan | None = None


@dataclass(frozen=True)
class Clearance:
    """How far it is to the nearest wall or object, in map units.

    Attributes:
        left, right: mean over the outer parts of the view.
        ahead: to what stands in the way of walking straight on.
        columns: in evenly spaced columns of the view, [n].
        angles: degrees to the right of each of those columns, [n].
    """

    left: float
    ahead: float
    right: float
    columns: np.ndarray
    angles: np.ndarray


def clearance(depth: np.ndarray) -> Clearance:
    """Returns how far it is to walls and objects, from a depth image (90 degrees wide) around eye height."""
    height, width = depth.shape
    step = max(1, width // 64)
    columns = (depth[int(0.44 * height) : int(0.60 * height), step // 2 :: step].min(axis=0) + 0.5) * DEPTH_UNIT
    tangents, angles = _column_angles(columns.size)
    in_the_way = columns[(np.abs(columns * tangents) < _HALF_BODY) & (np.abs(tangents) < 0.6)]
    sides = columns.size * 2 // 5
    return Clearance(
        left=float(columns[:sides].mean()),
        ahead=float(in_the_way.min(initial=columns.max())),
        right=float(columns[-sides:].mean()),
        columns=columns,
        angles=angles,
    )


@functools.cache
def _column_angles(num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tangents and degrees to the right of evenly spaced columns of a view 90 degrees wide."""
    tangents = (np.arange(num_columns) + 0.5) / (num_columns / 2) - 1.0
    return tangents, np.degrees(np.arctan(tangents))


def angle_difference(target: float, angle: float) -> float:
    """Returns target - angle in degrees, in -180..180."""
    return (target - angle + 180.0) % 360.0 - 180.0


class Wanderer:
    """Chooses each action from what was seen so far; the same seed and views give the same actions."""

    def __init__(self, rng: np.random.Generator, *, fights: bool, max_turn: float = 8.0) -> None:
        """Starts without a memory.

        Args:
            rng: its only source of chance.
            fights: whether to shoot at monsters.
            max_turn: degrees a frame at most.
        """
        self._rng = rng
        self._fights = fights
        self._max_turn = max_turn
        self._turn = 0.0
        self._heading: float | None = None  # degrees of the pose to turn to, where the way was blocked
        self._reach = np.zeros(_BINS)
        self._position: np.ndarray | None = None
        self._moved = np.inf
        self._stuck_frames = 0
        self._fight_frames = 0
        self._sidestep = 0.0
        self._plan = self._next_plan()

    def choose(self, seen: Observation) -> np.ndarray:
        """Returns the next action, float64 [5], columns as in ACTION_NAMES (turns not rounded to steps)."""
        free = clearance(seen.depth)
        self._remember(seen.pose, free)
        self._plan.frames -= 1
        if self._plan.frames < 0:
            self._plan = self._plan.then or self._next_plan()
        plan = self._plan
        forward, right, turn, attack = plan.forward, plan.right, plan.turn, 0.0

        target = self._target(seen)
        if target is not None:
            turn = 0.5 * target
            attack, right = float(abs(target) < 9.0), self._sidestep
        elif self._heading is not None or free.ahead < (_TIGHT if plan.bold or forward <= 0 else _NEAR):
            turn = self._turn_elsewhere(seen.pose[3], free)
            right = 0.0
        if forward > 0 or free.ahead < _TIGHT:
            speed = float(np.clip((free.ahead - _TIGHT) / (_FREE - _TIGHT), -1.0, 1.0))
            forward = max(round(speed * 4) / 4, 0.25 if plan.bold else -1.0)
        right = self._keep_off(right, free)

        use = float(self._is_stuck(forward, free))  # what is in the way may be a door
        step = np.clip(turn - self._turn, -_MAX_TURN_CHANGE, _MAX_TURN_CHANGE)
        self._turn = float(np.clip(self._turn + step, -self._max_turn, self._max_turn))
        return np.array([forward, right, self._turn, attack, use])

    def _remember(self, pose: np.ndarray, free: Clearance) -> None:
        """Notes how far the view reaches in each heading; it is forgotten while walking away."""
        if self._position is not None:
            self._moved = float(np.linalg.norm(pose[:2] - self._position))
            self._reach *= np.exp(-self._moved / 250.0)
        self._position = pose[:2]
        headings = (pose[3] - free.angles) % 360.0
        bins = (headings / (360.0 / _BINS)).astype(int) % _BINS
        counts = np.bincount(bins, minlength=_BINS)
        sums = np.bincount(bins, weights=free.columns, minlength=_BINS)
        self._reach = np.where(counts > 0, sums / np.maximum(counts, 1), self._reach)

    def _turn_elsewhere(self, angle: float, free: Clearance) -> float:
        """Returns the turn towards a heading in which the view reaches far; chooses one if there is none."""
        if self._heading is None:
            headings = (np.arange(_BINS) + 0.5) * 360.0 / _BINS
            away = np.abs((headings - angle + 180.0) % 360.0 - 180.0)
            unknown = self._reach < 1.0
            promise = np.where(unknown, 200.0, self._reach) * self._rng.uniform(0.4, 1.0, _BINS)
            self._heading = float(headings[np.argmax(np.where(away > 20.0, promise, 0.0))])
        left = -angle_difference(self._heading, angle)
        if abs(left) < 8.0:
            self._heading = None
            self._plan = _Plan(int(self._rng.integers(5, 14)), forward=1.0, bold=True)
        return 0.3 * left

    @staticmethod
    def _keep_off(right: float, free: Clearance) -> float:
        """Returns the step to the side, the other way where a wall is near on this one."""
        if right and (free.right if right > 0 else free.left) < _NEAR:
            return -right if (free.left if right > 0 else free.right) > _NEAR else 0.0
        return right

    def _is_stuck(self, forward: float, free: Clearance) -> bool:
        """Returns whether walking has not moved the player for some frames; then the plan is to get away."""
        self._stuck_frames = self._stuck_frames + 1 if self._moved < _STUCK_STEP and forward != 0 else 0
        if self._stuck_frames < 5:
            return False
        self._stuck_frames = 0
        side = 1.0 if free.right > free.left else -1.0
        self._heading = None
        self._plan = _Plan(5, forward=float(-np.sign(forward)), turn=7.0 * side, then=_Plan(6, turn=7.0 * side))
        return True

    def _target(self, seen: Observation) -> float | None:
        """Returns the degrees to the right of the largest monster in view, for three seconds at most."""
        if not self._fights:
            return None
        monsters = [thing for thing in seen.things if thing.category == "Monster" and thing.height >= 8]
        if not monsters:
            self._fight_frames -= int(np.sign(self._fight_frames))
            return None
        if self._fight_frames < 0:
            self._fight_frames += 1
            return None
        self._fight_frames = self._fight_frames + 1 if self._fight_frames < 35 else -50
        if self._fight_frames % 8 == 1:
            self._sidestep = float(self._rng.choice([-1.0, 0.0, 1.0]))
        largest = max(monsters, key=lambda thing: thing.width * thing.height)
        half_width = seen.depth.shape[1] / 2
        return float(np.degrees(np.arctan((largest.x + largest.width / 2) / half_width - 1.0)))

    def _next_plan(self) -> _Plan:
        """Draws what to do next."""
        rng = self._rng
        kind = rng.choice(["walk", "side", "look", "round", "back"], p=[0.72, 0.10, 0.09, 0.06, 0.03])
        sign = float(rng.choice([-1.0, 1.0]))
        if kind == "look":  # to one side and back again
            speed, frames = float(rng.uniform(4.0, 7.0)), int(rng.integers(8, 15))
            forward = float(rng.choice([0.0, 1.0]))
            back = _Plan(frames, forward=forward, turn=-sign * speed)
            hold = _Plan(int(rng.integers(1, 4)), forward=forward, then=back)
            return _Plan(frames, forward=forward, turn=sign * speed, then=hold)
        if kind == "round":
            speed = float(rng.uniform(6.0, 8.0))
            onward = _Plan(int(rng.integers(6, 16)), forward=1.0)
            return _Plan(round(180.0 / speed), turn=sign * speed, then=onward)
        frames, turn = int(rng.integers(5, 15)), sign * self._draw_speed()
        if kind == "side":
            return _Plan(frames, right=float(rng.choice([-1.0, 1.0])), turn=turn / 2)
        if kind == "back":
            return _Plan(frames // 2 + 1, forward=-1.0, turn=turn / 2)
        right = float(rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1]))
        return _Plan(frames, forward=1.0, right=right, turn=turn)

    def _draw_speed(self) -> float:
        shares = [share for share, _, _ in _TURN_SPEEDS]
        _, least, most = _TURN_SPEEDS[int(self._rng.choice(len(_TURN_SPEEDS), p=shares))]
        return float(self._rng.uniform(least, most))
