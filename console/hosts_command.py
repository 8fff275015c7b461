"""`kdconsole hosts`: which hosts there are, how each is reached, and whose key is trusted."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from console.bootstrap_command import bootstrap_command
from console.host_desk import document, key_document, offered_key, where
from engine.errors import ConfigError
from engine.text import clean

if TYPE_CHECKING:
    from dispatch.hosts import Host, Hosts
    from dispatch.ssh import SSHTransport

LIST_SCHEMA: Final = "kdconsole.hosts/1"
SHOW_SCHEMA: Final = "kdconsole.host/1"
CHECK_SCHEMA: Final = "kdconsole.host-check/1"
PYTHON: Final = (3, 11)
"""The oldest that runs the engine."""
ROUND_TRIPS: Final = 5
SECONDS: Final = 20.0
"""For each thing that a check asks of a host."""

# asyncssh takes a good part of a second to import: only what talks to hosts pays for it.


@click.group("hosts", short_help="Say which hosts there are, trust and check them.")
def hosts_group() -> None:
    """Hosts that runs are sent to: hosts.yaml over your own ssh_config.

    \b
    From nothing to a host that is ready:
      kdconsole hosts add gx10 --address 192.168.1.40 --user kd
      kdconsole hosts trust gx10
      kdconsole hosts check gx10
    """


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@hosts_group.command("list", short_help="List the hosts of hosts.yaml.")
@_json_option
def list_command(as_json: bool) -> None:
    """List the hosts of hosts.yaml and whether their keys are trusted. Nothing is sent to them.

    \b
    Examples:
      kdconsole hosts list
      kdconsole hosts list --json
    """
    hosts = _load()
    found = [document(host, hosts) for host in hosts.known.values()]
    if as_json:
        _print_json({"schema": LIST_SCHEMA, "file": str(hosts.path), "lanes": list(hosts.lanes), "hosts": found})
    elif not found:
        click.echo(f"no hosts in {clean(str(hosts.path), 300)}; `kdconsole hosts add` writes one")
    else:
        rows = [
            (
                str(each["lane"] or ""),
                each["name"],
                where(each),
                each["user"],
                each["python"],
                each["run_dir"],
                "trusted" if each["host_keys"] else "not trusted",
            )
            for each in found
        ]
        _print_table(("lane", "name", "address", "user", "python", "run dir", "host key"), rows)


@hosts_group.command("show", short_help="Show all that is known of a host.")
@click.argument("name")
@_json_option
def show_command(name: str, as_json: bool) -> None:
    """Show all that hosts.yaml, ssh_config and known_hosts say of a host. Nothing is sent to it.

    NAME stands in hosts.yaml, or is one that ssh_config knows.

    \b
    Examples:
      kdconsole hosts show gx10
      kdconsole hosts show gx10 --json
    """
    hosts = _load()
    host = hosts.named(name)
    found = document(host, hosts)
    if as_json:
        _print_json({"schema": SHOW_SCHEMA, **found})
        return
    keys = [f"{key['fingerprint']} ({key['kind']})" for key in found["host_keys"]]
    _print_pairs(
        ("name", name),
        ("file", found["file"] or "not in hosts.yaml: the defaults"),
        ("address", where(found)),
        ("over", found["over"]),
        ("user", found["user"]),
        ("identity", found["identity"] or "agent and ssh_config"),
        ("python", found["python"]),
        ("run dir", found["run_dir"]),
        ("variables", ", ".join(found["env"])),
        ("gpu", found["gpu"]),
        ("lane", found["lane"] and f"{found['lane']} of {len(hosts.lanes)}"),
        ("host key", "\n".join(keys) or f"not trusted; kdconsole hosts trust {name}"),
    )


@hosts_group.command("add", short_help="Write a host into hosts.yaml.")
@click.argument("name")
@click.option("--address", metavar="A", help="Name or IP address; without it ssh_config is asked for NAME.")
@click.option("--port", metavar="N", type=int, help="Port of its SSH server.")
@click.option("--user", metavar="U", help="Who to log in as.")
@click.option("--identity", metavar="KEY", help="Private key file on this machine.")
@click.option("--python", metavar="PY", help="Python there; else the one that bootstrap makes.")
@click.option("--run-dir", metavar="DIR", help="Where runs go there.  [default: ~/kdconsole]")
@click.option("--env", metavar="VARIABLE", multiple=True, help="A variable of this machine that runs there get.")
@click.option("--gpu", metavar="INDEX", type=int, help="The GPU to use there.")
def add_command(name: str, identity: str | None, env: tuple[str, ...], **given: Any) -> None:
    """Write a host into hosts.yaml. What stands there stays as it is.

    \b
    Examples:
      kdconsole hosts add gx10 --address 192.168.1.40 --user kd
      kdconsole hosts add gx10 --address 192.168.1.40 --port 2222 --user kd \\
          --identity ~/.ssh/gx10 --python /opt/py/bin/python --run-dir /data/kd
    """
    from dispatch.hosts import add_host

    hosts = add_host(name, {**given, "identity": _identity(identity), "env": list(env) or None})
    click.echo(f"{name} stands in {clean(str(hosts.path), 300)} now; next: kdconsole hosts trust {name}")


@hosts_group.command("trust", short_help="Trust a host's key.")
@click.argument("name")
@click.option("--fingerprint", metavar="SHA256:…", help="Trust the key if this is its fingerprint, and ask nothing.")
def trust_command(name: str, fingerprint: str | None) -> None:
    """Show the fingerprint of a host's key and trust it after a typed yes.

    A key that is trusted already is never replaced: a host that presents another one is refused.

    \b
    Examples:
      kdconsole hosts trust gx10
      kdconsole hosts trust gx10 --fingerprint SHA256:jZ0F…
    """
    host = _load().named(name)
    wanted = None if fingerprint is None else _fingerprint(fingerprint)
    if wanted is None and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            f"{name}: there is no terminal to ask for a yes", do="give the expected key as --fingerprint SHA256:…"
        )
    from dispatch.transport import HostRefusal

    offer = asyncio.run(offered_key(host))
    if wanted is not None and not hmac.compare_digest(wanted.encode(), offer.fingerprint.encode()):
        raise HostRefusal(
            f"{name}: presents {offer.shown}, not {wanted}", do="nothing was trusted; ask whoever runs the host"
        )
    if offer.new and wanted is None:
        click.echo(f"{name} at {offer.address} presents this host key:\n\n  {offer.shown}\n", err=True)
        click.echo("On the host itself `ssh-keygen -lf /etc/ssh/ssh_host_…_key.pub` shows what it should be.", err=True)
        if click.prompt("Trust it? Type yes", default="", show_default=False, err=True).strip() != "yes":
            raise HostRefusal(f"{name}: the host key was not trusted, nothing was written")
    path = offer.trust()
    if offer.new:
        click.echo(f"{name}: {offer.shown} is trusted now, by {clean(str(path), 300)}")
    else:
        click.echo(f"{name}: {offer.shown} was trusted already")


@hosts_group.command("check", short_help="Connect to a host and say whether it is ready.")
@click.argument("name")
@_json_option
def check_command(name: str, as_json: bool) -> None:
    """Connect to a host and say whether it can be used: key, Python and run directory. Nothing is written there.

    Exit code 3 where it cannot be reached or is not ready.

    \b
    Examples:
      kdconsole hosts check gx10
      kdconsole hosts check gx10 --json
    """
    from dispatch.transport import TransportError

    host = _load().named(name)
    found: dict[str, Any] = {"schema": CHECK_SCHEMA, "name": name}
    problem: str | None
    try:
        asyncio.run(_check(host, found))
        problems = [*filter(None, (found["python"]["problem"], found["run_dir"]["problem"]))]
        problem = f"{name}: {'; '.join(problems)}" if problems else None
    except TransportError as error:
        problem = str(error)
    found |= {"ok": problem is None, "problem": problem}
    if as_json:
        _print_json(found)
    elif "round_trip_ms" in found:
        python, run_dir = found["python"], found["run_dir"]
        _print_pairs(
            ("address", where(found)),
            ("over", found["over"]),
            ("user", found["user"]),
            ("host key", f"{found['host_key']['fingerprint']} ({found['host_key']['kind']})"),
            ("round trip", f"{found['round_trip_ms']:.1f} ms, connected in {found['connect_seconds']:.2f} s"),
            ("python", f"{python['path']}: {python['problem'] or python['version']}"),
            ("run dir", f"{run_dir['path']}: {run_dir['problem'] or run_dir['state']}"),
        )
    if problem is not None:
        raise TransportError(problem)


# What is known


def _load() -> Hosts:
    from dispatch.hosts import load_hosts

    return load_hosts()


def _identity(given: str | None) -> str | None:
    """A key file for hosts.yaml, where a relative path would start somewhere else than here."""
    if given is None or given.startswith("-"):
        return given  # refused by the schema
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if not path.is_file():
        raise ConfigError(f"--identity {clean(given, 300)}: no such file", expected="a private key on this machine")
    return given if given.startswith("~/") else str(path)


def _fingerprint(given: str) -> str:
    text = given.strip()
    text = text[7:] if text.upper().startswith("SHA256:") else text
    text = text.rstrip("=")
    if not re.fullmatch(r"[A-Za-z0-9+/]{43}", text):
        raise ConfigError(
            f"--fingerprint {clean(given, 100)}: no SHA-256 fingerprint",
            expected="SHA256: and 43 characters, as `ssh-keygen -lf` shows it",
        )
    return f"SHA256:{text}"


# Checking

_LOOK: Final = (
    'd=$1; while [ ! -e "$d" ] && [ ! -L "$d" ]; do d=$(dirname "$d"); done; '
    'if [ ! -d "$d" ]; then echo "file $d"; elif [ ! -w "$d" ] || [ ! -x "$d" ]; then echo "denied $d"; '
    'elif [ "$d" = "$1" ]; then echo "there $d"; else echo "absent $d"; fi'
)
"""Whether a directory is there and can be written to, or can be made: what of its path exists decides."""
_VERSION: Final = "import platform; print(platform.python_version())"


hosts_group.add_command(bootstrap_command)


async def _check(host: Host, found: dict[str, Any]) -> None:
    from dispatch.ssh import SSHTransport
    from dispatch.ssh_route import place_of
    from dispatch.transport import TransportError, TransportTimeout

    place = await asyncio.to_thread(place_of, host)
    found |= {"address": clean(place.address.host, 300), "port": place.address.port}
    found |= {"over": clean(place.over, 300) or None, "user": clean(place.user, 300)}
    transport = SSHTransport(host)
    try:
        began = time.monotonic()
        connection = await transport.connection()
        found["connect_seconds"] = round(time.monotonic() - began, 3)
        key = connection.get_server_host_key()
        if key is None:
            raise TransportError(f"{host.name}: the host proved itself without a key", do="use a host key")
        found["host_key"] = key_document(key)
        await transport.stat("/", timeout=SECONDS)
        trips = []
        for _ in range(ROUND_TRIPS):
            began = time.monotonic()
            await transport.stat("/", timeout=SECONDS)
            trips.append(time.monotonic() - began)
        milliseconds = round(statistics.median(trips) * 1000, 2)
        found["python"] = await _python(transport, host)
        found["run_dir"] = await _run_dir(transport, host)
        found["round_trip_ms"] = milliseconds
    except TransportTimeout as error:
        raise TransportError(str(error)) from None  # a host that does not answer is one that is not reached
    finally:
        await transport.close()


async def _python(transport: SSHTransport, host: Host) -> dict[str, Any]:
    path = await transport.resolve(host.python, timeout=SECONDS)
    done = await transport.run([path, "-I", "-c", _VERSION], timeout=SECONDS)
    version, problem = clean(done.stdout.decode(errors="replace").strip(), 40), None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if done.rc == 127 or b"not found" in done.stderr.lower():
        problem = f"no Python {path}; kdconsole hosts bootstrap {host.name} makes one"
    elif done.rc != 0 or numbers is None:
        problem = f"Python {path} does not work: {clean(done.stderr.decode(errors='replace').strip(), 200)}"
    elif (int(numbers[1]), int(numbers[2])) < PYTHON:
        problem = f"Python {path} is {version}; expected {PYTHON[0]}.{PYTHON[1]} or later"
    return {"path": path, "version": None if problem and not numbers else version, "problem": problem}


async def _run_dir(transport: SSHTransport, host: Host) -> dict[str, Any]:
    path = await transport.resolve(host.run_dir, timeout=SECONDS)
    done = await transport.run(["sh", "-c", _LOOK, "kd", path], timeout=SECONDS)
    state, _, where = clean(done.stdout.decode(errors="replace").strip(), 4200).partition(" ")
    states = {"there": "writable", "absent": "not there yet, can be made"}
    problems = {
        "file": f"run directory {path}: {where} is no directory",
        "denied": f"run directory: no write access to {where}",
    }
    problem = None if state in states else problems.get(state, f"run directory {path}: cannot be looked at")
    return {"path": path, "state": states.get(state), "problem": problem}


# Printing


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _print_pairs(*pairs: tuple[str, Any]) -> None:
    for name, value in pairs:
        for index, line in enumerate(str(value).split("\n") if value not in (None, "") else ()):
            click.echo(f"{'' if index else name:<12}{line}")


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
