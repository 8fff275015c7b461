"""`kdconsole config`: check a configuration, show it resolved, or print one to start from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from console.command import mode_option
from engine.config import (
    TEMPLATES,
    ConfigProblems,
    RunConfig,
    fingerprint,
    gate_fingerprint,
    load_config,
    template,
    to_yaml,
)
from engine.errors import ConfigError
from engine.yaml_io import source_name

CHECK_SCHEMA = "kdconsole.config-check/1"
SHOW_SCHEMA = "kdconsole.config/1"
DEFAULT_TEMPLATE = "builtin"

Command = TypeVar("Command", bound=Callable[..., Any])


def _source_options(command: Command) -> Command:
    """FILE, --set, --mode and --json, which `check` and `show` share."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        mode_option,
        click.option(
            "--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set one key; wins over variables and the file."
        ),
        click.argument("file", required=False),
    ):
        command = decorate(command)
    return command


@click.group("config", short_help="Check, show or start a configuration.")
def config_group() -> None:
    """Check a configuration, show it resolved, or print one to start from.

    A value comes from --set, else from a variable such as KDCONSOLE_TRAIN__STEPS, else from FILE, else from the
    defaults. FILE may be - for standard input; without one the built-in smoke is taken.
    """


@config_group.command("check", short_help="Say what is wrong with a configuration, if anything.")
@_source_options
def check(file: str | None, sets: tuple[str, ...], mode: str | None, as_json: bool) -> None:
    """Say whether a configuration is right, or everything that is wrong with it (exit 2).

    \b
    Examples:
      kdconsole config check config.yaml
      kdconsole config check config.yaml --set train.steps=500 --mode smoke
    """
    name = _name(file)
    try:
        config = _load(file, sets, mode)
    except ConfigError as error:
        if as_json:
            _print_json({"schema": CHECK_SCHEMA, "source": name, "ok": False, "problems": _problems(error)})
        raise
    if as_json:
        _print_json({"schema": CHECK_SCHEMA, "source": name, "ok": True, "problems": [], **_fingerprints(config)})
        return
    click.echo(f"{name}: ok")
    for key, digest in _fingerprints(config).items():
        click.echo(f"{key}: {digest}")


@config_group.command("show", short_help="Print a configuration resolved, with fingerprints.")
@_source_options
def show(file: str | None, sets: tuple[str, ...], mode: str | None, as_json: bool) -> None:
    """Print a configuration with every key and absolute paths, and its fingerprints.

    The output is a configuration itself: the fingerprints stand in comments.

    \b
    Examples:
      kdconsole config show
      kdconsole config show config.yaml --set distill.alpha=0.5
      kdconsole config init | kdconsole config show -
    """
    config = _load(file, sets, mode)
    if as_json:
        document = {"schema": SHOW_SCHEMA, "source": _name(file), "config": msgspec.to_builtins(config)}
        _print_json({**document, **_fingerprints(config)})
        return
    click.echo(to_yaml(config), nl=False)
    for key, digest in _fingerprints(config).items():
        click.echo(f"# {key}: {digest}")


@config_group.command("init", short_help="Print a configuration to start from.")
@click.option(
    "--template",
    "name",
    type=click.Choice(TEMPLATES),
    default=DEFAULT_TEMPLATE,
    show_default=True,
    help="builtin: the smoke that needs no download; gx10: a production run.",
)
def init(name: str) -> None:
    """Print a commented configuration to start from.

    \b
    Examples:
      kdconsole config init > config.yaml
      kdconsole config init --template gx10 > production.yaml
    """
    click.echo(template(name), nl=False)


def _load(file: str | None, sets: tuple[str, ...], mode: str | None) -> RunConfig:
    return load_config(
        None if file is None else Path(file),
        sets=sets,
        environ=os.environ,
        template=DEFAULT_TEMPLATE,
        overrides={"mode": mode},
    )


def _name(file: str | None) -> str:
    return f"template {DEFAULT_TEMPLATE}" if file is None else source_name(Path(file))


def _fingerprints(config: RunConfig) -> dict[str, str]:
    return {
        "fingerprint": f"sha256:{fingerprint(config)}",
        "gate_fingerprint": f"sha256:{gate_fingerprint(config)}",
    }


def _problems(error: ConfigError) -> list[str]:
    return [str(problem) for problem in error.problems] if isinstance(error, ConfigProblems) else [str(error)]


def _print_json(document: dict[str, object]) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
