"""Commands for runs that exist: `kdconsole attach`, `export` and `runs`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from console.command import evidence_option, finish, narrator, need_terminal, open_screen
from engine.errors import ExitCode, KdError

if TYPE_CHECKING:
    from dispatch.runs import RunDir


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No narration on standard error.")
@click.option("--accept-loss", is_flag=True, help="Go on where a reboot of the host lost the stream's end; kept here.")
@evidence_option
@click.pass_context
def attach_command(
    context: click.Context, run: str, as_json: bool, quiet: bool, accept_loss: bool, evidence: Path
) -> None:
    """Follow a run that is going on, or report on one that has ended.

    RUN is an id, its beginning, or a directory; HOST:ID is a run of that host that this console never saw.
    """
    need_terminal(context)
    if accept_loss and not context.obj["headless"]:
        raise click.UsageError("--accept-loss goes with --headless")
    import asyncio

    from console import headless
    from console.fetch_command import find
    from dispatch.places import Reach

    async def found() -> RunDir:
        async with Reach() as reach:
            return await find(reach, evidence, run)

    target = asyncio.run(found())
    if not context.obj["headless"]:
        open_screen(context, evidence, run=target.path)
        return
    finish(headless.attach(target, narrator(quiet), accept_loss), as_json)


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
@click.option("--host", metavar="NAME", help="Ask this host for every run there, made from here or from elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@evidence_option
def runs_command(host: str | None, as_json: bool, evidence: Path) -> None:
    """List the runs in the evidence directory, newest first; with --host, all runs that stand on that host.

    A run whose host cannot be reached is unknown, and not failed. With --host that is exit code 3.

    \b
    Examples:
      kdconsole runs
      kdconsole runs --host gx10
    """
    import asyncio

    if host is not None:
        _runs_there(host, as_json, evidence)
        return
    rows = asyncio.run(_states(evidence))
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


async def _states(evidence: Path) -> list[tuple[RunDir, str, str]]:
    """Every run here with its state and its end; a host that does not answer is asked once, not once a run."""
    from console.run_files import read_exit
    from dispatch import runs
    from dispatch.places import Reach
    from dispatch.transport import TransportError

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
                    silent[where] = str(error)
                rows.append((each, "unknown", str(error)))
    return rows


def _runs_there(host: str, as_json: bool, evidence: Path) -> None:
    import asyncio

    from console.host_runs_table import host_runs_document, host_runs_lines
    from dispatch.places import Reach
    from dispatch.runs import find_runs
    from dispatch.survey import Survey, survey
    from dispatch.transport import TransportError

    async def asked() -> Survey:
        async with Reach() as reach:
            return await survey(reach, host)

    try:
        found = asyncio.run(asked())
    except TransportError as error:
        if as_json:
            click.echo(json.dumps({"schema": "kdconsole.host-runs/1", "host": host, "unknown": str(error)}, indent=2))
        told = "" if "unknown" in str(error) else f"; what runs on {host} is unknown"
        click.echo(f"error: {error}{told}", err=True)
        sys.exit(ExitCode.CONNECTION)
    here = {each.run: str(each.path) for each in find_runs(evidence)}
    if as_json:
        click.echo(json.dumps(host_runs_document(found, here), indent=2))
        return
    remarks = {
        each.id: "" if each.run in here else f"made from {each.by or 'elsewhere'}; kdconsole attach {host}:{each.id}"
        for each in found.runs
    }
    for line in host_runs_lines(found, found.runs, remarks):
        click.echo(line)
    if not found.runs:
        click.echo(f"no runs on {host} in {found.base}/runs", err=True)
