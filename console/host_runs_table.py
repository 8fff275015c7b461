"""Runs of a host as lines of text: for `kdconsole runs --host` and `kdconsole clean`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from console.times import age
from dispatch.survey import HostRun, Survey


def size(count: int) -> str:
    """Bytes as an operator reads them: `12.3 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def state(run: HostRun) -> str:
    """The state in words; how an ended one ended."""
    if run.state == "new":
        return "never started"
    return f"ended: {run.exit.describe()}" if run.state == "ended" and run.exit else run.state


def host_runs_lines(survey: Survey, runs: Sequence[HostRun], remarks: Mapping[str, str]) -> list[str]:
    """A line for each run: id, what it is called, state, step, age and size, and a remark."""
    rows = [
        (
            each.id,
            each.label or "",
            state(each),
            "" if each.step is None else f"step {each.step:,}",
            age(max(0.0, survey.time - each.changed)),
            size(each.bytes),
            remarks.get(each.id, ""),
        )
        for each in runs
    ]
    return table(rows) if rows else []


def host_runs_document(survey: Survey, here: Mapping[str, str]) -> dict[str, Any]:
    """The same for a program.

    Args:
        survey: of the host.
        here: where a run, by its uuid, is on this machine.
    """
    return {
        "schema": "kdconsole.host-runs/1",
        "host": survey.host,
        "base": survey.base,
        "free_bytes": survey.free,
        "runs": [
            {
                "id": each.id,
                "name": each.label,
                "mode": each.mode,
                "made_from": each.by,
                "created_unix": each.created,
                "state": each.state,
                "exit": each.exit.describe() if each.exit else None,
                "step": each.step,
                "age_seconds": round(max(0.0, survey.time - each.changed), 1),
                "bytes": each.bytes,
                "checkpoints": [row.name for row in each.checkpoints],
                "model": each.model_bytes > 0,
                "here": here.get(each.run or ""),
            }
            for each in survey.runs
        ],
        "rest": [{"name": each.name, "bytes": each.bytes, "used": each.used or each.busy} for each in survey.rest],
    }
