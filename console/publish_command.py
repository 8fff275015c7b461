"""`kdconsole publish`: a trained model sent to a hub or put into a directory, loaded back, and compared."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from console.command import evidence_option
from console.json_errors import errors_told
from engine.errors import ConfigError, ExitCode
from engine.text import clean

if TYPE_CHECKING:
    from console.publish_plan import Asked, Plan
    from console.publish_run import Published

SCHEMA = "kdconsole.publish/1"
_BASE_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_EXIT_CODES = """\b
Exit codes:
  0    published, and what came back is what was sent
  1    what came back differs, a verdict is FAIL, or evidence does not hold
  2    wrong usage, a licence that is unknown, or the hub refuses
  3    the hub could not be reached
  5    the run was not completed, or a gating verdict is missing
  130  interrupted
"""


@click.command(epilog=_EXIT_CODES)
@click.argument("run")
@click.option("--repo", metavar="ORG/NAME", help="The repository on the hub; it is made if it is missing.")
@click.option("--to", "directory", metavar="DIR", type=click.Path(path_type=Path), help="A directory in its place.")
@click.option("--dry-run", is_flag=True, help="Check everything, show files and card, and send and write nothing.")
@click.option("--evaluation", "evaluations", metavar="RUN", multiple=True, help="An evaluation of it; may be repeated.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", default="main", show_default=True, help="The branch to commit to.")
@click.option("--license", "licence", metavar="ID", help="The licence of the model, such as apache-2.0.")
@click.option("--license-of", "stated", metavar="PART=ID", multiple=True, help="Of teacher, student or data.")
@click.option("--license-file", metavar="FILE", type=click.Path(path_type=Path), help="The text of that licence.")
@click.option("--base-model", metavar="ORG/NAME", help="The hub's name of what the student started from.")
@click.option("--name", metavar="TEXT", help="What to call the publication.")
@click.option("--force", is_flag=True, help="Replace a publication in DIR; remove other files of the repository.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
@evidence_option
def publish_command(
    run: str,
    repo: str | None,
    directory: Path | None,
    dry_run: bool,
    evaluations: Sequence[str],
    private: bool,
    revision: str,
    licence: str | None,
    stated: Sequence[str],
    license_file: Path | None,
    base_model: str | None,
    name: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    evidence: Path,
) -> None:
    """Publish the exported model of a run, load it back, and prove that it is the same.

    RUN is a training by its id, its beginning, or a directory. Published are weights, configuration, tokenizer, a card
    made from the evidence, and the licence. Refused is a run whose gating verdicts are not all PASS, whose evidence
    does not hold, or whose licences are not known. The token is that of `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      kdconsole publish 20260102-030405 --to release --dry-run
      kdconsole publish 20260102 --to release --license-of data=cc0-1.0
      kdconsole publish 20260102 --repo my-org/my-model --evaluation 20260103
    """
    from console.import_command import Progress
    from console.publish_gate import require_outside_runs
    from console.publish_plan import make_plan
    from console.publish_run import publish
    from dispatch.runs import resolve_run
    from engine.publish_files import require_ours
    from engine.publish_hub import Hub

    # Who is ended by `kdconsole stop` or by its session clears up as after Ctrl-C; `nohup` stays what it is.
    for ends in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ends) != signal.SIG_IGN:
            signal.signal(ends, signal.default_int_handler)
    with errors_told(as_json):
        asked = _asked(repo, directory, revision, private, force, licence, stated, license_file, base_model)
        token, where = _token(asked)
        hub = None if dry_run or asked.repo is None else Hub(token, asked.repo)
        with Progress(quiet) as progress:
            progress.tell("verifying the evidence")
            others = {
                os.path.realpath(each.path): each for each in (resolve_run(evidence, other) for other in evaluations)
            }
            plan = make_plan(resolve_run(evidence, run), list(others.values()), asked, progress.tell)
            if asked.directory is not None:
                require_outside_runs(asked.directory)
                require_ours(asked.directory, force)
            done = None if dry_run else publish(plan, hub, token, evidence, name, progress.tell)
    if done is None:
        _show_plan(plan, where, as_json)
        sys.exit(ExitCode.OK)
    _show(done, as_json)
    sys.exit(done.end.exit_code if done.end and done.end.exit_code is not None else ExitCode.UNDECIDED)


def _asked(
    repo: str | None,
    directory: Path | None,
    revision: str,
    private: bool,
    force: bool,
    licence: str | None,
    stated: Sequence[str],
    license_file: Path | None,
    base_model: str | None,
) -> Asked:
    from console.publish_plan import Asked
    from engine.publish_hub import MAIN, checked_repo, checked_revision
    from engine.publish_licence import checked_id, parse_stated

    if (repo is None) == (directory is None):
        raise click.UsageError("give either --repo ORG/NAME or --to DIR")
    if directory is not None and (private or revision != MAIN):
        raise click.UsageError("--private and --revision go with --repo")
    if base_model is not None and not _BASE_MODEL.fullmatch(base_model):
        raise ConfigError(f"--base-model {clean(repr(base_model), 200)}: no name of the hub", expected="ORG/NAME")
    return Asked(
        repo=None if repo is None else checked_repo(repo),
        directory=None if directory is None else _absolute(directory),
        revision=checked_revision(revision),
        private=private,
        force=force,
        licence=None if licence is None else checked_id(licence, "--license"),
        stated=parse_stated(stated),
        licence_file=license_file,
        base_model=base_model,
    )


def _absolute(directory: Path) -> Path:
    home = os.path.expanduser(directory)
    if home.startswith("~"):
        shown = clean(str(directory), 300)
        raise ConfigError(f"--to {shown}: no such user's home directory", expected="a directory")
    return Path(os.path.abspath(home))


def _token(asked: Asked) -> tuple[str | None, str]:
    """The hub's token where it is needed, and where it was found; it is in no variable after this."""
    from engine.publish_hub import forget_token, take_token

    if asked.repo is not None:
        return take_token()
    forget_token()
    return None, ""


def _show_plan(plan: Plan, token_from: str, as_json: bool) -> None:
    asked = plan.asked
    checks = list(plan.checks)
    if asked.repo is not None:
        checks.append(
            f"token: found in {token_from}" if token_from else "token: none yet; `hf auth login`, or HF_TOKEN"
        )
    to = f"hub repository {asked.repo}, {asked.revision}" if asked.repo else str(asked.directory)
    if as_json:
        told = {"schema": SCHEMA, "dry_run": True, "exit_code": 0, "to": to, **plan.document(), "checks": checks}
        click.echo(json.dumps(told | {"card": plan.texts["README.md"]}, indent=2))
        return
    click.echo(f"{plan.run.run.id} to {clean(to, 500)}: {len(plan.files)} files, {plan.bytes:,} bytes")
    for line in _file_lines(plan):
        click.echo(line)
    click.echo("checked:")
    for check in checks:
        click.echo(f"  ✓ {check}")
    click.echo("card:")
    for line in plan.texts["README.md"].splitlines():
        click.echo(f"  {clean(line, 2000)}".rstrip())
    click.echo("nothing was sent and nothing was written; leave out --dry-run to publish")


def _file_lines(plan: Plan) -> list[str]:
    width = max(len(file.name) for file in plan.files)
    told = [f"  {file.name:<{width}}  {file.bytes:>15,}  {file.sha256}" for file in plan.files]
    return [*told, *(f"  left out: {name}" for name in plan.left_out)]


def _show(done: Published, as_json: bool) -> None:
    end, verdicts = done.end, done.verdicts
    if as_json:
        told = {
            **done.document(),
            "schema": SCHEMA,
            "dry_run": False,
            "exit_code": None if end is None else end.exit_code,
            "status": None if end is None else end.status,
            "reason": None if end is None else clean(end.reason, 1000),
            "publication": str(done.run_dir.path),
            "publication_evidence_id": done.evidence_id,
            "verdicts": {each.id: each.verdict for each in verdicts},
        }
        click.echo(json.dumps(told, indent=2))
        return
    good = end is not None and end.exit_code == ExitCode.OK
    click.echo(f"{'published' if good else 'NOT what was sent'}: {clean(done.place, 500)}")
    if done.commit is not None:
        click.echo(f"  commit       {done.commit.id}")
    for each in verdicts:
        click.echo(f"  {each.verdict:<12} {each.id}: {clean(each.claim, 300)}; observed {clean(each.observed, 300)}")
    click.echo(f"  evidence     {clean(str(done.run_dir.path), 500)}")
    click.echo(f"  evidence id  {done.evidence_id}")
    if not good and end is not None:
        left = " nothing was put there" if done.commit is None else " do not use this commit"
        click.echo(f"  {clean(end.reason, 1000)};{left}")
