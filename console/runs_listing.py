"""`kdconsole runs`: every run of an evidence directory with its state, as lines and as a document."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from console.palette import ORDER
from console.row import RUN, UNREADABLE, Row
from console.row_cache import RowCache, cache_path
from console.row_filter import Query
from console.run_files import read_exit
from console.run_index import RunIndex
from console.run_list import matches, model
from dispatch.manifest import iso_utc
from dispatch.places import Reach
from dispatch.runs import open_run
from dispatch.transport import TransportError
from engine.errors import KdError, RunError

SCHEMA = "kdconsole.runs/1"


@dataclass(frozen=True)
class Listed:
    """A run with what its host says of it: `state` is starting, running, ended, lost or unknown, `how` its end."""

    row: Row
    state: str
    how: str


def listed(evidence: Path, query: Query, *, readonly: bool = False) -> list[Listed]:
    """Every run that passes a filter, the newest first, read whole; of what goes on its host is asked.

    Args:
        evidence: a directory that holds evidence of any kind, or is evidence itself.
        query: which of it.
        readonly: nothing is written, not even to the cache.
    """
    index = RunIndex([evidence], time.time, RowCache(cache_path(), readonly=readonly))
    for _ in index.look():
        pass
    while index.fold_next():
        pass
    index.keep()
    now = time.time()
    return asyncio.run(_asked([row for row in index.rows() if matches(row, query, now)]))


async def _asked(rows: Sequence[Row]) -> list[Listed]:
    """A host that does not answer is asked once, not once a run."""
    found: list[Listed] = []
    silent: dict[str, str] = {}
    async with Reach() as reach:
        for row in rows:
            try:
                found.append(await _state(reach, row, silent))
            except KdError as error:
                if isinstance(error, TransportError):
                    silent[row.host] = str(error)
                found.append(Listed(row, "unknown", str(error)))
    return found


async def _state(reach: Reach, row: Row, silent: dict[str, str]) -> Listed:
    if row.status == UNREADABLE:
        return Listed(row, "unknown", row.reason)
    if row.kind != RUN:  # nothing of it can still be going on under our eyes
        return Listed(row, "ended" if row.status != "LOST" else "lost", row.status if row.status != "LOST" else "")
    record = read_exit(row.path)
    try:
        run = open_run(row.path)
    except RunError:  # its stream is all that is left of it
        return Listed(row, "lost" if record is None else "ended", record.describe() if record else row.status)
    if record is not None:
        return Listed(row, "ended", record.describe())
    if row.host in silent:
        raise TransportError(silent[row.host])
    told = await reach.place(run).status()
    return Listed(row, told.state, told.exit.describe() if told.exit else "")


def runs_lines(runs: Iterable[Listed]) -> list[str]:
    """A line a run: id, when, host, state, phase, model, verdicts, how it ended; a dash for what nobody said."""
    cells = [
        (
            each.row.id,
            _when(each.row) or "-",
            each.row.host or "-",
            f"{each.state:8}",
            each.row.phase or "-",
            model(each.row) or "-",
            " ".join(f"{each.row.verdicts[word]} {word}" for word in ORDER if word in each.row.verdicts) or "-",
            each.how,
        )
        for each in runs
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def runs_document(runs: Iterable[Listed]) -> dict[str, object]:
    """The list for machines; null is not known, and `created` is in UTC."""
    return {"schema": SCHEMA, "runs": [_described(each) for each in runs]}


def _described(each: Listed) -> dict[str, object]:
    row = each.row
    return {
        "id": row.id,
        "mode": row.mode or None,
        "created": _when(row) or None,
        "host": row.host or None,
        "state": each.state,
        "exit": each.how,
        "name": row.name or None,
        "path": str(row.path),
        "kind": row.kind,
        "status": row.status,
        "reason": row.reason or None,
        "phase": row.phase or None,
        "model": {"teacher": row.teacher or None, "student": row.student or None},
        "step": row.step,
        "progress": None if row.done is None else {"done": row.done, "total": row.total, "unit": row.counted},
        "loss": _finite(row.loss),
        "score": row.score or None,
        "heldout": _finite(row.heldout),
        "verdicts": dict(row.verdicts),
    }


def _when(row: Row) -> str:
    try:
        return iso_utc(row.created) if row.created else ""
    except (ValueError, OverflowError, OSError):  # a manifest may hold any number
        return ""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
