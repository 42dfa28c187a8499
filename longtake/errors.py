"""The errors that a user can cause or fix. Entry points turn them into one message and an exit code (design: 2 or 1).

Every message says what is wrong with the values received, what was expected, and which key to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that cannot work. Raised before any data is read, weight loaded or folder made; exit code 2."""


class DataError(RuntimeError):
    """Data that cannot be used as a whole (a missing set, too many bad samples, a full disk); exit code 1."""


class BadSampleError(ValueError):
    """One sample that cannot be used. The caller skips it, counts it and names it with this reason."""


def unknown_choice(what: str, given: object, valid: Iterable[str], key: str) -> ConfigError:
    """Returns the error for a name that is not among the valid ones, the nearest of them first.

    Args:
        what: the kind of thing that was named, for the sentence ("source", "view").
        given: the value received.
        valid: every legal name.
        key: the configuration key to change.
    """
    names = list(valid)
    near = difflib.get_close_matches(str(given), names, n=max(1, len(names)), cutoff=0.0)
    ordered = near + [name for name in names if name not in near]
    return ConfigError(
        f"unknown {what} {given!r}; expected one of: {', '.join(ordered) or 'none is there'}. Change `{key}`."
    )
