"""The command `kdconsole review`: past runs of any kind, in the app or as a report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from console.command import EXIT_CODES, evidence_option, need_terminal, open_screen, write_out
from console.json_errors import errors_told
from engine.errors import ExitCode, KdError, RunError
from engine.text import clean

if TYPE_CHECKING:
    from rich.text import Text

    from console.review.past import Review
    from console.run_reader import LoadedRun

FILE_COLUMNS = 140
"""Width of a report that no terminal shows."""
QUIET_SECONDS, PLAIN_SECONDS, TERMINAL_SECONDS = 0.5, 2.0, 0.1
"""Nothing is told of what is read in no time; then a line now and then, or one line that changes on a terminal."""


@click.command("review", epilog=EXIT_CODES, short_help="Past runs: replayed in the app, or as a report.")
@click.argument("paths", nargs=-1, required=True, metavar="DIR…")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
@evidence_option
@click.pass_context
def review_command(context: click.Context, paths: Sequence[str], as_json: bool, quiet: bool, evidence: Path) -> None:
    """Look at past runs: what ran where with what, how it went, what was judged, and every incident that is found.

    DIR is a run directory, a directory of the predecessor's scripts, a log, a folder with many of these, or a run's id.
    On a terminal it opens the app, where a past run can be replayed; with --headless or --json it prints a report.

    The exit code of a single run's report is that run's, as attach gives it; one that is not over is undecided (5). Of
    several runs it is 0, and 2 where one of them cannot be read.

    \b
    Examples:
      kdconsole review evidence/20260102-030405-train-abcdef
      kdconsole --headless review old/distill-run/launch-final-pass.txt
      kdconsole --headless review evidence --json
    """
    printed = context.obj["headless"] or as_json
    if not printed:
        need_terminal(context)
        open_screen(context, evidence, review=[_path_of(evidence, name) for name in paths])
        return
    with errors_told(as_json):
        found, unread = _found(evidence, paths)
        if not found and len(paths) == 1:
            raise RunError(unread[0][1])
        if not found:
            raise RunError("nothing to review:\n       " + "\n       ".join(problem for _, problem in unread))
    if len(found) == 1 and not unread:
        _one(found[0], as_json, quiet, evidence)
    _several(found, unread, as_json, quiet)


def _path_of(evidence: Path, name: str) -> Path:
    """What a name means: something that is there, or a run of `evidence` by its id."""
    from console.named_evidence import named_evidence

    path = Path(name)
    # A folder with many runs is no evidence itself.
    return path.absolute() if path.is_dir() else named_evidence(evidence, name)


def _found(evidence: Path, names: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Everything to review, each once and in the order given; and each name that stands for nothing, with why."""
    from dispatch.evidence import find_evidence, open_evidence

    found: dict[Path, None] = {}
    unread: list[tuple[str, str]] = []
    for name in names:
        try:
            path = _path_of(evidence, name)
            there = list(find_evidence([path]))
            found |= dict.fromkeys(there or [open_evidence(path).path])
        except KdError as error:
            unread.append((name, str(error)))
    return list(found), unread


def _one(path: Path, as_json: bool, quiet: bool, evidence: Path) -> None:
    from console.review.document import document
    from console.review.past import review
    from console.review.text import show

    told = review(_load(path, quiet), smokes=[place for place in (path.parent, evidence) if place.is_dir()])
    if as_json:
        write_out([json.dumps(document(told), indent=2, allow_nan=False) + "\n"])
    else:
        console = _console()
        with console.capture() as capture:
            show(told, console)
        write_out([_trimmed(capture.get())])
    sys.exit(told.conclusion.exit_code)


def _several(found: Sequence[Path], unread: list[tuple[str, str]], as_json: bool, quiet: bool) -> None:
    """Each in a few lines as it is read, then all of them as a table; only what is printed is kept."""
    from console.review.document import document, several
    from console.review.past import review
    from console.review.text import block, summary, summary_row

    console = _console()
    documents: list[dict[str, Any]] = []
    rows: list[list[Text]] = []
    names = _names(found)

    def tell(told: Review) -> None:
        if as_json:
            documents.append(document(told))
            return
        rows.append(summary_row(told, names[told.loaded.path]))
        with console.capture() as capture:
            console.print(*block(told), sep="\n", end="\n")
        write_out([_trimmed(capture.get())])

    for number, path in enumerate(found, 1):
        told = review(_load(path, quiet, f"{number:,} of {len(found):,}, "))
        if told.loaded.problem:
            unread.append((str(path), told.loaded.problem))
        tell(told)
    if as_json:
        write_out([json.dumps(several(documents, unread), indent=2, allow_nan=False) + "\n"])
    else:
        with console.capture() as capture:
            console.print(summary(rows, console.width))
        write_out([_trimmed(capture.get())])
        for name, problem in unread:
            click.echo(f"error: {clean(name, 200)}: {clean(problem, 500)}", err=True)
    sys.exit(ExitCode.USAGE if unread else ExitCode.OK)


def _names(found: Sequence[Path]) -> dict[Path, str]:
    """What to call each: its directory's name, with as much of the path before it as tells it from the others."""
    names: dict[Path, str] = {}
    for path in found:
        parts = 1
        while parts < len(path.parts) and any(
            each != path and each.parts[-parts:] == path.parts[-parts:] for each in found
        ):
            parts += 1
        names[path] = clean("/".join(path.parts[-parts:]), 200)
    return names


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=FILE_COLUMNS)


def _trimmed(text: str) -> str:
    """The text without blanks at the ends of its lines, which tables have."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _load(path: Path, quiet: bool, prefix: str = "") -> LoadedRun:
    """A run read whole, told of on the way where that takes long."""
    from console.run_reader import RunReader

    reader = RunReader(path)
    progress = Progress(f"{prefix}{clean(path.name, 100)}", quiet)
    try:
        while reader.advance():
            progress.tell(reader.offset, reader.total)
    finally:
        progress.close()
    return reader.loaded()


class Progress:
    """Tells on standard error how much of a file was read.

    Args:
        name: of what is read.
        quiet: nothing is told.
        clock: steady seconds.
    """

    def __init__(self, name: str, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._quiet, self._clock = name, quiet, clock
        self._terminal = sys.stderr.isatty()
        self._due = clock() + QUIET_SECONDS
        self._told = False

    def tell(self, offset: int, total: int) -> None:
        """So many bytes of so many were read."""
        now = self._clock()
        if self._quiet or now < self._due:
            return
        self._due, self._told = now + (TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS), True
        share = f" ({min(1.0, offset / total):.0%})" if total else ""
        line = f"reading {self._name}: {offset / 1e6:,.0f} of {total / 1e6:,.0f} MB{share}"
        click.echo(f"\r\x1b[K{line}" if self._terminal else line, err=True, nl=not self._terminal)

    def close(self) -> None:
        """It is read: a line that changed is taken away."""
        if self._told and self._terminal:
            click.echo("\r\x1b[K", err=True, nl=False)
