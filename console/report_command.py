"""The command `kdconsole report`: one run as one file to be attached to a pull request, or its numbers as CSV."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from console.command import evidence_option, write_out
from engine.errors import RunError
from engine.text import clean

SUFFIXES = {"html": ".html", "md": ".md", "svg": ".svg", "csv": ".csv"}
_SERIES = ("steps", "evals", "checkpoints", "verdicts", "answers")


@click.command("report", short_help="Write one run as an HTML, Markdown or SVG file, or as CSV.")
@click.argument("run", metavar="DIR")
@click.option("--format", "form", type=click.Choice(tuple(SUFFIXES)), help="What to write.  [default: html]")
@click.option("-o", "--output", metavar="FILE", help="Where to; - is standard output.  [default: RUN-report.html]")
@click.option("--series", type=click.Choice(_SERIES), help="With --format csv: what to write.  [default: steps]")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@evidence_option
def report_command(
    run: str, form: str | None, output: str | None, series: str | None, force: bool, evidence: Path
) -> None:
    """Write one self-contained file about a run: losses, checkpoints, verdicts, findings, and where it all comes from.

    DIR is a run directory, the predecessor's directory, a log, or a run's id. The file asks for nothing from anywhere,
    holds no script, and is the same whenever the same evidence is reported on. Exit code 0: written, whatever came of
    the run.

    \b
    Examples:
      kdconsole report 20260102-030405
      kdconsole report evidence/a --format md -o - | gh pr comment 7 --body-file -
      kdconsole report old/launch.log --format svg
      kdconsole report evidence/a --format csv --series evals -o evals.csv
    """
    form = form or _form_of(output)
    if series is not None and form != "csv":
        raise click.UsageError("--series goes with --format csv")
    from console.named_evidence import named_evidence
    from console.run_reader import load_run
    from console.run_report.series import csv_of

    loaded = load_run(named_evidence(evidence, run))
    if form == "csv" and series in (None, "steps") and loaded.state.steps.thinned > 1:
        kept = f"{len(loaded.state.steps):,} of {loaded.state.steps.column('step')[-1]:,.0f} steps"
        click.echo(
            f"note: {kept}: of older neighbours those with the lowest and highest loss; the stream has all", err=True
        )
    pieces = csv_of(loaded, series or "steps") if form == "csv" else iter([_document(loaded, form)])
    if output == "-":
        write_out(pieces)
        return
    stem = clean(loaded.path.stem if loaded.path.is_file() else loaded.path.name, 150).replace("/", "_")
    ending = f"-{series or 'steps'}.csv" if form == "csv" else f"-report{SUFFIXES[form]}"
    path = Path(f"{stem}{ending}" if output is None else output)
    write_file(path, (piece.encode() for piece in pieces), replace=force)
    click.echo(clean(str(path)))


def _form_of(output: str | None) -> str:
    """The format that a file's name asks for."""
    suffix = Path(output or "").suffix.lower()
    return next((form for form, own in SUFFIXES.items() if suffix == own), "html")


def _document(loaded: object, form: str) -> str:
    from console.run_reader import LoadedRun
    from console.run_report import as_html, as_markdown, as_svg
    from console.run_report.gather import report_of

    assert isinstance(loaded, LoadedRun)
    written = {"html": as_html.document, "md": as_markdown.document, "svg": as_svg.document}
    return written[form](report_of(loaded))


def write_file(path: Path, pieces: Iterable[bytes], *, replace: bool) -> None:
    """Writes a file that others may read (mode 0644), whole or not at all.

    Args:
        path: where to.
        pieces: what to write.
        replace: a file that is there; else it is left as it is.

    Raises:
        RunError: it is there, or it cannot be written.
    """
    shown = clean(str(path), 300)
    taken = RunError(f"{shown}: is there already", do="choose another name with -o, or replace it with --force")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.is_dir():
            raise RunError(f"{shown}: is a directory", expected="the name of a file", do="choose one with -o")
        if not replace and os.path.lexists(path):
            raise taken
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            if replace:
                os.replace(partial, path)
            else:
                os.link(partial, path)  # unlike a rename it fails where somebody else was faster
        finally:
            partial.unlink(missing_ok=True)
    except FileExistsError:
        raise taken from None
    except OSError as error:
        raise RunError(f"{shown}: cannot be written: {error.strerror}", do="choose another file with -o") from None
