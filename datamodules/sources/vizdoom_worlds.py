"""The worlds that the ViZDoom source plays in, as they are written in `conf/source/vizdoom.yaml`."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.sources.base import SPLITS
from longtake.errors import ConfigError, unknown_choice

# Things in a map that lie on reachable floor: health, armour, ammunition, weapons (their editor numbers).
_ITEM_TYPES = frozenset({2001, 2002, 2003, 2004, 2005, 2006, 2007, 2008, 2010, 2011, 2012, 2014, 2015, 2018, 2019})
_ITEM_TYPES |= frozenset({8, 17, 82, 2013, 2022, 2023, 2024, 2025, 2026, 2045, 2046, 2047, 2048, 2049})
_KEYS = ("wad", "iwad", "maps", "share", "skill", "monsters", "scatter", "place")


@dataclass(frozen=True)
class World:
    """One scenario, or one level set, of the game.

    Attributes:
        name: its name in keys and captions' statistics, `[A-Za-z0-9_]+`.
        place: noun phrase for captions ("a maze of brick rooms").
        wad: scenario file, one that comes with the engine or a path; None to play the levels of `iwad`
            themselves.
        iwad: file with the textures (and levels), one that comes with the engine or a path.
        maps: map names by split. Where there are several, those of val, test and long are never in train.
        share: weight of this world among all.
        skill: difficulty 1..5, how many monsters there are.
        monsters: whether there is something to fight.
        scatter: whether clips start at random items of the map; else where the scenario starts, and clips
            of a task follow each other without a gap.
    """

    name: str
    place: str
    wad: str | None
    iwad: str
    maps: dict[str, tuple[str, ...]]
    share: float
    skill: int
    monsters: bool
    scatter: bool

    @property
    def num_maps(self) -> int:
        """Returns how many different maps there are over all splits."""
        return len({name for names in self.maps.values() for name in names})


def parse_worlds(worlds: Mapping[str, Mapping[str, Any]]) -> list[World]:
    """Returns the worlds with a share above 0. Raises ConfigError naming the key that cannot be."""
    parsed = [_parse_world(str(name), dict(settings)) for name, settings in worlds.items() if settings]
    chosen = [world for world in parsed if world.share > 0]
    if not chosen:
        raise ConfigError("no world has a share above 0; expected at least one. Change `source.worlds.<name>.share`.")
    return chosen


def _parse_world(name: str, settings: dict[str, Any]) -> World:
    key = f"source.worlds.{name}"
    for given in settings:
        if given not in _KEYS:
            raise unknown_choice(f"setting of world {name}", given, _KEYS, f"{key}.{given}")
    if not name.replace("_", "").isalnum():
        raise ConfigError(f"world name {name!r} is not made of letters, digits and underscores. Change `{key}`.")
    share, skill = float(settings.get("share", 1)), int(settings.get("skill", 3))
    if share < 0 or not 1 <= skill <= 5:
        raise ConfigError(
            f"world {name} has share {share:g} and skill {skill}; expected a share of 0 or more and a skill "
            f"from 1 to 5. Change `{key}.share` or `{key}.skill`."
        )
    world = World(
        name=name,
        place=str(settings.get("place", "a building")),
        wad=settings.get("wad"),
        iwad=str(settings.get("iwad", "freedoom2.wad")),
        maps=_parse_maps(settings.get("maps", ["map01"]), f"{key}.maps"),
        share=share,
        skill=skill,
        monsters=bool(settings.get("monsters", False)),
        scatter=bool(settings.get("scatter", False)),
    )
    if world.scatter and world.wad is not None:
        raise ConfigError(
            f"world {name} has scatter and a scenario file; expected one of the two. Change `{key}.scatter`."
        )
    return world


def _parse_maps(maps: Any, key: str) -> dict[str, tuple[str, ...]]:
    """Returns maps by split. A plain list of one map serves every split (they differ by seed)."""
    if not isinstance(maps, Mapping):
        names = tuple(str(name) for name in maps)
        if len(names) != 1:
            raise ConfigError(
                f"{len(names)} maps without a split; expected one map, or lists for train, val and test "
                f"so that held-out maps stay held out. Change `{key}`."
            )
        return dict.fromkeys(SPLITS, names)
    by_split = {str(split): tuple(str(name) for name in names) for split, names in maps.items()}
    by_split.setdefault("long", by_split.get("test", ()))
    for split in by_split:
        if split not in SPLITS:
            raise unknown_choice("split", split, SPLITS, f"{key}.{split}")
    for split in SPLITS:
        if not by_split.get(split):
            raise ConfigError(f"no map for the split {split}; expected at least one. Change `{key}.{split}`.")
    seen = set(by_split["train"])
    for split in SPLITS[1:]:
        if leaked := sorted(seen & set(by_split[split])):
            raise ConfigError(
                f"{', '.join(leaked)} is in train and in {split}; expected maps that training never sees. "
                f"Change `{key}.{split}`."
            )
    if leaked := sorted(set(by_split["val"]) & (set(by_split["test"]) | set(by_split["long"]))):
        raise ConfigError(
            f"{', '.join(leaked)} is in val and in test or long; expected different maps. Change `{key}.val`."
        )
    return by_split


def find_wad(name: str, key: str) -> Path:
    """Returns the file of a wad: an existing path, or one that comes with the engine. Raises ConfigError."""
    given = Path(name).expanduser()
    if given.is_file():
        return given.resolve()
    root = _engine_folder()
    for folder in (root, root / "scenarios"):
        if given.name == name and (folder / name).is_file():
            return folder / name
    bundled = sorted(path.name for path in [*root.glob("*.wad"), *(root / "scenarios").glob("*.wad")])
    raise unknown_choice("wad (no such file, and none of that name comes with the engine)", name, bundled, key)


def _engine_folder() -> Path:
    spec = importlib.util.find_spec("vizdoom")  # finds without importing: the main process never loads the engine
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the package `vizdoom` is not installed; expected it for this source (`pip install vizdoom`). "
            "Change `source` to another one, or install it."
        )
    return Path(spec.origin).parent


def _read_directory(wad: Path) -> list[tuple[str, int, int]]:
    """Returns (name, offset, bytes) of every lump of a wad."""
    with wad.open("rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] not in (b"IWAD", b"PWAD"):
            raise ConfigError(f"{wad} is not a wad file. Change `source.worlds.<name>.wad` or `.iwad`.")
        count, offset = struct.unpack("<ii", head[4:])
        file.seek(offset)
        rows = list(struct.iter_unpack("<ii8s", file.read(16 * count)))
    return [(name.rstrip(b"\0").decode("ascii", "replace").upper(), start, size) for start, size, name in rows]


def check_world(world: World) -> None:
    """Raises ConfigError when a wad of the world, or one of its maps, is missing or not usable."""
    key = f"source.worlds.{world.name}"
    iwad = find_wad(world.iwad, f"{key}.iwad")
    wad = iwad if world.wad is None else find_wad(world.wad, f"{key}.wad")
    lumps = {name for name, _, _ in _read_directory(wad)}
    for map_name in sorted({name for names in world.maps.values() for name in names}):
        if map_name.upper() not in lumps:
            raise ConfigError(f"{wad.name} has no map {map_name}. Change `{key}.maps`.")
        if world.scatter and not item_spots(wad, map_name):
            raise ConfigError(f"{map_name} of {wad.name} has no items. Change `{key}.scatter` to false.")


def item_spots(wad: Path, map_name: str) -> list[tuple[int, int]]:
    """Returns where items lie in a map of the classic format, in map units; ConfigError in another."""
    directory = _read_directory(wad)
    names = [name for name, _, _ in directory]
    start = names.index(map_name.upper())
    lumps = names[start + 1 : start + 12]
    if "THINGS" not in lumps[:1] or "BEHAVIOR" in lumps:
        raise ConfigError(
            f"{map_name} of {wad.name} is not in the classic map format; expected that for random starts. "
            "Change `source.worlds.<name>.scatter` to false."
        )
    _, offset, size = directory[start + 1]
    with wad.open("rb") as file:
        file.seek(offset)
        things = file.read(size)
    rows = struct.iter_unpack("<hhhhh", things[: len(things) // 10 * 10])
    multiplayer_only = 16
    return [(x, y) for x, y, _, kind, flags in rows if kind in _ITEM_TYPES and not flags & multiplayer_only]
