"""What the commands share: options, the way to the screen, the narration, the report and the exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from console.narration import Narrator
    from console.report import Result
    from engine.config import RunConfig

MODES = ("smoke", "train", "prepare", "evaluate")
"""What a configuration can be read for."""
EXIT_CODES = """\b
Exit codes:
  0    every fatal and gate verdict is PASS
  1    one of them is FAIL, or an ended run's files were changed
  2    wrong usage, configuration, model or data
  3    the host could not be reached
  4    time-out or stall, or a budget that ended a smoke before its tenth step
  5    the run crashed, or one of the verdicts is undecided
  130  interrupted
"""


def evidence_option(command: Any) -> Any:
    """Where run directories live."""
    return click.option(
        "--evidence",
        metavar="DIR",
        default="evidence",
        show_default=True,
        envvar="KDCONSOLE_EVIDENCE",
        type=click.Path(path_type=Path),
        help="Where run directories live.",
    )(command)


def mode_option(command: Any) -> Any:
    """Reads a configuration for another mode than its own."""
    return click.option("--mode", type=click.Choice(MODES), help="Read it for this mode, whatever it says.")(command)


def open_screen(context: click.Context, evidence: Path, **first: Any) -> None:
    """Opens the app, which needs a terminal; everything it needs is imported here and not before."""
    need_terminal(context)
    from console.interactive import open_app

    left = open_app(evidence, readonly=context.obj["readonly"], **first)
    if left:
        click.echo(left)


def need_terminal(context: click.Context) -> None:
    """Refuses a command that would open the screen where there is none, before anything else is looked at."""
    if context.obj["headless"] or all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        return
    command = context.info_name if context.parent else "COMMAND"
    raise click.UsageError(f"the dashboard needs a terminal; without one: kdconsole --headless {command} …")


def require_room(config: RunConfig, evidence: Path, force: bool, quiet: bool) -> list[str]:
    """Refuses a run that has too little room on this machine; see `console.room.require_room`."""
    from rich.console import Console

    from console import room

    console = Console(stderr=True, highlight=False)
    return room.require_room(config, evidence, force=force, show=lambda table: None if quiet else console.print(table))


def narrator(quiet: bool) -> Narrator:
    """Tells on standard error what a run does; `quiet` says nothing."""
    from rich.console import Console

    from console.narration import Narrator

    return Narrator(Console(stderr=True, highlight=False), quiet)


def finish(result: Result | None, as_json: bool) -> None:
    """Prints the report and leaves with the run's exit code; 0 when the operator let go of a run that goes on."""
    from rich.console import Console

    from console import report

    if result is None:
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    with console.capture() as capture:
        if as_json:
            console.out(json.dumps(report.document(result), indent=2, allow_nan=False))
        else:
            report.show(result, console)
    write_out([capture.get()])
    sys.exit(result.exit_code)


def write_out(pieces: Iterable[str]) -> None:
    """Writes to standard output as UTF-8; a reader that went away (`| head`) has read enough."""
    try:
        sys.stdout.flush()
        for piece in pieces:
            sys.stdout.buffer.write(piece.encode())
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
