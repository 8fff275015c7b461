"""The command `kdconsole fetch`: what a run left on its host, brought here and verified."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from console.command import EXIT_CODES, evidence_option
from console.json_errors import errors_told
from engine.errors import ExitCode

if TYPE_CHECKING:
    from dispatch.fetch import Choice, Fetched
    from dispatch.places import Reach
    from dispatch.runs import RunDir
    from dispatch.transfer import Progress

SCHEMA = "kdconsole.fetch/1"
PLAIN_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


@click.command(epilog=EXIT_CODES)
@click.argument("run")
@click.option(
    "--checkpoints",
    type=click.Choice(("best", "latest", "all", "none")),
    help="Which checkpoints.  [default: best if one was saved as best, else latest]",
)
@click.option("--model", is_flag=True, help="The exported model too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
@evidence_option
def fetch_command(run: str, checkpoints: Any, model: bool, as_json: bool, quiet: bool, evidence: Path) -> None:
    """Bring what a run left on its host here: its small files, a checkpoint, the model; every file verified by hash.

    RUN is an id, its beginning, or a directory; HOST:ID is a run of that host that this console never saw. A run that
    goes on can be fetched as far as it is. Interrupted, the same command goes on; a second time it moves nothing.

    \b
    Examples:
      kdconsole fetch 20260102-030405
      kdconsole fetch 20260102-030405 --checkpoints all --model
      kdconsole fetch gx10:20260102-030405-train-a1b2c3
    """
    from dispatch.fetch import Choice

    teller = Teller(quiet)
    try:
        with errors_told(as_json):
            fetched = asyncio.run(_fetch(run, Choice(checkpoints, model), evidence, teller))
    except KeyboardInterrupt:
        teller.end()
        click.echo(f"interrupted; what has come is kept: kdconsole fetch {run} goes on from there", err=True)
        sys.exit(ExitCode.INTERRUPTED)
    finally:
        teller.end()
    if as_json:
        click.echo(json.dumps(_document(fetched), indent=2))
    else:
        for line in lines(fetched):
            click.echo(line)
    for refused in fetched.refused:
        click.echo(f"error: {refused}", err=True)
    sys.exit(ExitCode.FAILED if fetched.refused else ExitCode.OK)


async def _fetch(run: str, choice: Choice, evidence: Path, teller: Teller) -> Fetched:
    from dispatch.fetch import fetch
    from dispatch.places import Reach

    async with Reach() as reach:
        run_dir = await find(reach, evidence, run)
        return await fetch(reach, run_dir, choice, teller.say, teller.progress)


async def find(reach: Reach, evidence: Path, run: str) -> RunDir:
    """The run that an operator means, as `runs.resolve_run` and, for HOST:ID, from that host.

    Raises:
        KdError: there is none, or its host cannot be reached.
    """
    from dispatch.runs import resolve_run

    if ":" not in run or Path(run).exists():
        return resolve_run(evidence, run)
    from dispatch.adopt import adopt, on_host

    named = on_host(run)
    return await adopt(reach, *named, evidence) if named else resolve_run(evidence, run)


def lines(fetched: Fetched) -> list[str]:
    """What a fetch left here, for a person."""
    manifest, path = fetched.run_dir.manifest, fetched.run_dir.path
    if fetched.here:
        return [f"{manifest.id}: is a run of this machine: it is here already, in {path}"]
    moved = f"{fetched.moved / 1e6:,.1f} MB came now" if fetched.moved else "nothing had to be moved"
    told = [f"{manifest.id}: {fetched.state} on {manifest.where}; {moved}; in {path}"]
    told += [f"  {each.relative_to(path)}: whole and verified" for each in fetched.checkpoints]
    told += [f"  {fetched.model.relative_to(path)}/: whole and verified"] if fetched.model else []
    return told + [f"  note: {note}" for note in fetched.notes]


def _document(fetched: Fetched) -> dict[str, Any]:
    run_dir = fetched.run_dir
    return {
        "schema": SCHEMA,
        "id": run_dir.id,
        "host": run_dir.manifest.where,
        "path": str(run_dir.path),
        "here": fetched.here,
        "state": fetched.state or None,
        "moved_bytes": fetched.moved,
        "checkpoints": [str(each.relative_to(run_dir.path)) for each in fetched.checkpoints],
        "model": str(fetched.model.relative_to(run_dir.path)) if fetched.model else None,
        "refused": list(fetched.refused),
        "notes": list(fetched.notes),
    }


class Teller:
    """Tells on standard error how far a transfer is: one line that moves on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._moving, self._told = False, time.monotonic()

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            self.end()
            click.echo(text, err=True)

    def progress(self, progress: Progress) -> None:
        """How far it is, with rate and time left."""
        if self._quiet:
            return
        if self._terminal:
            self._moving = True
            click.echo(f"\r{progress.describe()}\x1b[K", err=True, nl=False)
        elif time.monotonic() - self._told > PLAIN_SECONDS:
            self._told = time.monotonic()
            click.echo(progress.describe(), err=True)

    def end(self) -> None:
        """Leaves the moving line behind."""
        if self._moving:
            self._moving = False
            click.echo("\r\x1b[K", err=True, nl=False)
