"""The command `kdconsole convert`: the predecessor's APR file made a Hugging Face directory, and back."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from console.command import EXIT_CODES
from console.import_command import Progress
from console.json_errors import errors_told
from engine.errors import ExitCode
from engine.sniff import say

if TYPE_CHECKING:
    from engine.convert import Converted


@click.command(epilog=EXIT_CODES, short_help="Make a model directory of an APR file, or an APR file of it.")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(("auto", "fp32", "bf16", "fp16")),
    default="auto",
    show_default=True,
    help="Of the weights on disk; auto: each tensor as it is stored, fp32 for quantised ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
def convert_command(source: str, target: Path, dtype: Any, as_json: bool, quiet: bool) -> None:
    """Make a Hugging Face directory of an APR file, or an APR file of such a directory, and read it back.

    SRC is an APR file, a directory with config.json and safetensors weights, or builtin:teacher. DST is the directory
    or the file to be made: nothing may stand there, and it is whole or not there. Tokenizer files and
    generation_config.json go with it; an APR file has them beside it. APR files of llama, qwen2 and qwen3 are known.

    \b
    Examples:
      kdconsole convert teacher.apr teachers/qwen-1.5b
      kdconsole convert evidence/RUN/model exported/student.apr --dtype fp16
      kdconsole convert builtin:teacher small/teacher.apr
    """
    from engine.convert import convert, source_of

    # Who is ended by its session or by `kill` clears up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with errors_told(as_json), Progress(quiet) as progress:
        made = convert(source_of(source), target, dtype, progress.tell)
    if as_json:
        click.echo(json.dumps({"schema": "kdconsole.convert/1", **asdict(made), "path": str(made.path)}, indent=2))
    else:
        for line in lines(made):
            click.echo(line)
    sys.exit(ExitCode.OK)


def lines(made: Converted) -> list[str]:
    """What a conversion made, for a person."""
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in made.dtypes.items())
    told = [
        f"{say(made.path)}: whole, and every tensor read back",
        f"  tensors     {made.tensors:,} ({kinds}), {made.parameters:,} parameters",
        f"  weights     {made.total_bytes:,} bytes, sha256 {made.sha256}",
        f"  files       {', '.join(made.files)}",
    ]
    if "tokenizer.json" not in made.files:
        told.append("  note: no tokenizer.json was beside the source; a run needs one beside its model")
    return [*told, f"next: a configuration with teacher: {{path: {say(made.path)}}}"]
