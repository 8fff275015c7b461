"""Commands that start runs: `kdconsole smoke`, `kdconsole prepare` and `kdconsole train`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from console.command import EXIT_CODES, evidence_option, finish, narrator, need_terminal, open_screen, require_room
from engine.errors import KdError, RunError

if TYPE_CHECKING:
    from console.legacy_env import Legacy
    from engine.config import RunConfig
    from engine.schema import Problem

Mode = Literal["smoke", "train", "prepare"]

SOURCE_KEY = "teacher.source"
MASS_OVERRIDE = "min-mass"
"""How the manifest's `overrides` names a stored teacher that may hold any share of the probability."""
_OPTIONS = {
    "teacher.path": "--teacher",
    "student": "--student",
    "data.path": "--data",
    "contract": "--contract",
    "smoke.budget_seconds": "--budget",
    "smoke.max_steps": "--max-steps",
    "smoke.project_to": "--project-to",
    "train.max_steps": "--max-steps",
    "train.devices": "--devices",
}
"""The option that sets a key, as messages name it."""


_legacy_option = click.option("--legacy-env", is_flag=True, help="Take the old launch scripts' variables, each told.")


def _run_options(command: Any) -> Any:
    """What all of them share."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output."),
        click.option("--quiet", "-q", is_flag=True, help="No narration on standard error."),
        click.option("--force", is_flag=True, help="Start although there is too little memory or disk; recorded."),
        click.option("--dry-run", is_flag=True, help="Print every step of the start and change nothing."),
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
@click.option(
    "--devices", metavar="N", type=click.IntRange(min=1), help="Train on N devices; short for --set train.devices=N."
)
@_run_options
@_legacy_option
@click.pass_context
def smoke_command(
    context: click.Context,
    /,
    config: Path | None,
    budget: str | None,
    max_steps: str | None,
    project_to: str | None,
    devices: int | None,
    **options: Any,
) -> None:
    """Distil for a minute, judge every falsifier, project the real run, and say GO or NO-GO.

    CONFIG is a YAML file; without it the built-in models are taken and nothing is needed.

    \b
    Examples:
      kdconsole --headless smoke
      kdconsole --headless smoke config.yaml --budget 120 --project-to 20000
      kdconsole --headless smoke --teacher big/ --student small/ --data text/
      kdconsole --headless smoke config.yaml --host gx10 --dry-run
    """
    flags = {"smoke.budget_seconds": budget, "smoke.max_steps": max_steps, "smoke.project_to": project_to}
    _start(context, config, "smoke", flags, devices=devices, **options)


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
@click.option(
    "--accept-loss", is_flag=True, help="With --resume: go on where a reboot of the host lost the stream's end."
)
@click.option("--max-steps", metavar="N", help="End after N steps, complete; the schedule stays train.steps'.")
@click.option("--no-gate", metavar="REASON", help="Start 5,000 steps or more without a passed smoke; recorded.")
@click.option(
    "--devices",
    metavar="N",
    type=click.IntRange(min=1),
    help="Train on N devices; short for --set train.devices=N. With --resume: for this attempt alone.",
)
@_run_options
@_legacy_option
@click.pass_context
def train_command(
    context: click.Context,
    /,
    config: Path | None,
    resume: str | None,
    allow_changed: tuple[str, ...],
    accept_loss: bool,
    max_steps: str | None,
    no_gate: str | None,
    devices: int | None,
    **options: Any,
) -> None:
    """Train to the last step, saving checkpoints, and write the verified model.

    Ctrl-C leaves the run going and says how to stop it. A run that was stopped, or crashed, goes on with --resume from
    its newest whole checkpoint. One of 5,000 steps or more wants a smoke of the same configuration that passed on the
    same host within the last 7 days.

    With --resume, --devices N goes on with N devices, whatever their number was; config.yaml stays as it is. A later
    --resume without it takes the configuration's number again.

    \b
    Examples:
      kdconsole --headless train config.yaml
      kdconsole --headless train config.yaml --max-steps 200
      kdconsole --headless train config.yaml --host gx10 --dry-run
      kdconsole --headless train --resume 20260102-030405
      kdconsole --headless train --resume 20260102-030405 --devices 4
    """
    nothing = config is None and resume is None and not options["legacy_env"]
    if nothing or (config is not None and resume is not None):
        raise click.UsageError("give either CONFIG or --resume RUN")
    if accept_loss and (resume is None or not context.obj["headless"]):
        raise click.UsageError("--accept-loss goes with --headless and --resume")
    if devices is not None and resume is not None and not context.obj["headless"]:
        raise click.UsageError("--devices with --resume goes with --headless")
    if resume is None:
        _start(context, config, "train", {"train.max_steps": max_steps}, devices=devices, no_gate=no_gate, **options)
        return
    need_terminal(context)
    from console import headless
    from dispatch.runs import resolve_run

    given = {"max-steps": max_steps is not None, "no-gate": no_gate is not None, "set": options["sets"]}
    given |= {name: options[name] for name in ("teacher", "student", "data", "contract", "host", "name", "force")}
    given |= {name: options[name.replace("-", "_")] for name in ("dry-run", "legacy-env")}
    ignored = [name for name, value in given.items() if value]
    if ignored:
        raise click.UsageError(f"--resume takes the run's own configuration; leave out --{ignored[0]}")
    run_dir = resolve_run(options["evidence"], resume)
    if run_dir.manifest.mode == "evaluate":
        from console.launch import goes_on_with

        raise RunError(f"run {run_dir.id}: an evaluation", expected="a training run", do=goes_on_with(run_dir))
    if not context.obj["headless"]:
        open_screen(context, options["evidence"], run=run_dir.path, resume=allow_changed)
        return
    again = headless.resume(run_dir, allow_changed, narrator(options["quiet"]), accept_loss, devices)
    finish(again, options["as_json"])


@click.command(epilog=EXIT_CODES)
@click.argument("config", type=click.Path(path_type=Path))
@_run_options
@click.pass_context
def prepare_command(context: click.Context, /, config: Path, **options: Any) -> None:
    """Store what the teacher says of the corpus, once, for every later smoke and train of CONFIG.

    CONFIG says what is stored, teacher.source: hidden (its last hidden states, from which its distribution is exact at
    any temperature) or topk (teacher.top_k logits a token). It is stored under teacher.cache of the machine that runs
    this, and held against the teacher. Before it starts, what it will take is held against the disk.

    It needs no smoke. Ctrl-C leaves it going and says how to stop it. Called again after a stop or a crash it goes on
    from what is whole; there is no --resume. What is all there already is checked and not made again. With topk it
    refuses where the stored logits hold less of the probability than prepare.min_mass; --force takes them, recorded.

    \b
    Examples:
      kdconsole --headless prepare config.yaml --set teacher.source=hidden
      kdconsole prepare config.yaml --set teacher.source=topk --force
      kdconsole --headless prepare config.yaml --host gx10 --dry-run
    """
    _start(context, config, "prepare", {}, legacy_env=False, **options)


def _start(
    context: click.Context,
    file: Path | None,
    mode: Mode,
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
    dry_run: bool,
    legacy_env: bool,
    devices: int | None = None,
    no_gate: str | None = None,
) -> None:
    """Reads the configuration, makes the run, reports; with `dry_run` only tells what it would do."""
    if not (dry_run or legacy_env):  # which may say DRY_RUN
        need_terminal(context)
    from console import headless
    from console.launch import Job
    from console.stored import missing_store
    from engine.cautions import cautions

    if devices is not None:
        flags = {**flags, "train.devices": str(devices)}
    try:
        texts = {"teacher.path": teacher, "student": student, "data.path": data, "contract": contract}
        legacy = None
        if legacy_env:
            given = {key: _OPTIONS[key] for key, value in {**texts, **flags}.items() if value is not None}
            given |= {key: f"--set {key}" for key in (each.partition("=")[0].strip() for each in sets)}
            given |= {"--evidence": "--evidence"} if _typed(context, "evidence") else {}
            legacy = _read_legacy(mode, given | ({"--dry-run": "--dry-run"} if dry_run else {}), host)
            dry_run = dry_run or legacy.dry_run
            evidence = legacy.evidence or evidence
            host = host or legacy.host
            if not dry_run:
                need_terminal(context)
        config = _configuration(file, mode, {**texts, **_numbers(flags)}, sets, legacy)
        missing = missing_store(config) if host is None else ""
        for caution in [*cautions(config), *([missing] if missing else [])]:
            click.echo(f"warning: {caution}", err=True)
        words = [] if file is None else [str(file)]
        words += [word for key, text in texts.items() if text is not None for word in (_OPTIONS[key], text)]
        words += [word for each in sets for word in ("--set", each)] + (["--legacy-env"] if legacy_env else [])
        words += [] if devices is None else ["--devices", str(devices)]  # the gate wants a smoke of the same
        config, overrides = _take_any_mass(config) if force and mode == "prepare" else (config, [])
        if host is None and not dry_run:
            overrides += require_room(config, evidence, force, quiet)
        job = Job(
            config,
            evidence,
            name,
            host=host,
            overrides=tuple(overrides),
            force=force,
            no_gate=no_gate,
            smoke=_smoke_command(context, words, host, evidence),
        )
        if dry_run:
            from console.dry_run import finish as finish_dry

            finish_dry(job, narrator(quiet).say, as_json)
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


def _numbers(flags: Mapping[str, str | None]) -> dict[str, object]:
    """The flags' texts as YAML reads them, so that `--budget ten` is told apart from a number like anywhere else.

    Nothing and null are no numbers either: an empty shell variable must not become the default.
    """
    from engine.yaml_io import parse_value

    return {
        key: text if text is None or (value := parse_value(text, _OPTIONS[key])) is None else value
        for key, text in flags.items()
    }


def _configuration(
    file: Path | None, mode: Mode, given: Mapping[str, object], sets: Sequence[str], legacy: Legacy | None
) -> RunConfig:
    """The configuration of a run; with the old scripts' variables a file is not needed, and no template is taken."""
    from console.launch import mode_overrides
    from engine.config import ConfigProblems, load_config

    try:
        return load_config(
            file,
            sets=sets,
            environ=os.environ if legacy is None else {**legacy.variables, **os.environ},
            template=None if file or legacy else "builtin",
            overrides={**mode_overrides(mode, sets), **{key: each for key, each in given.items() if each is not None}},
            options=_OPTIONS,
        )
    except ConfigProblems as error:
        if mode == "prepare":
            raise ConfigProblems([_say_what_to_set(each) for each in error.problems]) from None
        raise error if legacy is None else legacy.renamed(error) from None


