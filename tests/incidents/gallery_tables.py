"""What the gallery tells: a table for a terminal, the same in Markdown, and one JSON document."""

from __future__ import annotations

import os
import platform
import textwrap
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scene import Caught, Way

if TYPE_CHECKING:
    from gallery import Gallery

WIDTH = 150
MESSAGE = 400
"""Characters of a message in Markdown; the whole of it stands in the JSON document."""
BEGIN, END = "<!-- make incidents: begin -->", "<!-- make incidents: end -->"


def machine() -> str:
    """What it was measured on, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    system = f"{platform.system()} {platform.machine()}"
    return f"{cores} cores, {system}, Python {platform.python_version()}, {versions}, without a GPU"


def result(gallery: Gallery) -> str:
    """One line: how many were caught, and how many good runs alarmed somebody."""
    late = max((way.seconds for way in _caught(gallery)), default=0.0)
    alarms = f"{gallery.false_alarms} false alarm{'' if gallery.false_alarms == 1 else 's'}"
    return (
        f"{gallery.caught} of {gallery.closed} incidents caught, the slowest catch after {late:.1f} s; "
        f"{alarms} in {len(gallery.good)} good runs; {gallery.seconds:.0f} s in all"
    )


def table(gallery: Gallery) -> str:
    """For a terminal, or a file: under each way of making an incident stands what the operator reads."""
    lines = []
    for number, name, made, by, seconds, message in _rows(gallery):
        lines += [f"{number:>2}  {name}"] if number else []
        lines += [f"      {made:<62}  {by:<52}  {seconds:>5}".rstrip()] if made or by else []
        lines += textwrap.wrap(message, WIDTH - 10, initial_indent=" " * 10, subsequent_indent=" " * 10)
    if gallery.good:
        lines += ["", f"      {'good run':<62}  {'alarms':<52}  {'s':>5}"]
    for good in gallery.good:
        lines.append(f"      {good.what:<62}  {'; '.join(good.alarms) or 'none':<52}  {good.seconds:>5.1f}")
    head = f" #    {'incident, and how it was made':<62}  {'caught by':<52}  {'s':>5}"
    return "\n".join([head, *lines, "", result(gallery), gallery.machine])


def markdown(gallery: Gallery) -> str:
    """For docs/incidents.md."""
    lines = [
        f"{result(gallery)}. Measured on {gallery.machine}.",
        "",
        "| # | incident | how it was made | caught by | seconds | what the operator reads |",
        "|--:|---|---|---|--:|---|",
    ]
    for *cells, message in _rows(gallery):
        cells.append(f"`{textwrap.shorten(message, MESSAGE, placeholder=' …')}`" if message else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "| good run | seconds | alarms |", "|---|--:|---|"]
    lines += [f"| {good.what} | {good.seconds:.1f} | {'; '.join(good.alarms) or 'none'} |" for good in gallery.good]
    return "\n".join(lines)


def document(gallery: Gallery) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "schema": "kdconsole.incidents/1",
        "ok": gallery.ok,
        "caught": gallery.caught,
        "of": gallery.closed,
        "false_alarms": gallery.false_alarms,
        "seconds": gallery.seconds,
        "machine": gallery.machine,
        "incidents": [
            {
                "number": outcome.incident.number,
                "name": outcome.incident.name,
                "state": outcome.state,
                "problem": outcome.problem,
                "ways": [asdict(way) for way in outcome.ways],
            }
            for outcome in gallery.outcomes
        ],
        "good": [asdict(good) for good in gallery.good],
    }


def put_between_marks(path: Path, text: str) -> None:
    """Replaces what stands between the two marks of a document."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{path} lacks {BEGIN} or {END}"
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _caught(gallery: Gallery) -> list[Caught]:
    return [way for outcome in gallery.outcomes for way in outcome.ways if isinstance(way, Caught)]


def _rows(gallery: Gallery) -> list[list[str]]:
    """Number, incident, how it was made, what caught it, after how many seconds, and the message."""
    rows = []
    for outcome in gallery.outcomes:
        number, name = str(outcome.incident.number), outcome.incident.name
        for way in outcome.ways:
            rows.append([number, name, *_cells(way)])
            number = name = ""
        if outcome.state == "open":
            rows.append([number, name, "what it is about is not there yet", "open", "", ""])
        elif outcome.problem:
            rows.append([number, name, "", "MISSED", "", " ".join(outcome.problem.split())])
    return rows


def _cells(way: Way) -> list[str]:
    if not isinstance(way, Caught):
        return [way.made, "not made here", "", way.why]
    moment = "after launch" if way.launched else "before launch"
    late = "" if way.in_time else " LATE"
    return [way.made, f"{way.by}, {moment}{late}", f"{way.seconds:.1f}", way.message]
