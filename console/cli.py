"""The command line, `kdconsole`: options, and the one place where errors become a message and an exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

from console.command import EXIT_CODES, open_screen
from engine.errors import ExitCode, KdError

COMMANDS = {
    "attach": "console.run_commands:attach_command",
    "clean": "console.clean_command:clean_command",
    "compare": "console.compare_command:compare_command",
    "config": "console.config_command:config_group",
    "convert": "console.convert_command:convert_command",
    "evaluate": "console.evaluate_command:evaluate_command",
    "export": "console.run_commands:export_command",
    "fetch": "console.fetch_command:fetch_command",
    "hosts": "console.hosts_command:hosts_group",
    "import": "console.import_command:import_command",
    "preflight": "console.preflight_command:preflight_command",
    "prepare": "console.start_commands:prepare_command",
    "publish": "console.publish_command:publish_command",
    "review": "console.review_command:review_command",
    "report": "console.report_command:report_command",
    "room": "console.room:room_command",
    "runs": "console.run_commands:runs_command",
    "screenshot": "console.screenshot:screenshot_command",
    "serve": "console.serve:serve_command",
    "smoke": "console.start_commands:smoke_command",
    "stop": "console.stop_command:stop_command",
    "train": "console.start_commands:train_command",
    "verify": "console.verify_command:verify_command",
}
"""Where each command is; its module is imported when it is called for."""


class Commands(click.Group):
    """Commands that are imported when they are called for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """See click."""
        return sorted(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """See click."""
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=Commands,
    epilog=EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--headless", is_flag=True, help="No screen: prepare, smoke, train, evaluate, attach, review, compare.")
@click.option("--readonly", is_flag=True, help="The screen starts, stops and writes nothing.")
@click.option("--evidence", metavar="DIR", type=click.Path(path_type=Path), help="Whose runs the screen lists.")
@click.option("--debug", is_flag=True, envvar="KDCONSOLE_DEBUG", help="Show tracebacks.")
@click.version_option(None, "-V", "--version", package_name="kdconsole", prog_name="kdconsole")
@click.pass_context
def cli(context: click.Context, headless: bool, readonly: bool, evidence: Path | None, debug: bool) -> None:
    """Operator console for knowledge-distillation runs. Without a command it opens the dashboard, where ? says what
    every key does.

    \b
    Start here:
      kdconsole                             the dashboard of all runs
      kdconsole --headless smoke            60 s on the built-in models
      kdconsole --headless smoke CONFIG     on your teacher, student and data
      kdconsole config init > config.yaml   a configuration to start from
    """
    context.obj = {"headless": headless, "readonly": readonly, "debug": debug}
    if context.invoked_subcommand is None:
        if headless:
            raise click.UsageError(
                "--headless needs a command: evaluate, prepare, smoke, train or attach; for past runs review, compare"
            )
        open_screen(context, evidence or Path(os.environ.get("KDCONSOLE_EVIDENCE") or "evidence"))


def main() -> NoReturn:
    """Entry point: errors that a user can cause become one message on standard error and their exit code."""
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("KDCONSOLE_DEBUG"))
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else ExitCode.OK)
    except KdError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(ExitCode.INTERRUPTED)
