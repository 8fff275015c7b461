"""What contradicts itself in evidence, by kind, each with its place."""

from __future__ import annotations

MAX_FAULTS = 10
"""Of one kind that are named; the others are counted."""


class Faults:
    """What contradicts itself, by kind, each with its place."""

    def __init__(self) -> None:
        self.named: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        """Notes one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        named = self.named.setdefault(kind, [])
        if len(named) < MAX_FAULTS:
            named.append(text)
