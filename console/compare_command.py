"""The command `kdconsole compare`: in what runs of any kind differ, as a table, as JSON, as CSV, or in the app."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import click

from console.command import evidence_option, need_terminal, open_screen, write_out
from console.json_errors import errors_told
from engine.errors import KdError, RunError
from engine.text import clean

MOST_IN_THE_APP = 6
"""Runs that the chart has colours for."""
FILE_COLUMNS = 140
"""Width of a table that no terminal shows."""


@click.command("compare", short_help="In what runs differ: settings, losses, speed, verdicts.")
@click.argument("runs", nargs=-1, metavar="DIR DIR…")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the whole table as CSV, every number in full.")
@click.option("--all", "every_line", is_flag=True, help="Also the lines in which nothing differs.")
@evidence_option
@click.pass_context
def compare_command(
    context: click.Context, runs: Sequence[str], as_json: bool, as_csv: bool, every_line: bool, evidence: Path
) -> None:
    """Hold runs against the first of them: settings that differ, losses at equal steps and at equal tokens, speed,
    projections, verdicts, inputs.

    DIR is a run directory, the predecessor's directory, a log, or a run's id. On a terminal it opens the app's Compare
    screen, with the curves laid over each other; with --headless, --json or --csv it prints. Exit code 0: compared,
    whatever came of the runs; 2: one of them cannot be read.

    \b
    Examples:
      kdconsole compare 20260102-030405 20260103-040506
      kdconsole --headless compare evidence/a old/launch.log
      kdconsole compare evidence/a evidence/b --csv > compared.csv
    """
    if as_json and as_csv:
        raise click.UsageError("give either --json or --csv")
    printed = context.obj["headless"] or as_json or as_csv
    if every_line and not printed:
        raise click.UsageError("--all goes with --headless; the app shows every line")
    if not printed:
        need_terminal(context)
    with errors_told(as_json):
        paths = _found(evidence, runs)
        if not printed:
            if len(paths) > MOST_IN_THE_APP:
                raise RunError(
                    f"compare: {len(paths)} runs", expected=f"at most {MOST_IN_THE_APP} in the app", do="use --headless"
                )
            open_screen(context, evidence, compare=paths)
            return
        text = _text(paths, as_json, as_csv, every_line)
    write_out([text])


def _found(evidence: Path, names: Sequence[str]) -> list[Path]:
    """Where the runs stand, in the order given; everything that cannot be opened is told at once."""
    from console.named_evidence import named_evidence

    paths: list[Path] = []
    problems: list[str] = []
    for name in names:
        try:
            paths.append(named_evidence(evidence, name))
        except KdError as error:
            problems.append(str(error))
    if problems:
        raise RunError("\n       ".join(problems))
    different = list({os.path.realpath(path): path for path in paths}.values())
    if len(different) < 2:
        named = f"{len(names)} given" if len(paths) == len(different) else f"{clean(names[0], 200)} only, twice"
        raise RunError(f"compare: {named}", expected="at least two different runs")
    return different


def _text(paths: Sequence[Path], as_json: bool, as_csv: bool, every_line: bool) -> str:
    from rich.console import Console

    from console import side_by_side
    from console.compare_table import show
    from console.differences import differences
    from console.run_reader import load_run

    runs = [load_run(path) for path in paths]
    sections = differences(runs, time.time())
    if as_json:
        return json.dumps(side_by_side.document(runs, sections), indent=2, allow_nan=False) + "\n"
    if as_csv:
        return side_by_side.as_csv(runs, sections)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_COLUMNS)
    with console.capture() as capture:
        show(side_by_side.labels(runs), sections, console, every_line=every_line)
    return capture.get()
