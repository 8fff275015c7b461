"""The command line, `kdconsole`: options, and the one place where errors become a message and an exit code."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from engine.errors import ExitCode, KdError

if TYPE_CHECKING:
    from console.report import Result
    from engine.config import RunConfig

_OPTIONS = {
    "teacher": "--teacher",
    "student": "--student",
    "data.path": "--data",
    "contract": "--contract",
    "smoke.budget_seconds": "--budget",
    "smoke.max_steps": "--max-steps",
    "smoke.project_to": "--project-to",
    "train.max_steps": "--max-steps",
}
"""The option that sets a key, as messages name it."""

EXIT_CODES = """\b
Exit codes:
  0    every fatal and gate verdict is PASS
  1    one of them is FAIL, or an ended run's files were changed
  2    wrong usage, configuration, model or data
  3    the host could not be reached
  4    time-out or stall, or a budget that ended a smoke before its tenth step
  5    the run crashed, or one of the verdicts is undecided
  130  interrupted
"""

ELSEWHERE = {
    "config": "console.config_command:config_group",
    "room": "console.room:room_command",
    "screenshot": "console.screenshot:screenshot_command",
}
"""Commands in modules of their own, which are imported when they are called for."""


class Commands(click.Group):
    """The commands of this module, and those that stand elsewhere."""

    def list_commands(self, context: click.Context) -> list[str]:
        """See click."""
        return sorted({*super().list_commands(context), *ELSEWHERE})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """See click."""
        if name not in ELSEWHERE:
            return super().get_command(context, name)
        module, _, attribute = ELSEWHERE[name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=Commands,
    epilog=EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--headless", is_flag=True, help="Run without a screen; for smoke, train and attach.")
@click.option("--readonly", is_flag=True, help="The screen starts, stops and writes nothing.")
@click.option("--evidence", metavar="DIR", type=click.Path(path_type=Path), help="Whose runs the screen lists.")
@click.option("--debug", is_flag=True, envvar="KDCONSOLE_DEBUG", help="Show tracebacks.")
@click.version_option(None, "-V", "--version", package_name="kdconsole", prog_name="kdconsole")
@click.pass_context
def cli(context: click.Context, headless: bool, readonly: bool, evidence: Path | None, debug: bool) -> None:
    """Operator console for knowledge-distillation runs. Without a command it opens the dashboard.

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
            raise click.UsageError("--headless needs a command: smoke, train or attach")
        _open_screen(context, evidence or Path(os.environ.get("KDCONSOLE_EVIDENCE") or "evidence"))


def _evidence_option(command: Any) -> Any:
    return click.option(
        "--evidence",
        metavar="DIR",
        default="evidence",
        show_default=True,
        envvar="KDCONSOLE_EVIDENCE",
        type=click.Path(path_type=Path),
        help="Where run directories live.",
    )(command)


