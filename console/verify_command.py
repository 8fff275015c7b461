"""`kdconsole verify`: evidence proven, as a table for people and one JSON document for programs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from console.command import evidence_option, write_out
from engine.errors import ExitCode, KdError
from engine.text import clean

if TYPE_CHECKING:
    from console.verify.directory import Verified

SCHEMA = "kdconsole.verify/1"
_ID = re.compile(r"[0-9a-f]{12,64}")
_WORST_FIRST = (ExitCode.FAILED, ExitCode.USAGE, ExitCode.UNDECIDED, ExitCode.OK)
_EXIT_CODES = """\b
Exit codes:
  0    everything that was recomputed is as stated
  1    something differs
  2    wrong usage, or nothing there to verify, or a run that still goes on
  5    nothing differs, but it cannot be proven: there are no checksums, say
"""


@click.command(epilog=_EXIT_CODES)
@click.argument("paths", metavar="DIR...", nargs=-1, required=True)
@click.option("--id", "given", metavar="HASH", help="The evidence id that it must have: 12 hexadecimal digits or more.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@evidence_option
def verify_command(paths: Sequence[str], given: str | None, quiet: bool, as_json: bool, evidence: Path) -> None:
    """Prove what a run left behind: recompute all of it and hold it against what it states.

    DIR is a run directory, the predecessor's directory, a log, or a run id in --evidence. Every file is hashed,
    weights included, the whole stream replayed, every falsifier judged anew; manifest, checkpoints and model are held
    against the stream. What differs is named, with its file and line. Nothing is written.

    This proves accident, not malice: whoever can write the directory can write new checksums too, and gets another
    evidence id. Keep the id elsewhere, in a commit say, and --id proves that nothing was changed since.

    \b
    Examples:
      kdconsole verify evidence/20260102-030405-train-1a2b3c
      kdconsole verify 20260102 --id 83d8417ef5a9
      kdconsole verify evidence/* --json
    """
    if given is not None and _ID.fullmatch(given := given.strip().lower()) is None:
        raise click.UsageError(f"--id {clean(given, 100)}: expected 12 to 64 hexadecimal digits")
    if given is not None and len(paths) > 1:
        raise click.UsageError("--id is of one directory")
    done: list[Verified] = []
    failed: list[tuple[str, KdError]] = []
    for name in paths:
        try:
            done.append(_verified(name, given, quiet, evidence))
        except KdError as error:
            if len(paths) == 1:
                if as_json:
                    click.echo(json.dumps(_error(error), indent=2))
                raise
            failed.append((name, error))
    codes = {int(each.exit_code) for each in done} | {int(ExitCode.USAGE) for _ in failed}
    code = next(each for each in _WORST_FIRST if each in codes)
    _print(_document(done, failed, code) if as_json else done)
    for _, problem in failed:
        click.echo(f"error: {problem}", err=True)
    sys.exit(code)


def _verified(name: str, given: str | None, quiet: bool, evidence: Path) -> Verified:
    from console.verify.directory import verify
    from dispatch.runs import resolve_run

    path = Path(name)
    if not os.path.lexists(path) and os.sep not in name:
        path = resolve_run(evidence, name).path
    return verify(path, given, lambda text: None if quiet else click.echo(text, err=True))


def _error(error: KdError) -> dict[str, Any]:
    return {"schema": "kdconsole.error/1", "error": str(error), "exit_code": int(error.exit_code)}


def _document(done: Sequence[Verified], failed: Sequence[tuple[str, KdError]], code: ExitCode) -> dict[str, Any]:
    from console.verify.table import document

    told: dict[str, Any] = {"schema": SCHEMA, "exit_code": int(code), "verified": [document(each) for each in done]}
    return told | {"errors": [{"path": clean(name, 500), "error": str(error)} for name, error in failed]}


def _print(what: dict[str, Any] | Sequence[Verified]) -> None:
    from rich.console import Console

    from console.verify.table import show

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    with console.capture() as capture:
        if isinstance(what, dict):
            console.out(json.dumps(what, indent=2, allow_nan=False))
        else:
            for each in what:
                show(each, console)
    write_out([capture.get()])
