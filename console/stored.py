"""What is said of a teacher that is stored: what of it and where, and what came of storing it."""

from __future__ import annotations

import contextlib
import math
import re
from typing import TYPE_CHECKING

from engine.text import clean

if TYPE_CHECKING:
    from console.run_state import RunState
    from engine.config import RunConfig
    from engine.store_format import Key
    from engine.stream import Measure, Progress

MODE = "prepare"
"""Of a run that stores a teacher and makes no steps."""
DEFAULT_CACHE = "kdconsole/teacher below the user's cache directory"
"""Where it is stored without `teacher.cache`; a host has a user of its own."""
MOST_FIGURES = 40
"""Of those that are listed; a stream may hold any number."""
_OF_FIDELITY = ("store_", "topk_")
_WHOLE = re.compile(
    r"info: (?P<place>.{1,1000}): whole(?: already)?: [0-9,]{1,30} windows, (?P<bytes>[0-9,]{1,30}) bytes"
)
"""As the engine says it, last of all."""
_LAST_LINES, _MOST_HEATS = 200, 6
_GRID = re.compile(r"topk_(?P<what>mass|cosine)_t(?P<t>\d{1,6}(_\d{1,6})?)_k(?P<k>\d{1,9})", re.ASCII)


def stored_what(config: RunConfig) -> str:
    """What a configuration stores: `hidden states`, or `256 logits a token at T 4`."""
    assert config.teacher is not None
    if config.teacher.source == "topk":
        return f"{config.teacher.top_k:,} logits a token at T {config.distill.temperature:g}"
    return "hidden states"


def stored_where(config: RunConfig) -> str:
    """The directory, on the machine that the run is on."""
    assert config.teacher is not None
    return DEFAULT_CACHE if config.teacher.cache is None else clean(config.teacher.cache, 300)


def prepares(state: RunState) -> bool:
    """Whether a run stores a teacher: it has neither steps nor losses, and nobody misses them."""
    return state.run is not None and state.run.mode == MODE


def work_done(state: RunState) -> Progress | None:
    """How far storing came: the last report that counts what the first one counts; later ones count what is checked."""
    reports = state.pace.reports
    return next((each for each in reversed(reports) if each.unit == reports[0].unit), None)


def shown_progress(state: RunState) -> Progress | None:
    """What a list shows of how far a run came: what it is at, and of one that is over what it was for."""
    return work_done(state) if state.end is not None and prepares(state) else state.progress


def stored_so_far(state: RunState) -> str:
    """How much was stored: `hidden states, 408 of 408 windows, 15.7 MB read back`; empty where nothing tells it."""
    made, last = work_done(state), state.progress
    if state.run is None:
        return ""
    if made is None or last is None:
        size = stored_bytes(state)
        return "" if size is None else f"nothing new: {size / 1e6:,.1f} MB were there already"
    kinds = {"hidden": "hidden states", "topk": f"top logits at T {state.run.temperature:g}"}
    told = [kinds.get(state.run.teacher_source, clean(state.run.teacher_source, 40))]
    told.append(f"{made.done:,} of {made.total:,} {made.unit}")
    if last.unit.startswith("bytes "):
        told.append(f"{last.done / 1e6:,.1f} MB {last.unit.removeprefix('bytes ')}")
    return ", ".join(told)


def stored_bytes(state: RunState) -> int | None:
    """Bytes of everything that was stored; None before all of it is known."""
    whole = _whole(state)
    return None if whole is None else int(whole["bytes"].replace(",", "") or 0)


def store_of(state: RunState) -> str:
    """The directory of the whole store, on the machine that it is on; empty before there is one."""
    whole = _whole(state)
    return "" if whole is None else whole["place"]


def _whole(state: RunState) -> re.Match[str] | None:
    if not prepares(state):
        return None
    lines = state.log[-_LAST_LINES:]
    return next((found for line in reversed(lines) if (found := _WHOLE.match(line.text))), None)


def storing_speed(state: RunState) -> str:
    """`61.8 windows/s`, between the first report and the last; empty where there are not two."""
    last = work_done(state)
    first = state.pace.reports[0] if last is not None else None
    if first is None or last is None or not last.seconds > first.seconds or last.done <= first.done:
        return ""
    rate = (last.done - first.done) / (last.seconds - first.seconds)
    return f"{rate:,.0f} {last.unit}/s" if rate >= 99.95 else f"{rate:.3g} {last.unit}/s"


def fidelity(state: RunState) -> list[Measure]:
    """What was measured of how true the stored teacher is, but for the table of temperatures and numbers of logits."""
    if not prepares(state):
        return []
    names = (name for name in state.measures if name.startswith(_OF_FIDELITY) and not _GRID.fullmatch(name))
    return [state.measures[name] for name in sorted(names)[:MOST_FIGURES]]


def fidelity_table(state: RunState) -> list[tuple[str, ...]]:
    """Mass and cosine of the gradient by number of logits, a head line first; empty where nothing tells them."""
    found: dict[tuple[int, float], dict[str, str]] = {}
    for name, each in state.measures.items() if prepares(state) else ():
        if match := _GRID.fullmatch(name):
            place = int(match["k"]), float(match["t"].replace("_", "."))
            found.setdefault(place, {})[match["what"]] = f"{each.value:.4f}"
    heats = sorted({heat for _, heat in found})[:_MOST_HEATS]
    rows = [
        (f"{k:,}", *(found.get((k, heat), {}).get(what, "") for heat in heats for what in ("mass", "cosine")))
        for k in sorted({k for k, _ in found})[:MOST_FIGURES]
    ]
    head = ("logits", *(f"T {heat:g} {what}" for heat in heats for what in ("mass", "cosine")))
    return [head, *rows] if rows else []


def measured(measure: Measure) -> str:
    """A figure: `0.9213`, or in its shortest form where it is large or tiny."""
    value = measure.value
    return f"{value:.4f}" if math.isfinite(value) and (value == 0 or 1e-3 <= abs(value) < 1e4) else f"{value:.4g}"


def missing_store(config: RunConfig) -> str:
    """Why a run on this machine will not find the stored teacher that it wants; empty where one may be there.

    What is cheap to know: whether there is one of its kind, sequence and temperature. The engine looks at the rest.
    """
    wanted = config.teacher
    if wanted is None or wanted.source == "online" or not config.makes_steps:
        return ""
    from engine.store_format import MANIFEST, StoreError, cache_directory, read_manifest

    cache = cache_directory(wanted)
    told = f"source {wanted.source}, sequence {config.train.sequence:,}"
    told += f", T {config.distill.temperature:g}" if wanted.source == "topk" else ""
    try:
        for path in sorted(cache.glob(f"*/{MANIFEST}")):
            with contextlib.suppress(StoreError):
                found = read_manifest(path)
                if found is not None and _may_be(found.key, config):
                    return ""
    except OSError as error:
        return f"{clean(str(cache), 300)}: {error.strerror}"
    return f"nothing stored in {clean(str(cache), 300)} is of {told}; kdconsole prepare CONFIG stores it"


def _may_be(key: Key, config: RunConfig) -> bool:
    assert config.teacher is not None
    same = key.kind == config.teacher.source and key.sequence == config.train.sequence
    return same and key.temperature in (None, config.distill.temperature)
