"""Bad samples are skipped, counted and named, and end the run when there are too many of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from longtake.errors import DataError

log = logging.getLogger("longtake")

FEW_SAMPLES = 200
"""The share of bad samples is judged over at least this many, or the whole set if that is smaller."""
MAX_NAMED = 50
"""Bad samples beyond this many are counted, no longer named one by one."""


@dataclass(frozen=True)
class BadSample:
    """One sample that could not be used.

    Attributes:
        key: its name, or that of the shard where no sample could be told.
        where: the shard.
        reason: what is wrong with it.
    """

    key: str
    where: str
    reason: str


@dataclass
class BadSampleLedger:
    """Counts the bad samples of one split on one rank.

    Attributes:
        split: for messages.
        num_samples: samples in the split.
        max_fraction: share of distinct samples that may be bad before the run ends.
        drawn: samples asked for so far.
        substitutions: times that another sample took a bad one's place.
        bad: reason by (shard, key), each sample once however often it was met.
    """

    split: str
    num_samples: int
    max_fraction: float
    drawn: int = 0
    substitutions: int = 0
    bad: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, num_drawn: int, reports: list[BadSample]) -> None:
        """Counts one batch. Raises DataError when the share of bad samples passes `max_fraction`."""
        self.drawn += num_drawn
        self.substitutions += len(reports)
        for report in reports:
            if (report.where, report.key) not in self.bad:
                self.bad[report.where, report.key] = report.reason
                self._name(report)
        if reports and self.share() > self.max_fraction:
            examples = "; ".join(f"{key} in {where}: {why}" for (where, key), why in list(self.bad.items())[:3])
            raise DataError(
                f"{len(self.bad)} distinct samples of split {self.split!r} are bad, {self.share():.1%} of those seen; "
                "at most "
                f"{self.max_fraction:.1%} may be. First: {examples}. Check the set with `python -m "
                "scripts.check_shards`, "
                "or raise `data.max_bad_fraction`."
            )

    def share(self) -> float:
        """Returns the share of distinct bad samples among those seen, at least FEW_SAMPLES or the whole set."""
        return len(self.bad) / max(1, min(self.num_samples, max(self.drawn, FEW_SAMPLES)))

    def _name(self, report: BadSample) -> None:
        if len(self.bad) <= MAX_NAMED:
            log.warning("bad sample %s in %s: %s (%d so far)", report.key, report.where, report.reason, len(self.bad))
        if len(self.bad) == MAX_NAMED:
            log.warning("further bad samples of split %r are counted, not named", self.split)
