"""Configs against the constructors that they go to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from launcher.signatures import check_targets, fits

HERE = "tests.launcher.test_signatures"


class Base:
    def __init__(self, *, size: int, name: str = "x") -> None: ...


class Child(Base):
    def __init__(self, *, extra: bool = False, **kwargs: Any) -> None: ...


@dataclass
class Settings:
    rate: float
    steps: int | None = None


def half(number: float) -> float:
    return number / 2


def problems(target: str, **values: Any) -> list[str]:
    return check_targets({"node": {"_target_": f"{HERE}.{target}", **values}})


def test_what_fits_passes() -> None:
    assert problems("Base", size=3) == []
    assert problems("Child", size=3, extra=True) == []
    assert problems("Settings", rate=1, steps=None) == []
    assert problems("half", number=2) == []


def test_an_argument_that_is_not_taken_lists_those_that_are() -> None:
    (text,) = problems("Base", size=3, sise=4)
    assert "`node.sise`" in text
    assert "size, name" in text


def test_an_argument_that_is_needed_is_named_unless_the_object_is_partial() -> None:
    (text,) = problems("Settings")
    assert "`node.rate`" in text
    assert problems("Settings", _partial_=True) == []


def test_types_of_a_base_class_count_behind_kwargs() -> None:
    (text,) = problems("Child", size="large")
    assert "`node.size` is 'large'" in text


def test_nodes_in_lists_are_found() -> None:
    config = {"plugins": [{"_target_": f"{HERE}.half", "number": "two"}]}
    (text,) = check_targets(config)
    assert "`plugins[0].number`" in text


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        ("1", float, False),
        (None, int | None, True),
        (None, int, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1, 2], list[int], True),
        ([1, "b"], list[int], False),
        ([1, 2], tuple[int, int], True),
        (3, Sequence[int], False),
        ("x", Path, True),
        (3, Path, False),
        ({"a": 1}, dict[str, int], True),
        ([1], dict[str, int], False),
        ("35/3", Fraction, True),  # a class of its own: its users may well convert
        ("high", float | torch.Tensor, False),
        ({"_target_": "a.B"}, int, True),
        (object(), Any, True),
    ],
)
def test_fits(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
