"""`kdconsole preflight`: says whether a host, or this machine, is ready for a run."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import click

from console import preflight_table
from console.command import evidence_option, mode_option
from console.preflight import preflight
from dispatch.places import Reach
from dispatch.preflight import Preflight
from engine.config import load_config


@click.command("preflight", short_help="Say whether a host, or this machine, is ready for a run.")
@click.option("--host", metavar="NAME", help="A host of kdconsole hosts; without it this machine.")
@click.option("--config", "file", metavar="FILE", type=click.Path(path_type=Path), help="The run that it is for.")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set any key, such as train.batch=8.")
@mode_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@evidence_option
@click.pass_context
def preflight_command(
    context: click.Context,
    /,
    host: str | None,
    file: Path | None,
    sets: tuple[str, ...],
    mode: str | None,
    as_json: bool,
    evidence: Path,
) -> None:
    """Look at a host before a run is started there: connection and key, Python, torch and CUDA, packages, GPU, who else
    uses it, memory, disk, write access, clock, models and data. Nothing stays there, nothing is started.

    Without --config it is asked for the built-in smoke. Exit code 0: ready. 2: something forbids a start, and the
    table says what to do. 3: the host was not reached.

    \b
    Examples:
      kdconsole preflight --host gx10 --config config.yaml
      kdconsole preflight --host gx10 --config config.yaml --set train.batch=8
      kdconsole preflight --host gx10 --json
    """
    config = load_config(
        file, sets=sets, environ=os.environ, template=None if file else "builtin", overrides={"mode": mode}
    )
    click.echo(f"looking at {host or 'this machine'} …", err=True)

    async def look() -> Preflight:
        async with Reach() as reach:
            return await preflight(reach, host, config, evidence, say=lambda text: click.echo(text, err=True))

    found = asyncio.run(look())
    if as_json:
        click.echo(json.dumps(preflight_table.document(found), indent=2))
    else:
        preflight_table.show(found)
    context.exit(found.exit_code)