def _run_options(command: Any) -> Any:
    """What smoke and train share."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output."),
        click.option("--quiet", "-q", is_flag=True, help="No narration on standard error."),
        click.option("--force", is_flag=True, help="Start although there is too little memory or disk; recorded."),
        click.option("--name", metavar="TEXT", help="What you call this run; kept in its manifest."),
        _evidence_option,
        click.option("--contract", metavar="FILE", help="YAML file of falsifiers instead of the built-in ones."),
        click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set any key, such as train.steps=500."),
        click.option("--data", metavar="PATH", help="Text file, directory, token shards, or builtin:stdlib."),
        click.option("--student", metavar="DIR", help="Student's model directory, or builtin:student."),
        click.option("--teacher", metavar="DIR", help="Teacher's model directory, or builtin:teacher."),
    ):
        command = decorate(command)
    return command


@cli.command(epilog=EXIT_CODES)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--budget", metavar="SECONDS", help="Seconds from the engine's start to its end.  [default: 60]")
@click.option("--max-steps", metavar="N", help="Make exactly N steps, unless the budget ends first.")
@click.option("--project-to", metavar="N", help="Steps of the run to project the wall time of.  [default: 50000]")
@_run_options
@click.pass_context
def smoke(
    context: click.Context,
    /,
    config: Path | None,
    budget: str | None,
    max_steps: str | None,
    project_to: str | None,
    **options: Any,
) -> None:
    """Distil for a minute, judge every falsifier, project the real run, and say GO or NO-GO.

    CONFIG is a YAML file; without it the built-in models are taken and nothing is needed.

    \b
    Examples:
      kdconsole --headless smoke
      kdconsole --headless smoke config.yaml --budget 120 --project-to 20000
      kdconsole --headless smoke --teacher big/ --student small/ --data text/
    """
    flags = {"smoke.budget_seconds": budget, "smoke.max_steps": max_steps, "smoke.project_to": project_to}
    _start(context, config, "smoke", flags, **options)


@cli.command(epilog=EXIT_CODES)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--resume", metavar="RUN", help="Go on with this run: an id, its beginning, or a directory.")
@click.option(
    "--allow-changed",
    metavar="NAME",
    multiple=True,
    type=click.Choice(("config", "teacher", "tokenizer", "data", "initial_weights")),
    help="With --resume: what may differ from the run's beginning.",
)
@click.option("--max-steps", metavar="N", help="End after N steps, complete; the schedule stays train.steps'.")
@_run_options
@click.pass_context
def train(
    context: click.Context,
    /,
    config: Path | None,
    resume: str | None,
    allow_changed: tuple[str, ...],
    max_steps: str | None,
    **options: Any,
) -> None:
    """Train to the last step, saving checkpoints, and write the verified model.

    Ctrl-C leaves the run going and says how to stop it. A run that was stopped, or crashed, goes on with --resume from
    its newest whole checkpoint.

    \b
    Examples:
      kdconsole --headless train config.yaml
      kdconsole --headless train config.yaml --max-steps 200
      kdconsole --headless train --resume 20260102-030405
    """
    if (config is None) == (resume is None):
        raise click.UsageError("give either CONFIG or --resume RUN")
    _need_terminal(context)
    if resume is None:
        _start(context, config, "train", {"train.max_steps": max_steps}, **options)
        return
    from console import headless
    from dispatch.runs import resolve_run

    given = {"max-steps": max_steps is not None, "set": options["sets"]}
    given |= {name: options[name] for name in ("teacher", "student", "data", "contract", "name", "force")}
    ignored = [name for name, value in given.items() if value]
    if ignored:
        raise click.UsageError(f"--resume takes the run's own configuration; leave out --{ignored[0]}")
    run_dir = resolve_run(options["evidence"], resume)
    if not context.obj["headless"]:
        _open_screen(context, options["evidence"], run=run_dir.path, resume=allow_changed)
        return
    _finish(headless.resume(run_dir, allow_changed, _narrator(options["quiet"])), options["as_json"])


@cli.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No narration on standard error.")
@_evidence_option
@click.pass_context
def attach(context: click.Context, run: str, as_json: bool, quiet: bool, evidence: Path) -> None:
    """Follow a run that is going on, or report on one that has ended. RUN is an id, its beginning, or a directory."""
    _need_terminal(context)
    from console import headless
    from dispatch.runs import resolve_run

    target = resolve_run(evidence, run)
    if not context.obj["headless"]:
        _open_screen(context, evidence, run=target.path)
        return
    _finish(headless.attach(target, _narrator(quiet)), as_json)


@cli.command()
@click.argument("run")
@click.option("--grace", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds to wait.")
@click.option("--kill", is_flag=True, help="SIGKILL after the grace.")
@_evidence_option
def stop(run: str, grace: float, kill: bool, evidence: Path) -> None:
    """Ask a run to stop, and wait until it has. RUN is an id, its beginning, or a directory."""
    import asyncio

    from dispatch import runs
    from dispatch.transport import LocalTransport

    target = runs.resolve_run(evidence, run)
    done = asyncio.run(runs.stop(LocalTransport(), target.path, grace=grace, kill=kill))
    how = f": {done.exit.describe()}" if done.exit else ""
    click.echo(f"{target.id}: {done.result.replace('_', ' ')}{how}")
    if done.result == "still_running":
        sys.exit(ExitCode.TIMEOUT)


@cli.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=1), metavar="N", help="The checkpoint of this step.")
@click.option("--best", is_flag=True, help="The checkpoint with the lowest held-out loss.")
@_evidence_option
def export(run: str, step: int | None, best: bool, evidence: Path) -> None:
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


@cli.command("runs")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@_evidence_option
def list_runs(as_json: bool, evidence: Path) -> None:
    """List the runs in the evidence directory, newest first."""
    import asyncio

    from dispatch import runs
    from dispatch.transport import LocalTransport

    async def states() -> list[tuple[runs.RunDir, str, str]]:
        rows: list[tuple[runs.RunDir, str, str]] = []
        for each in runs.find_runs(evidence):
            told = await runs.status(LocalTransport(), each.path)
            rows.append((each, told.state, told.exit.describe() if told.exit else ""))
        return rows

    rows = asyncio.run(states())
    if as_json:
        keys = ("id", "mode", "created", "state", "exit")
        listed = [dict(zip(keys, (r.id, r.manifest.mode, r.manifest.created, s, e), strict=True)) for r, s, e in rows]
        click.echo(json.dumps({"schema": "kdconsole.runs/1", "runs": listed}, indent=2))
        return
    for each, state, how in rows:
        click.echo(f"{each.id}  {each.manifest.created}  {state:8}  {how}")
    if not rows:
        click.echo(f"no runs in {evidence}; kdconsole --headless smoke makes one", err=True)


def _start(
    context: click.Context,
    file: Path | None,
    mode: str,
    flags: dict[str, str | None],
    *,
    teacher: str | None,
    student: str | None,
    data: str | None,
    sets: tuple[str, ...],
    contract: str | None,
    evidence: Path,
    name: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Reads the configuration, makes the run, reports."""
    _need_terminal(context)
    from console import headless
    from console.launch import Job
    from engine.cautions import cautions
    from engine.config import load_config
    from engine.yaml_io import parse_value

    try:
        texts = {"teacher": teacher, "student": student, "data.path": data, "contract": contract}
        # A flag's text is read as YAML reads it, so that `--budget ten` is told apart from a number like anywhere else.
        # Nothing and null are no numbers either: an empty shell variable must not become the default.
        numbers = {
            key: text if text is None or (value := parse_value(text, _OPTIONS[key])) is None else value
            for key, text in flags.items()
        }
        config = load_config(
            file,
            sets=sets,
            environ=os.environ,
            template=None if file else "builtin",
            overrides={"mode": mode, **texts, **numbers},
            options=_OPTIONS,
        )
        for caution in cautions(config):
            click.echo(f"warning: {caution}", err=True)
        overrides = _require_room(config, evidence, force, quiet)
        job = Job(config, evidence, name, tuple(overrides))
        if not context.obj["headless"]:
            _open_screen(context, evidence, job=job)
            return
        result = headless.run(job, _narrator(quiet))
    except KdError as error:
        if as_json:
            failed = {"schema": "kdconsole.error/1", "error": str(error), "exit_code": int(error.exit_code)}
            click.echo(json.dumps(failed, indent=2))
        raise
    _finish(result, as_json)


