"""A pre-flight as a table for people, whose last line is the verdict, and as a document for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import msgspec
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dispatch.preflight import Outcome, Preflight

SCHEMA = "kdconsole.preflight/1"
PIPE_WIDTH = 160
"""Columns where the output is no terminal."""
MARKS: dict[Outcome, tuple[str, str]] = {
    "PASS": ("✔", "green"),
    "FAIL": ("✘", "bold red"),
    "WARN": ("!", "yellow"),
    "UNKNOWN": ("?", "yellow"),
}
_WANTED = 0.4
"""The share of the room that what is wanted may have."""


def document(found: Preflight) -> dict[str, object]:
    """Everything that the table has; `facts` is None where the host could not be asked."""
    return {
        "schema": SCHEMA,
        "host": found.host,
        "ready": found.ready,
        "reached": found.reached,
        "exit_code": int(found.exit_code),
        "verdict": verdict(found),
        "seconds": found.seconds,
        "next_lane": found.next_lane,
        "overrides": [] if found.forbidden else list(found.overrides),
        "lines": [asdict(line) for line in found.lines],
        "facts": None if found.facts is None else msgspec.to_builtins(found.facts),
    }


def verdict(found: Preflight) -> str:
    """One sentence: ready, or not and why."""
    who = found.host or "this machine"
    if not found.reached:
        return f"{who} was NOT REACHED: what runs there is unknown, not failed"
    if found.failed:
        return f"{who} is NOT READY: {', '.join(line.name for line in found.failed)}"
    warned = [line.name for line in found.lines if line.outcome == "WARN"]
    unknown = [line.name for line in found.lines if line.outcome == "UNKNOWN"]
    told = [f"see {', '.join(warned)}"] if warned else []
    told += [f"not known: {', '.join(unknown)}"] if unknown else []
    return f"{who} is READY" + (f" ({'; '.join(told)})" if told else "")


@dataclass(frozen=True)
class Table:
    """Renderable: a row a check, below it what to do, and the verdict at the end."""

    found: Preflight

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self.found.lines
        name = max((cell_len(line.name) for line in lines), default=0)
        room = max(options.max_width - name - 7, 20)
        wanted = max((cell_len(line.wanted) for line in lines), default=0)
        found = max((cell_len(line.found) for line in lines), default=0)
        if found + wanted > room:
            wanted = min(wanted, max(int(room * _WANTED), room - found))
            found = room - wanted
        widths = (1, name, found, wanted)
        yield from _row(console, widths, ("", "check", "found", "wanted"), ("dim",) * 4)
        for line in lines:
            mark, style = MARKS[line.outcome]
            yield from _row(
                console, widths, (mark, line.name, line.found, line.wanted), (style, style, "default", "dim")
            )
            if line.do:
                styles = ("", "", style.removeprefix("bold "))
                yield from _row(console, (1, name, room + 2), ("", "", f"→ {line.do}"), styles)
        yield Text("")
        yield self._verdict()

    def _verdict(self) -> Text:
        found = self.found
        mark, style = MARKS["PASS" if found.ready else "FAIL"]
        text = Text(f"{mark} {verdict(found)}", style="bold green" if found.ready else style)
        text.append(f"  {found.seconds:.1f} s", style="not bold dim")
        if found.failed and found.reached and not found.forbidden:
            text.append(f"\n  --force starts it all the same, and records: {', '.join(found.overrides)}", "default")
        if found.next_lane is not None:
            text.append(f"\n  next lane: kdconsole preflight --host {found.next_lane}", "default")
        return text


def _row(console: Console, widths: Sequence[int], texts: Sequence[str], styles: Sequence[str]) -> Iterator[Text]:
    """The lines of one row, each column wrapped to its width, without blanks at their ends."""
    columns = [
        Text(text, style).wrap(console, max(width, 1), overflow="fold")
        for text, width, style in zip(texts, widths, styles, strict=True)
    ]
    for index in range(max(map(len, columns))):
        line = Text(no_wrap=True, overflow="ignore")
        for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
            cell = column[index].copy() if index < len(column) else Text("")
            cell.truncate(width, pad=True)
            line.append_text(cell)
            line.append("  " if number else " ")
        line.rstrip()
        yield line


def show(found: Preflight) -> None:
    """Prints the table; each row is one line where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(Table(found))
