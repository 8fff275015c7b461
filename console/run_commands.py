"""Commands for runs that exist: `kdconsole attach`, `export` and `runs`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from console.command import evidence_option, finish, narrator, need_terminal, open_screen
from engine.errors import ExitCode

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
@click.option(
    "--format",
    "container",
    type=click.Choice(("hf", "apr")),
    default="hf",
    show_default=True,
    help="hf: a Hugging Face directory; apr: the predecessor's container, with the tokenizer beside it.",
)
@click.option("--to", metavar="DIR", type=click.Path(path_type=Path), help="With apr: to be made.  [default: RUN-apr]")
@evidence_option
def export_command(run: str, step: int | None, best: bool, container: str, to: Path | None, evidence: Path) -> None:
    """Write the model of a run's checkpoint, the newest by default, and prove it in a fresh process.

    RUN is an id, its beginning, or a directory; the model comes to stand in its model/. An APR file is made outside of
    it, DIR/model.apr, since an ended run's directory is sealed; each of its tensors is compared with the checkpoint's.
    """
    import asyncio

    from dispatch import runs
    from dispatch.transport import LocalTransport

    if step is not None and best:
        raise click.UsageError("give either --step or --best")
    if to is not None and container != "apr":
        raise click.UsageError("--to goes with --format apr; a Hugging Face directory is the run's own model/")
    target = runs.resolve_run(evidence, run)
    which = [str(step)] if step is not None else ["best"] if best else []
    if container == "apr":
        which.append(f"apr={os.path.abspath(to or f'{target.path.resolve().name}-apr')}")
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
@click.option("--filter", "wanted", metavar="TEXT", default="", help="Only what passes this filter, as / in the app.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@evidence_option
@click.pass_context
def runs_command(context: click.Context, host: str | None, wanted: str, as_json: bool, evidence: Path) -> None:
    """List the runs in the evidence directory, newest first; with --host, all runs that stand on that host.

    Listed is all evidence, that of the predecessor's scripts and bare logs as well. A run whose host cannot be reached
    is unknown, and not failed. With --host that is exit code 3.

    A filter is text that a run has in what is shown of it, and any of status:failed, host:gx10, mode:train, model:1.5b,
    phase:3b, verdict:fail (unknown, pending, pass), verdict:F-SMOKE-001=fail, date:2026-11, date:>2026-11-01, date:7d.

    \b
    Examples:
      kdconsole runs
      kdconsole runs --filter "verdict:fail date:7d"
      kdconsole runs --host gx10
    """
    from console.row_filter import parse_query

    query = parse_query(wanted)
    if query.problems:
        raise click.BadParameter("; ".join(query.problems), param_hint="--filter")
    if host is not None:
        if wanted:
            raise click.UsageError("--filter goes with the runs of the evidence directory; with --host all are listed")
        _runs_there(host, as_json, evidence)
        return
    from console.runs_listing import listed, runs_document, runs_lines

    runs = listed(evidence, query, readonly=bool(context.find_object(dict) and context.obj["readonly"]))
    if as_json:
        click.echo(json.dumps(runs_document(runs), indent=2, allow_nan=False))
        return
    for line in runs_lines(runs):
        click.echo(line)
    if not runs:
        none = f"no run in {evidence} passes {query.text}"
        click.echo(none if query.text else f"no runs in {evidence}; kdconsole --headless smoke makes one", err=True)


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
