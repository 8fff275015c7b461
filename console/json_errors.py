"""Errors of a command that prints JSON: one document too, before the message on standard error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import click

from engine.errors import KdError


@contextlib.contextmanager
def errors_told(as_json: bool) -> Iterator[None]:
    """Prints an error that leaves it as a JSON document, if that is what is wanted, and lets it go on."""
    try:
        yield
    except KdError as error:
        if as_json:
            failed = {"schema": "kdconsole.error/1", "error": str(error), "exit_code": int(error.exit_code)}
            click.echo(json.dumps(failed, indent=2))
        raise
