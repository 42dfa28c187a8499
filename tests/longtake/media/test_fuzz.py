from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def is_as_expected(line: dict) -> bool:
    is_good, reason = line["outcome"] == "good", line["outcome"].removeprefix("bad:").strip()
    if not is_good and not reason:
        return False
    if line["expect"] == "good":
        return is_good and line["count"] == line["right"]
    if line["expect"] == "bad":
        return not is_good
    if line["expect"] == "exact":
        return not is_good or line["count"] == line["right"]
    return not is_good or 1 <= line["count"] <= line["right"]


@pytest.mark.skipif(sys.platform == "win32", reason="the child limits its memory with the resource module")
@pytest.mark.parametrize("seed", [0, 1])
def test_broken_videos_are_refused_or_read_rightly(seed: int, tmp_path: Path) -> None:
    """A crash, a hang or an exception other than BadSampleError ends the child in the middle of a case."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz_cases.py")), str(seed), str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    names = {line["case"]: line["name"] for line in lines if "name" in line}
    outcomes = {line["case"]: line for line in lines if "outcome" in line}
    unfinished = [names[case] for case in names if case not in outcomes]
    assert result.returncode == 0, f"died (exit {result.returncode}) in {unfinished}\n{result.stderr[-3000:]}"
    assert not unfinished
    assert lines[-1]["cases"] == len(outcomes) >= 200
    wrong = [(names[case], line) for case, line in outcomes.items() if not is_as_expected(line)]
    assert not wrong, wrong
    # The cases are worth something: every kind of expectation occurs, and damage is both found and survived.
    found = Counter((line["expect"], line["outcome"] == "good") for line in outcomes.values())
    assert min(found[kind] for kind in (("good", True), ("bad", False), ("exact", True), ("exact", False))) >= 30, found
    assert lines[-1]["peak_mib"] < 1000
