"""The command `kdconsole stop`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from console.command import EXIT_CODES, evidence_option
from console.json_errors import errors_told
from engine.errors import ExitCode

if TYPE_CHECKING:
    from dispatch.runs import RunDir
    from dispatch.stopping import Stopped

SCHEMA = "kdconsole.stop/1"


@click.command(epilog=EXIT_CODES)
@click.argument("run")
@click.option("--grace", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds that it has.")
@click.option("--kill/--no-kill", default=True, show_default=True, help="SIGKILL after the grace.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="Do not tell what is waited for.")
@evidence_option
def stop_command(run: str, grace: float, kill: bool, as_json: bool, quiet: bool, evidence: Path) -> None:
    """Ask a run to stop, and wait until it has. RUN is an id, its beginning, or a directory.

    A run commits a checkpoint first; one that has not ended after the grace is killed, which loses the steps since its
    last checkpoint and is said. CANCELLED is said after the end was seen and its GPU is free. Exit code 0: it is
    cancelled, or had ended; 4: it still runs, or its GPU is not free; 5: nobody recorded its end.

    \b
    Examples:
      kdconsole stop 20260102-030405
      kdconsole stop 20260102-030405 --grace 900
      kdconsole stop 20260102-030405 --no-kill
    """
    from dispatch.places import Reach
    from dispatch.runs import resolve_run
    from dispatch.stopping import stop_run

    with errors_told(as_json):
        target = resolve_run(evidence, run)

    def say(text: str) -> None:
        if not quiet:
            click.echo(f"{target.id}: {text}", err=True)

    async def stopping() -> Stopped:
        async with Reach() as reach:
            return await stop_run(reach.place(target), grace=grace, kill=kill, say=say)

    try:
        with errors_told(as_json):
            done = asyncio.run(stopping())
    except KeyboardInterrupt:
        click.echo(f"left; the run was asked to stop and may be doing so: kdconsole stop {target.id}", err=True)
        sys.exit(ExitCode.INTERRUPTED)
    click.echo(json.dumps(_document(target, done), indent=2) if as_json else f"{target.id}: {done.describe()}")
    sys.exit(_code(done))


def _code(done: Stopped) -> ExitCode:
    stop = done.stop
    if stop.cancelled or stop.result == "already_ended":
        return ExitCode.OK
    return ExitCode.UNDECIDED if stop.state == "lost" else ExitCode.TIMEOUT


def _document(target: RunDir, done: Stopped) -> dict[str, Any]:
    stop = done.stop
    return {
        "schema": SCHEMA,
        "id": target.id,
        "host": target.manifest.where,
        "result": stop.result,
        "cancelled": stop.cancelled and stop.result != "already_ended",
        "killed": stop.killed,
        "exit": stop.exit.describe() if stop.exit else None,
        "gpu": stop.gpu,
        "gpu_free": stop.gpu_free,
        "gpu_problem": stop.gpu_problem or None,
        "step": done.step,
        "saved_step": done.checkpoint.step if done.checkpoint else None,
        "checkpoint": f"checkpoints/{done.checkpoint.name}" if done.checkpoint else None,
        "told": done.describe(),
    }
