"""Commands that start runs: `kdconsole smoke` and `kdconsole train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from console.command import EXIT_CODES, evidence_option, finish, narrator, need_terminal, open_screen
from engine.errors import KdError

if TYPE_CHECKING:
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


def _run_options(command: Any) -> Any:
    """What smoke and train share."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output."),
        click.option("--quiet", "-q", is_flag=True, help="No narration on standard error."),
        click.option("--force", is_flag=True, help="Start although there is too little memory or disk; recorded."),
        click.option("--host", metavar="NAME", help="Run it on this host; see kdconsole hosts."),
        click.option("--name", metavar="TEXT", help="What you call this run; kept in its manifest."),
        evidence_option,
        click.option("--contract", metavar="FILE", help="YAML file of falsifiers instead of the built-in ones."),
        click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set any key, such as train.steps=500."),
        click.option("--data", metavar="PATH", help="Text file, directory, token shards, or builtin:stdlib."),
        click.option("--student", metavar="DIR", help="Student's model directory, or builtin:student."),
        click.option("--teacher", metavar="DIR", help="Teacher's model directory, or builtin:teacher."),
    ):
        command = decorate(command)
    return command


@click.command(epilog=EXIT_CODES)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--budget", metavar="SECONDS", help="Seconds from the engine's start to its end.  [default: 60]")
@click.option("--max-steps", metavar="N", help="Make exactly N steps, unless the budget ends first.")
@click.option("--project-to", metavar="N", help="Steps of the run to project the wall time of.  [default: 50000]")
@_run_options
@click.pass_context
def smoke_command(
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


@click.command(epilog=EXIT_CODES)
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
def train_command(
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
    need_terminal(context)
    if resume is None:
        _start(context, config, "train", {"train.max_steps": max_steps}, **options)
        return
    from console import headless
    from dispatch.runs import resolve_run

    given = {"max-steps": max_steps is not None, "set": options["sets"]}
    given |= {name: options[name] for name in ("teacher", "student", "data", "contract", "host", "name", "force")}
    ignored = [name for name, value in given.items() if value]
    if ignored:
        raise click.UsageError(f"--resume takes the run's own configuration; leave out --{ignored[0]}")
    run_dir = resolve_run(options["evidence"], resume)
    if not context.obj["headless"]:
        open_screen(context, options["evidence"], run=run_dir.path, resume=allow_changed)
        return
    finish(headless.resume(run_dir, allow_changed, narrator(options["quiet"])), options["as_json"])


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
    host: str | None,
    name: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Reads the configuration, makes the run, reports."""
    need_terminal(context)
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
        overrides = _require_room(config, evidence, force, quiet) if host is None else []
        job = Job(config, evidence, name, host=host, overrides=tuple(overrides))
        if not context.obj["headless"]:
            open_screen(context, evidence, job=job)
            return
        result = headless.run(job, narrator(quiet))
    except KdError as error:
        if as_json:
            failed = {"schema": "kdconsole.error/1", "error": str(error), "exit_code": int(error.exit_code)}
            click.echo(json.dumps(failed, indent=2))
        raise
    finish(result, as_json)


def _require_room(config: RunConfig, evidence: Path, force: bool, quiet: bool) -> list[str]:
    from rich.console import Console

    from console.room import require_room

    console = Console(stderr=True, highlight=False)
    return require_room(config, evidence, force=force, show=lambda table: None if quiet else console.print(table))
