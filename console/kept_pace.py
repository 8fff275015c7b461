"""The pace that a run tells of itself: windows of speed and reports of long work, within bounds and added up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import msgspec

from engine.stream import Efficiency, Progress
from engine.text import clean

MOST = 512
"""Windows, and reports, that are left of twice as many."""
_MOST_PARTS, _PART_NAME = 12, 24
_TEXT, _UNIT = 300, 40


@dataclass(frozen=True)
class Pace:
    """How fast a run was and how far its work came; it never changes, later events make later ones.

    `windows` tell the speed of steps; of too many, neighbours are made one, of about as many steps each, and the means
    of all stay what they were. `reports` tell of work without steps; of too many, some stay, evenly in time.
    """

    windows: tuple[Efficiency, ...] = ()
    reports: tuple[Progress, ...] = ()

    def then(self, event: Efficiency | Progress) -> Pace:
        """With one more event."""
        if isinstance(event, Progress):
            reports = [*self.reports, msgspec.structs.replace(event, unit=clean(event.unit, _UNIT))]
            if len(reports) > 2 * MOST:
                apart = [later.t - earlier.t for earlier, later in pairwise(reports)]
                reports = [group[-1] for group in _grouped(reports, [0.0, *apart])]
            return replace(self, reports=tuple(reports))
        windows = [*self.windows, _bounded(event)]
        if len(windows) > 2 * MOST:
            windows = [_one(group) for group in _grouped(windows, [each.steps for each in windows])]
        return replace(self, windows=tuple(windows))

    def until(self, t: float) -> Pace:
        """What was told no later than `t`, in Unix seconds."""
        return Pace(tuple(w for w in self.windows if w.t <= t), tuple(r for r in self.reports if r.t <= t))

    @cached_property
    def mean(self) -> Efficiency | None:
        """All windows as one: speed by time, split by steps, the rest as it was told last; None where there is none."""
        return _one(self.windows) if self.windows else None


def _bounded(event: Efficiency) -> Efficiency:
    """The event as it is kept: of its split what are times, and texts of a length that can be shown."""
    parts = [(clean(name, _PART_NAME), s) for name, s in event.split.items() if math.isfinite(s) and s >= 0]
    return msgspec.structs.replace(
        event,
        split=dict(parts[:_MOST_PARTS]),
        formula=clean(event.formula, _TEXT),
        peak_source=clean(event.peak_source, _TEXT),
    )


_Told = TypeVar("_Told", Efficiency, Progress)


def _grouped(events: Sequence[_Told], sizes: Sequence[float]) -> list[list[_Told]]:
    """Neighbours together, `MOST` groups of about one size; pairs, where sizes say nothing."""
    sane = [size if 0 < size < math.inf else 0.0 for size in sizes]
    each, groups, inside = sum(sane) / MOST, list[list[_Told]]([[]]), 0.0
    for event, size in zip(events, sane, strict=True):
        groups[-1].append(event)
        inside += size
        if inside >= each:
            groups.append([])
            inside = 0.0
    groups = [group for group in groups if group]
    if len(groups) <= MOST + 1:
        return groups
    return [list(events[at : at + 2]) for at in range(0, len(events), 2)]


def _one(windows: Sequence[Efficiency]) -> Efficiency:
    seconds = [max(0, each.steps) * sum(each.split.values()) for each in windows]
    steps = [max(0, each.steps) for each in windows]
    weights = seconds if all(math.isfinite(s) and s > 0 for s in seconds) else [float(s) for s in steps]
    rate = _mean([each.tokens_per_second for each in windows], weights)
    used = [each.mfu for each in windows]
    names = list(dict.fromkeys(name for each in windows for name in each.split))[:_MOST_PARTS]
    split = {name: _mean([each.split.get(name, 0.0) for each in windows], [float(s) for s in steps]) for name in names}
    return msgspec.structs.replace(
        windows[-1],
        steps=sum(steps),
        tokens_per_second=rate,
        mfu=None if None in used else _mean([u for u in used if u is not None], weights),
        split={name: value for name, value in split.items() if math.isfinite(value)},
    )


def _mean(values: Iterable[float], weights: Iterable[float]) -> float:
    """The weighted mean of what are numbers; NaN where none is."""
    told = [(v, w) for v, w in zip(values, weights, strict=True) if math.isfinite(v) and math.isfinite(w)]
    total = sum(w for _, w in told)
    return sum(v * (w / total) for v, w in told) if total > 0 else math.nan
