"""What a verification says: claims, each with what is stated, what was computed anew, and whether the two agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from engine.text import clean

SHOWN = 300
"""Characters of a value in a claim."""


class Mark(StrEnum):
    """What became of a claim."""

    SAME = "same"
    DIFFERS = "differs"
    UNTOLD = "cannot be told"


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that evidence states. All texts are safe to print."""

    part: str
    """Of the evidence: `files`, `stream`, `verdicts`, `manifest`, `end`, `answers`, `log`, `weights`."""
    name: str
    stated: str
    recomputed: str
    mark: Mark
    why: str = ""
    """Where it differs, or why nobody can tell."""
    essential: bool = False
    """Of an untold one: without it the evidence is not proven."""


def same(part: str, name: str, stated: object, recomputed: object = None, why: str = "") -> Claim:
    """A claim that holds; recomputed reads as stated where it is not given."""
    return _claim(part, name, stated, stated if recomputed is None else recomputed, Mark.SAME, why)


def differs(part: str, name: str, stated: object, recomputed: object, why: str = "") -> Claim:
    """A claim that does not hold."""
    return _claim(part, name, stated, recomputed, Mark.DIFFERS, why)


def untold(part: str, name: str, stated: object, why: str, *, essential: bool = False) -> Claim:
    """A claim that nothing here can be held against."""
    return _claim(part, name, stated, "", Mark.UNTOLD, why, essential)


def compared(part: str, name: str, stated: object, recomputed: object, why: str = "") -> Claim:
    """Whether two values are equal; `why` is told where they are not."""
    if _equal(stated, recomputed):
        return same(part, name, stated, recomputed)
    return differs(part, name, stated, recomputed, why)


def close(part: str, name: str, stated: float, recomputed: float, tolerance: float = 1e-9) -> Claim:
    """Whether two numbers are equal but for the last digits of a computation."""
    if math.isclose(stated, recomputed, rel_tol=tolerance) or _equal(stated, recomputed):
        return same(part, name, stated, recomputed)
    return differs(part, name, stated, recomputed)


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings and lists as one mapping of paths such as `outcome.status` and `attempts[1].end`."""
    if isinstance(value, Mapping) and value:
        parts = [flat(inner, f"{prefix}.{name}" if prefix else str(name)) for name, inner in value.items()]
    elif isinstance(value, list | tuple) and value:
        parts = [flat(inner, f"{prefix}[{number}]") for number, inner in enumerate(value, 1)]
    else:
        return {prefix: value}
    return {name: inner for part in parts for name, inner in part.items()}


def _claim(
    part: str, name: str, stated: object, recomputed: object, mark: Mark, why: str, essential: bool = False
) -> Claim:
    return Claim(part, clean(name, SHOWN), _text(stated), _text(recomputed), mark, clean(why, 2 * SHOWN), essential)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return one == other


def _text(value: object) -> str:
    if value is None:
        return "none"
    try:
        return clean(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value), SHOWN)
    except ValueError:  # a number of more digits than Python writes
        return "a number too long to write"