def _say_what_to_set(problem: Problem) -> Problem:
    """Of a configuration that was made for an online teacher, what makes it one to prepare."""
    if not problem.where.endswith(SOURCE_KEY) or "prepared" not in problem.text:
        return problem
    return replace(problem, text=f"{problem.text}; --set {SOURCE_KEY}=hidden stores its last hidden states")


def _take_any_mass(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration without a least share of the probability, and what the manifest is to say of that."""
    from msgspec.structs import replace as changed

    if config.teacher is None or config.teacher.source != "topk" or not config.prepare.min_mass:
        return config, []
    return changed(config, prepare=changed(config.prepare, min_mass=0.0)), [MASS_OVERRIDE]


def _read_legacy(mode: Mode, given: Mapping[str, str], host: str | None) -> Legacy:
    """What the old scripts' variables say, told on standard error."""
    from console.legacy_env import read_legacy
    from dispatch.hosts import load_hosts

    assert mode != "prepare"  # which those scripts did not know
    legacy = read_legacy(os.environ, mode, given, host, load_hosts())
    for line in legacy.told:
        click.echo(line, err=True)
    return legacy


def _smoke_command(context: click.Context, words: Sequence[str], host: str | None, evidence: Path) -> str:
    """The command that makes the smoke that this run may want."""
    from console.gate import smoke_command

    kept = evidence if _typed(context, "evidence") else None
    return smoke_command(words, host=host, evidence=kept, headless=context.obj["headless"])


def _typed(context: click.Context, parameter: str) -> bool:
    """Whether an option stands on the command line."""
    return context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE
