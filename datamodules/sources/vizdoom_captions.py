"""Captions of a clip, made from its actions and from what was in view; every sentence is true of the clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.sources.vizdoom_engine import ACTION_NAMES, Observation

_SUPPLIES = ("Ammo", "Armor", "Health", "Key", "Powerup", "Weapon")
_LEAST_HEIGHT = 0.06  # of the render's rows: smaller things are not mentioned


def categories_in_view(seen: Observation) -> frozenset[str]:
    """Returns the categories of the things that are large enough in view to be mentioned."""
    least = _LEAST_HEIGHT * seen.depth.shape[0]
    return frozenset(thing.category for thing in seen.things if thing.height >= least)


def make_captions(place: str, actions: np.ndarray, in_view: Sequence[frozenset[str]]) -> list[str]:
    """Returns three captions, from the longest to the shortest.

    Args:
        place: noun phrase of the world ("a maze of brick rooms").
        actions: float [t a], columns as in ACTION_NAMES.
        in_view: for each frame what `categories_in_view` returned.
    """
    moving, happening = _describe_moving(actions), _describe_happening(actions, in_view)
    return [
        f"first-person view of {place}, {' and '.join(moving)}{''.join(', ' + part for part in happening)}",
        f"in {place}, {moving[0]}{', ' + happening[0] if happening else ''}",
        f"{moving[-1]} in {place}",
    ]


def _describe_moving(actions: np.ndarray) -> list[str]:
    """Returns one or two phrases for how the player moves."""
    forward, right, turn = (actions[:, ACTION_NAMES.index(name)] for name in ACTION_NAMES[:3])
    ahead, back = float(np.mean(forward > 0.1)), float(np.mean(forward < -0.1))
    phrases = []
    if ahead > 0.6:
        phrases.append("walking forward")
    elif back > 0.4:
        phrases.append("walking backward")
    elif ahead > 0.3:
        phrases.append("walking slowly")
    elif float(np.mean(np.abs(right) > 0.1)) > 0.3:
        phrases.append("stepping to the side")
    else:
        phrases.append("standing nearly still")
    net, total = float(turn.sum()), float(np.abs(turn).sum())
    side = "right" if net > 0 else "left"
    if total < 30.0:
        phrases.append("looking straight ahead")
    elif abs(net) > 0.6 * total:
        phrases.append(f"turning {side}" if abs(net) < 300.0 else f"turning around to the {side}")
    elif abs(net) > 0.25 * total:
        phrases.append(f"turning both ways but mostly {side}")
    else:
        phrases.append("looking left and right")
    return phrases


def _describe_happening(actions: np.ndarray, in_view: Sequence[frozenset[str]]) -> list[str]:
    """Returns phrases for what is in view for a while and for shooting, the most interesting first."""

    def share(*categories: str) -> float:
        return float(np.mean([not seen.isdisjoint(categories) for seen in in_view])) if in_view else 0.0

    phrases = []
    monsters = share("Monster")
    if monsters > 0.6:
        phrases.append("monsters are in view nearly all the time")
    elif monsters > 0.15:
        phrases.append("a monster is in view for a while")
    if int(np.sum(actions[:, ACTION_NAMES.index("attack")] > 0.5)) >= 3:
        phrases.append("shooting")
    if share(*_SUPPLIES) > 0.3:
        phrases.append("supplies lie on the floor")
    if share("Decoration", "LightSource", "Vegetation", "Hazard") > 0.3:
        phrases.append("lamps or pillars stand around")
    return phrases
