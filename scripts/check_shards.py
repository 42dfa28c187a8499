"""Checks a set of shards: every checksum, every video, every number; and says what is in it.

python -m scripts.check_shards input=<set> [num_workers=2] [contact_sheet=sheet.png]

Exit code 0: clean; 1: problems, each named; 2: there is no set to check.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from launcher.entry import entry_point
from longtake.errors import DataError
from scripts.make_shards import num_cores, write_sheet

MAX_ROWS = 12
BAR_WIDTH = 30


def main(cfg: DictConfig) -> int:
    """Checks the set, prints what was found, and returns the exit code."""
    from datamodules.writing.check import check_dataset

    report = check_dataset(
        Path(cfg.input),
        num_workers=num_cores() if cfg.num_workers is None else cfg.num_workers,
        timeout_s=cfg.task_timeout_s,
        progress=cfg.progress,
    )
    if report.info is not None:
        source = report.info.source
        print(f"{report.info.root}: {source.name}, licence {source.licence}, {len(source.view_names)} view(s)")
    for name, split in report.splits.items():
        size = f"{split.hours:.3f} h, {split.num_bytes / 2**20:.1f} MiB"
        print(f"{name or 'unknown split'}: {split.num_samples} clips, {size}")
        print_histogram("frames of a clip", {str(length): count for length, count in sorted(split.lengths.items())})
        print_histogram("videos by size", split.sizes)
    if cfg.contact_sheet is not None and report.info is not None:
        try:
            sheet = write_sheet(report.info, Path(cfg.contact_sheet))
            print(f"contact sheet: {sheet or 'nothing to show'}")
        except DataError as error:  # a set that may only be read is still worth checking
            print(f"contact sheet: not written ({error}). Change `contact_sheet`, null writes none.")
    for problem in report.problems[: cfg.max_problems]:
        print(f"PROBLEM {printable(str(problem))}")
    if report.num_problems > len(report.problems[: cfg.max_problems]):
        print(f"PROBLEM ... and {report.num_problems - len(report.problems[: cfg.max_problems])} more")
    print(f"{report.num_problems} problems" if report.num_problems else "no problems")
    return 1 if report.num_problems else 0


def print_histogram(title: str, counts: dict[str, int]) -> None:
    """Prints counts as bars, the most frequent ones where there are many."""
    shown = counts if len(counts) <= MAX_ROWS else dict(Counter(counts).most_common(MAX_ROWS))
    print(f"  {title}{'' if shown is counts else f' ({MAX_ROWS} of {len(counts)} values)'}:")
    for name, count in shown.items():
        print(f"    {name:>20} {count:>7} {'#' * max(1, round(BAR_WIDTH * count / max(counts.values())))}")


def printable(text: str) -> str:
    """Returns text that a terminal shows as it is: names in a damaged set may hold anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


if __name__ == "__main__":
    entry_point(main, "check_shards")
