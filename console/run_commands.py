"""Commands for runs that exist: `kdconsole attach`, `stop`, `export` and `runs`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from console.command import evidence_option, finish, narrator, need_terminal, open_screen
from engine.errors import ExitCode, KdError


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No narration on standard error.")
@evidence_option
@click.pass_context
def attach_command(context: click.Context, run: str, as_json: bool, quiet: bool, evidence: Path) -> None:
    """Follow a run that is going on, or report on one that has ended. RUN is an id, its beginning, or a directory."""
    need_terminal(context)
    from console import headless
    from dispatch.runs import resolve_run

    target = resolve_run(evidence, run)
    if not context.obj["headless"]:
        open_screen(context, evidence, run=target.path)
        return
    finish(headless.attach(target, narrator(quiet)), as_json)


@click.command()
@click.argument("run")
@click.option("--grace", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds to wait.")
@click.option("--kill", is_flag=True, help="SIGKILL after the grace.")
@evidence_option
def stop_command(run: str, grace: float, kill: bool, evidence: Path) -> None:
    """Ask a run to stop, and wait until it has. RUN is an id, its beginning, or a directory."""
    import asyncio

    from dispatch import runs
    from dispatch.places import Reach

    target = runs.resolve_run(evidence, run)

    async def stopping() -> runs.Stop:
        async with Reach() as reach:
            return await reach.place(target).stop(grace=grace, kill=kill)

    done = asyncio.run(stopping())
    how = f": {done.exit.describe()}" if done.exit else ""
    click.echo(f"{target.id}: {done.result.replace('_', ' ')}{how}")
    if done.result == "still_running":
        sys.exit(ExitCode.TIMEOUT)


@click.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=1), metavar="N", help="The checkpoint of this step.")
@click.option("--best", is_flag=True, help="The checkpoint with the lowest held-out loss.")
@evidence_option
def export_command(run: str, step: int | None, best: bool, evidence: Path) -> None:
    """Write the model of a run's checkpoint, the newest by default, and prove it in a fresh process.

    RUN is an id, its beginning, or a directory; the model comes to stand in its model/.
    """
    import asyncio

    from dispatch import runs
    from dispatch.transport import LocalTransport

    if step is not None and best:
        raise click.UsageError("give either --step or --best")
    target = runs.resolve_run(evidence, run)
    which = [str(step)] if step is not None else ["best"] if best else []
    command = [sys.executable, "-P", "-m", "engine.export_run", os.path.abspath(target.path), *which]
    done = asyncio.run(LocalTransport().run(command, timeout=3_600.0))
    click.echo(done.stderr.decode(errors="replace"), err=True, nl=False)
    if done.rc in (ExitCode.OK, ExitCode.FAILED) and done.stdout:
        told = json.loads(done.stdout.splitlines()[-1])
        click.echo(f"step {told['step']:,}: {'verified' if told['ok'] else 'NOT the trained model'}: {told['path']}")
        for problem in told["problems"]:
            click.echo(f"  {problem}")
    sys.exit(done.rc)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@evidence_option
def runs_command(as_json: bool, evidence: Path) -> None:
    """List the runs in the evidence directory, newest first."""
    import asyncio

    from console.run_files import read_exit
    from dispatch import runs
    from dispatch.places import Reach
    from dispatch.transport import TransportError

    async def states() -> list[tuple[runs.RunDir, str, str]]:
        rows: list[tuple[runs.RunDir, str, str]] = []
        silent: dict[str, str] = {}
        async with Reach() as reach:
            for each in runs.find_runs(evidence):
                where = each.manifest.where
                try:
                    if each.manifest.remote is not None and (ended := read_exit(each.path)) is not None:
                        rows.append((each, "ended", ended.describe()))
                        continue
                    if where in silent:
                        raise TransportError(silent[where])
                    told = await reach.place(each).status()
                    rows.append((each, told.state, told.exit.describe() if told.exit else ""))
                except KdError as error:
                    if isinstance(error, TransportError):
                        silent[where] = str(error)  # asked once, not once a run
                    rows.append((each, "unknown", str(error)))
        return rows

    rows = asyncio.run(states())
    if as_json:
        keys = ("id", "mode", "created", "host", "state", "exit")
        columns = [(r.id, r.manifest.mode, r.manifest.created, r.manifest.where, s, e) for r, s, e in rows]
        listed = [dict(zip(keys, row, strict=True)) for row in columns]
        click.echo(json.dumps({"schema": "kdconsole.runs/1", "runs": listed}, indent=2))
        return
    for each, state, how in rows:
        click.echo(f"{each.id}  {each.manifest.created}  {each.manifest.where}  {state:8}  {how}")
    if not rows:
        click.echo(f"no runs in {evidence}; kdconsole --headless smoke makes one", err=True)
