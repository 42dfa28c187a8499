"""What benchmarks share: paired timing, the machine they ran on, and result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Paired:
    """Two subjects measured in turn, so that whatever else the machine does falls on both.

    Attributes:
        ours: one figure a round.
        peer: one figure a round.
    """

    ours: list[float]
    peer: list[float]

    @property
    def ratio(self) -> float:
        """The median over rounds of ours / peer."""
        return statistics.median(a / b for a, b in zip(self.ours, self.peer, strict=True))

    def row(self, name: str, unit: str) -> str:
        """Returns a line for the table."""
        ours, peer = statistics.median(self.ours), statistics.median(self.peer)
        return f"{name:34} {ours:10.1f} {peer:10.1f} {unit:10} ratio {self.ratio:5.2f}"

    def to_json(self) -> dict[str, Any]:
        """Returns the figures and their summary, plain JSON."""
        return {"ours": self.ours, "peer": self.peer, "median_ratio": self.ratio}


def paired(ours: Callable[[], float], peer: Callable[[], float], rounds: int) -> Paired:
    """Returns the figures of both subjects, measured in turn after one round of each that does not count."""
    ours(), peer()
    results = [(ours(), peer()) if number % 2 == 0 else (peer(), ours())[::-1] for number in range(rounds)]
    return Paired([a for a, _ in results], [b for _, b in results])


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: processor, cores, torch, commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "commit": commit or None}


def write_result(name: str, figures: Mapping[str, Any], path: Path | None) -> None:
    """Writes figures and machine as JSON; nothing where no path was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmark": name, "machine": machine(), "figures": figures}, indent=1) + "\n")
