"""`kdconsole serve`: the same dashboard in a browser on this machine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import click

from console.settings import load_settings
from engine.errors import ConfigError

PORT = 8765
LOOPBACK = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::1": "::1"}
"""The hosts that may be asked for, and what is listened on then."""


def _loopback(context: click.Context, option: click.Parameter, value: str) -> str:
    if value not in LOOPBACK:
        raise click.BadParameter(
            f"{value!r} is not this machine's loopback, and nothing else is served; "
            f"from elsewhere use ssh -L {PORT}:127.0.0.1:{PORT} HOST",
            context,
            option,
        )
    return LOOPBACK[value]


@click.command("serve", short_help="Show the dashboard in a browser on this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 is any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, callback=_loopback, help="127.0.0.1 or ::1.")
@click.option("--readonly", is_flag=True, help="The pages start, stop and write nothing.")
@click.option(
    "--evidence",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Whose runs the pages list.  [default: evidence]",
)
@click.pass_context
def serve_command(context: click.Context, port: int, host: str, readonly: bool, evidence: Path | None) -> None:
    """Serve the dashboard to browsers on this machine, and to nobody else; needs the extra `serve`.

    It prints an address with a key in it. Each page that opens it has a dashboard of its own; a page that is closed
    ends its dashboard and no run. Ctrl-C ends the serving.

    \b
    Examples:
      kdconsole serve
      kdconsole serve --readonly --port 9000
    """
    try:
        from console.pages import serve
    except ImportError as error:
        raise ConfigError(
            f"kdconsole serve: {error.name or error} is not installed",
            expected="the extra that serves a browser",
            do="pip install 'kdconsole[serve]'",
        ) from None
    root = context.find_root().params
    where = evidence or root.get("evidence") or Path(os.environ.get("KDCONSOLE_EVIDENCE") or "evidence")
    load_settings()  # what is wrong with them is told here, and not in each page

    def tell(text: str) -> None:
        click.echo(text)

    serving = serve(where, readonly=readonly or bool(root.get("readonly")), host=host, port=port, tell=tell)
    asyncio.run(serving)
