"""What the lines that a run is told by can tell: our own stream everything, a log of other programs less."""

from __future__ import annotations

from dataclasses import dataclass

from console.series import STEP_COLUMNS

DERIVED, STATED = "derived", "stated"
"""What is behind a verdict where the run's own contract is not: its numbers judged anew, or its own word alone."""


@dataclass(frozen=True)
class Source:
    """What the lines that a state is folded from can tell; our own streams tell everything.

    `columns` are those of `STEP_COLUMNS` that are known of a step; the others stand as NaN and mean nothing. `unit` is
    what a row of the series counts, `step` or `epoch`. With `verbatim` the source's own lines come as `Log` events and
    are shown as they are, in place of ours. `judged_by_us` says that the contract is not the run's own: what it says is
    derived, and what only the source says of a falsifier stands beside it as stated.
    """

    columns: frozenset[str] = frozenset(STEP_COLUMNS)
    unit: str = "step"
    verbatim: bool = False
    judged_by_us: bool = False

    @property
    def timed(self) -> bool:
        """Times of events are Unix seconds; else they are numbers of lines."""
        return "t" in self.columns


STREAM = Source()
UNDER_NO_CONTRACT = Source(judged_by_us=True)
"""A stream of ours whose contract is lost."""
