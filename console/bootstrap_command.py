"""`kdconsole hosts bootstrap`: makes the environment of a host that runs are sent to."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json

import click


@click.command("bootstrap", short_help="Make a host ready: its Python environment, and the engine.")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
def bootstrap_command(name: str, as_json: bool) -> None:
    """Make RUN_DIR/venv on the host NAME with what the engine needs, put the engine there, and try both.

    A Python there that has torch keeps it. Safe to repeat; what is there already is left alone.
    """
    from dispatch.environment import Environment, bootstrap
    from dispatch.places import Reach

    async def make() -> Environment:
        async with Reach() as reach:
            say = functools.partial(click.echo, err=True)
            return await bootstrap(reach.transport(name), reach.host(name), say)

    made = asyncio.run(make())
    if as_json:
        click.echo(json.dumps({"schema": "kdconsole.bootstrap/1", "host": name, **dataclasses.asdict(made)}, indent=2))
        return
    cuda = f"CUDA {made.cuda}, {made.devices} device{'' if made.devices == 1 else 's'}" if made.cuda else "no CUDA"
    own = f", its own of {made.base}" if made.own_torch else ""
    click.echo(f"{name}: {'made' if made.made else 'was ready'}: Python {made.python_version} at {made.python}")
    click.echo(f"{name}: torch {made.torch} ({cuda}){own}")
