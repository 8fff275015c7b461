"""What the faults came to: how often each was done, survived, and what it cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass
class Tally:
    """One row of the table."""

    fault: str
    times: int = 0
    survived: int = 0
    lost: int = 0
    """Steps that had to be made again after one such fault, at most."""

    @contextlib.contextmanager
    def counts(self, times: int = 1) -> Iterator[None]:
        """One fault, or several at once, survived when the body is left without an exception."""
        self.times += times
        yield
        self.survived += times

    def cost(self, steps: int) -> None:
        """Notes what one of them cost."""
        self.lost = max(self.lost, steps)

    @property
    def ok(self) -> bool:
        return self.times == self.survived


def table(tallies: Sequence[Tally]) -> str:
    """The rows as Markdown."""
    rows = [("fault", "times", "survived", "steps lost at most")]
    rows += [(each.fault, f"{each.times}", f"{each.survived}", f"{each.lost}") for each in tallies]
    wide = max(len(row[0]) for row in rows)
    lines = [f"| {row[0]:{wide}} | {row[1]:>5} | {row[2]:>8} | {row[3]:>18} |" for row in rows]
    lines.insert(1, f"|{'-' * (wide + 2)}|------:|---------:|-------------------:|")
    return "\n".join(lines)
