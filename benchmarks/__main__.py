"""Lists and runs the benchmarks: `python -m benchmarks`, `python -m benchmarks data layout`, `... data --help`."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from longtake.errors import ConfigError

HELPERS = {"__init__", "__main__", "held_out", "report"}


def available() -> dict[str, str]:
    """Returns the first line of each benchmark's docstring by name, without importing any of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in HELPERS:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.split("\n")[0]
    return found


def main(argv: list[str]) -> int:
    """Runs the named benchmarks in turn, each with the options that follow the names. Returns the exit code."""
    names = available()
    split = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    wanted, options = argv[:split], argv[split:]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        if unknown:
            print(f"error: unknown benchmark {unknown[0]!r}; expected one of: {', '.join(names)}", file=sys.stderr)
        print("usage: python -m benchmarks <name> [<name> ...] [options]\n")
        for name, text in names.items():
            print(f"  {name:12} {text}")
        return 2 if unknown else 0
    try:
        return max(importlib.import_module(f"benchmarks.{name}").run(options) for name in wanted)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
