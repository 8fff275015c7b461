"""`kdconsole evaluate`: what a trained student has learned, on held-out text or on problems that code solves."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import click

from console.command import EXIT_CODES, evidence_option, finish, narrator, need_terminal, open_screen, require_room
from console.json_errors import errors_told
from engine.errors import RunError

_NUMBERS = ("samples", "limit", "temperature", "top_p", "max_new_tokens", "batch", "seed")
_WITH_RESUME = ("run_generated_code", "evidence", "as_json", "quiet")


@click.command(epilog=EXIT_CODES)
@click.argument("model", required=False, metavar="RUN|DIR")
@click.option("--suite", metavar="NAME", help="heldout, humaneval, or a JSONL file of its form.  [default: heldout]")
@click.option(
    "--run-generated-code",
    is_flag=True,
    help="Run the programs that the model answers a suite of problems with, contained. Nothing else allows it.",
)
@click.option("--samples", metavar="N", help="Answers a problem; more than one needs a temperature.  [default: 1]")
@click.option("--limit", metavar="N", help="The first N problems alone; claims about the suite stay UNKNOWN.")
@click.option("--temperature", metavar="T", help="Of sampling; 0 takes the likeliest token.  [default: 0]")
@click.option("--top-p", metavar="P", help="Sample from the likeliest tokens of this share.  [default: 1]")
@click.option("--max-new-tokens", metavar="N", help="Longest answer.  [default: 512]")
@click.option("--batch", metavar="N", help="Answers that are generated together.  [default: 16]")
@click.option("--seed", metavar="N", help="Of sampling.  [default: 0]")
@click.option("--teacher", metavar="DIR", help="Hold it against this teacher; a RUN has its own.")
@click.option("--data", metavar="PATH", help="Text whose held-out part is taken; a RUN has its own.")
@click.option("--resume", metavar="RUN", help="Go on with this evaluation: an id, its beginning, or a directory.")
@click.option("--contract", metavar="FILE", help="YAML file of falsifiers instead of the built-in ones.")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set any key, such as evaluate.workers=4.")
@evidence_option
@click.option("--name", metavar="TEXT", help="What you call this evaluation; kept in its manifest.")
@click.option("--host", metavar="NAME", help="Evaluate on this host; see kdconsole hosts.")
@click.option("--dry-run", is_flag=True, help="Print every step of the start and change nothing.")
@click.option("--force", is_flag=True, help="Start although there is too little memory or disk; recorded.")
@click.option("--quiet", "-q", is_flag=True, help="No narration on standard error.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.pass_context
def evaluate_command(context: click.Context, /, model: str | None, resume: str | None, **options: Any) -> None:
    """Evaluate a model, and keep every answer as evidence.

    RUN is a training: its exported model is evaluated, with its teacher, data and tokenizer. DIR is a model by itself;
    HOST:/path with --host is one that is there already.

    Suite heldout measures loss and perplexity on held-out text, agreement with the teacher and KL to it. humaneval, and
    a file of its form, have the model write programs, which are run against tests after answers of known scores went
    the same way: empty, pass, a constant, the right ones. Where one of these is off the result is unknown.

    It needs no smoke. Ctrl-C stops it; what was generated and judged is kept, and --resume goes on from there.

    \b
    Examples:
      kdconsole --headless evaluate 20260102-030405
      kdconsole evaluate 20260102 --suite humaneval --run-generated-code
      kdconsole evaluate model/ --suite my.jsonl --run-generated-code
      kdconsole evaluate model/ --data text/ --teacher big/
      kdconsole evaluate gx10:/models/small --host gx10 --data text/
      kdconsole evaluate --resume 20260103 --run-generated-code
    """
    if (model is None) == (resume is None):
        raise click.UsageError("give either RUN|DIR or --resume RUN")
    with errors_told(options["as_json"]):
        if resume is not None:
            _resume(context, resume, options)
        elif model is not None:
            _start(context, model, options)


def _start(context: click.Context, named: str, options: dict[str, Any]) -> None:
    dry_run, host, evidence = options["dry_run"], options["host"], options["evidence"]
    if not dry_run:
        need_terminal(context)
    from console import headless
    from console.evaluation import configure, find_subject
    from console.evaluation_text import walls_text
    from console.launch import Job
    from engine.cautions import cautions

    subject = find_subject(named, evidence, host)
    given: dict[str, object] = {f"evaluate.{name}": _number(name, options[name]) for name in _NUMBERS}
    given |= {"evaluate.suite": options["suite"], "contract.path": options["contract"]}
    given |= {"teacher.path": options["teacher"], "data.path": options["data"]}
    config = configure(
        subject,
        host,
        given=given,
        sets=options["sets"],
        environ=os.environ,
        run_generated_code=options["run_generated_code"],
        walls=lambda: walls_text(host),
    )
    for caution in cautions(config):
        click.echo(f"warning: {caution}", err=True)
    here = host is None and not dry_run
    overrides = require_room(config, evidence, options["force"], options["quiet"]) if here else []
    job = Job(
        config,
        evidence,
        options["name"],
        host=host,
        overrides=tuple(overrides),
        force=options["force"],
        evaluated=subject.evaluated,
    )
    if dry_run:
        from console.dry_run import finish as finish_dry

        finish_dry(job, narrator(options["quiet"]).say, options["as_json"])
    if not context.obj["headless"]:
        open_screen(context, evidence, job=job)
        return
    finish(headless.run(job, narrator(options["quiet"])), options["as_json"])


def _number(name: str, text: str | None) -> object:
    """An option's text as YAML reads it; nothing and null are no numbers either, and are told as such."""
    from console.evaluation import OPTIONS
    from engine.yaml_io import parse_value

    if text is None:
        return None
    value = parse_value(text, OPTIONS[f"evaluate.{name}"])
    return text if value is None else value


def _resume(context: click.Context, named: str, options: dict[str, Any]) -> None:
    ignored = [name for name, value in options.items() if value and name not in _WITH_RESUME]
    if ignored:
        option = ignored[0].replace("_", "-").replace("sets", "set")
        raise click.UsageError(f"--resume takes the evaluation's own configuration; leave out --{option}")
    need_terminal(context)
    from dispatch.runs import resolve_run

    run_dir, allowed = resolve_run(options["evidence"], named), options["run_generated_code"]
    if run_dir.manifest.mode != "evaluate":
        from console.launch import goes_on_with

        again = goes_on_with(run_dir) if run_dir.manifest.mode == "train" else None
        raise RunError(f"run {run_dir.id}: a {run_dir.manifest.mode}", expected="an evaluation", do=again)
    from console import headless

    if context.obj["headless"]:
        again_run = headless.resume(run_dir, (), narrator(options["quiet"]), run_generated_code=allowed)
        finish(again_run, options["as_json"])
        return
    asyncio.run(_started_again(run_dir.path, allowed))
    open_screen(context, options["evidence"], run=run_dir.path)


async def _started_again(path: Path, run_generated_code: bool) -> None:
    """Starts another attempt, which the screen then follows."""
    from console.launch import start_again
    from dispatch.places import Reach
    from dispatch.runs import open_run

    run_dir = open_run(path)
    async with Reach() as reach:
        await start_again(run_dir, (), reach.place(run_dir), run_generated_code=run_generated_code)
