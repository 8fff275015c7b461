"""The command `kdconsole clean`: old runs on a host, and what else takes room there."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from console.command import EXIT_CODES, evidence_option
from console.host_runs_table import host_runs_lines, size, table
from console.json_errors import errors_told
from engine.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dispatch.cleaning import Cleaned, Plan, Rules

SCHEMA = "kdconsole.clean/1"
WHAT = {
    "unused": "no run there uses it",
    "damaged": "was damaged, and set aside",
    "part": "was never sent whole",
    "removed": "was half removed",
}


@click.command(epilog=EXIT_CODES)
@click.argument("runs", nargs=-1)
@click.option("--host", metavar="NAME", required=True, help="The host to clean.")
@click.option(
    "--older-than",
    metavar="DAYS",
    type=click.FloatRange(min=0),
    default=7.0,
    show_default=True,
    help="Runs whose newest file is older.",
)
@click.option("--keep", metavar="N", type=click.IntRange(min=0), default=0, help="Keep the newest N, however old.")
@click.option("--unfetched", is_flag=True, help="Runs too whose checkpoints are nowhere else.")
@click.option("--yes", is_flag=True, help="Ask nothing.")
@click.option("--dry-run", is_flag=True, help="List what would go, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@evidence_option
def clean_command(
    runs: tuple[str, ...],
    host: str,
    older_than: float,
    keep: int,
    unfetched: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
    evidence: Path,
) -> None:
    """List old runs on a host, and what else takes room there, and remove them after a typed yes.

    RUNS are ids, or beginnings of ids: these alone then, whatever their age. A run that goes on, or of which nobody
    can tell, always stays. So does, unless it is named or --unfetched is given, one whose checkpoint is nowhere else.
    What no run there has used for a day goes too: models, data and engines, and what was damaged or never sent whole.

    \b
    Examples:
      kdconsole clean --host gx10 --dry-run
      kdconsole clean --host gx10 --older-than 30 --keep 5
      kdconsole clean --host gx10 20260102-030405 --yes
    """
    from dispatch.cleaning import DAY, Rules

    asks = not (yes or dry_run)
    if asks and (as_json or not (sys.stdin.isatty() and sys.stderr.isatty())):
        raise ConfigError("there is no terminal to ask for a yes", do="give --yes, or --dry-run to see what would go")
    rules = Rules(older_than * DAY, keep, runs, unfetched)
    cleaned: Cleaned | None = None
    with errors_told(as_json):
        plan = asyncio.run(_look(host, evidence, rules))
        if not as_json:
            _show(plan)
        if (plan.going or plan.rest) and not dry_run:
            # Nothing is connected while somebody thinks about it.
            if asks and _ask() != "yes":
                click.echo("nothing was removed", err=True)
                return
            cleaned = asyncio.run(_remove(plan))
    if as_json:
        click.echo(json.dumps(_document(plan, cleaned, dry_run), indent=2))
    elif cleaned is not None:
        click.echo(f"{host}: removed {len(cleaned.removed)}, freed {size(cleaned.freed)}")
    for refused in cleaned.refused if cleaned else ():
        click.echo(f"error: {refused}", err=True)
    sys.exit(ExitCode.FAILED if cleaned and cleaned.refused else ExitCode.OK)


async def _look(host: str, evidence: Path, rules: Rules) -> Plan:
    from dispatch import cleaning
    from dispatch.places import Reach
    from dispatch.survey import survey

    async with Reach() as reach:
        found = await survey(reach, host, _say)
    return await asyncio.to_thread(cleaning.plan, found, evidence, rules, _say)


async def _remove(plan: Plan) -> Cleaned:
    from dispatch import cleaning
    from dispatch.places import Reach

    async with Reach() as reach:
        return await cleaning.remove(reach, plan, _say)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _ask() -> str:
    return str(click.prompt("Remove it? Type yes", default="", show_default=False, err=True)).strip()


def _show(plan: Plan) -> None:
    """What would go, what stays and why."""
    host = plan.survey.host
    why = {each.run.id: each.why for each in plan.runs}
    staying = [each.run for each in plan.runs if not each.goes]
    if staying:
        click.echo(f"{host}: {len(staying)} stay:")
        for line in host_runs_lines(plan.survey, staying, why):
            click.echo(f"  {line}")
    if plan.going:
        click.echo(f"{host}: {len(plan.going)} to be removed:")
        for line in host_runs_lines(plan.survey, [each.run for each in plan.going], why):
            click.echo(f"  {line}")
    if plan.rest:
        click.echo(f"{host}: not runs, to be removed:")
        for line in table([(each.name, size(each.bytes), WHAT[each.what]) for each in plan.rest]):
            click.echo(f"  {line}")
    if plan.going or plan.rest:
        click.echo(f"{host}: {size(plan.bytes)} in all; {size(plan.survey.free)} are free now")
    else:
        click.echo(f"{host}: nothing to remove")


def _document(plan: Plan, cleaned: Cleaned | None, dry_run: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "host": plan.survey.host,
        "dry_run": dry_run,
        "runs": [
            {
                "id": each.run.id,
                "state": each.run.state,
                "bytes": each.run.bytes,
                "age_seconds": round(each.age, 1),
                "goes": each.goes,
                "why": each.why,
            }
            for each in plan.runs
        ],
        "rest": [{"name": each.name, "what": each.what, "bytes": each.bytes} for each in plan.rest],
        "bytes": plan.bytes,
        "removed": list(cleaned.removed) if cleaned else [],
        "freed_bytes": cleaned.freed if cleaned else 0,
        "refused": list(cleaned.refused) if cleaned else [],
    }