def _require_room(config: RunConfig, evidence: Path, force: bool, quiet: bool) -> list[str]:
    from rich.console import Console

    from console.room import require_room

    console = Console(stderr=True, highlight=False)
    return require_room(config, evidence, force=force, show=lambda table: None if quiet else console.print(table))


def _open_screen(context: click.Context, evidence: Path, **first: Any) -> None:
    """Opens the app, which needs a terminal; everything it needs is imported here and not before."""
    _need_terminal(context)
    from console.interactive import open_app

    left = open_app(evidence, readonly=context.obj["readonly"], **first)
    if left:
        click.echo(left)


def _need_terminal(context: click.Context) -> None:
    """Refuses a command that would open the screen where there is none, before anything else is looked at."""
    if context.obj["headless"] or all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        return
    command = context.info_name if context.parent else "COMMAND"
    raise click.UsageError(f"the dashboard needs a terminal; without one: kdconsole --headless {command} …")


def _narrator(quiet: bool) -> Any:
    from rich.console import Console

    from console.narration import Narrator

    return Narrator(Console(stderr=True, highlight=False), quiet)


def _finish(result: Result | None, as_json: bool) -> None:
    """Prints the report and leaves with the run's exit code; 0 when the operator let go of a run that goes on."""
    from rich.console import Console

    from console import report

    if result is None:
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    with console.capture() as capture:
        if as_json:
            console.out(json.dumps(report.document(result), indent=2, allow_nan=False))
        else:
            report.show(result, console)
    try:
        sys.stdout.write(capture.get())
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (`| head`); the run's exit code still stands.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(result.exit_code)


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
