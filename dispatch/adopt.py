"""Runs of a host that this console never saw, made from another machine: they become runs of this one too."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from dispatch.getting import get_tree
from dispatch.host_runs import RUN_NAME
from dispatch.hosts import NAME
from dispatch.manifest import CONTRACT, FIRST_FILES, MANIFEST, read_manifest, write_manifest
from dispatch.places import Reach
from dispatch.runs import RunDir, open_run
from dispatch.survey import base_of, look
from dispatch.tool_client import python_of
from dispatch.transport import MissingFile
from engine.durable import discard, partial_of, sync_directory
from engine.errors import RunError
from engine.text import clean

_NAMED: Final = re.compile(rf"({NAME}):({RUN_NAME.pattern})")


def on_host(text: str) -> tuple[str, str] | None:
    """Host and run of `HOST:RUN`, None for any other text."""
    named = _NAMED.fullmatch(text)
    return (named[1], named[2]) if named else None


async def adopt(reach: Reach, host: str, run: str, evidence: Path) -> RunDir:
    """Brings configuration, contract and manifest of a run that stands on a host; what else it has, `fetch` brings.

    A run that is here already is taken as it is.

    Args:
        reach: the ways to the hosts.
        host: its name here; whoever made the run may know it by another one.
        run: the run's id, or the beginning of one.
        evidence: where run directories live here.

    Raises:
        TransportError: the host cannot be reached.
        RunError: there is no such run, or several; or one of the same name is here.
    """
    transport = reach.transport(host)
    base, python = await base_of(reach, host), await python_of(transport)
    try:
        names = [name for name in await transport.list(f"{base}/runs") if RUN_NAME.fullmatch(name)]
    except MissingFile:
        names = []
    found = [name for name in names if name == run] or [name for name in names if name.startswith(run)]
    if len(found) != 1:
        many = f"{len(found)} runs begin so: {', '.join(found[:5])}" if found else "no such run there"
        raise RunError(f"{host}: run {run}: {many}", do=f"see kdconsole runs --host {host}")
    [name] = found
    there = await look(transport, f"{base}/runs/{name}", python)
    local = Path(os.path.abspath(evidence)) / name
    if (local / MANIFEST).is_file():
        here = open_run(local)
        if here.run == there.run:
            return here
        raise RunError(f"{clean(str(local), 300)}: another run of this name is here", do="give another --evidence DIR")
    staging = partial_of(local)
    try:
        staging.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        await get_tree(transport, f"{base}/runs/{name}", staging, want=FIRST_FILES.__contains__, python=python)
        await asyncio.to_thread(_make_ours, staging, host, f"{base}/runs/{name}", name)
        await asyncio.to_thread(_place, staging, local)
    except OSError as error:
        raise RunError(f"{clean(str(local), 300)}: {error.strerror}", expected="a directory of ours") from None
    finally:
        await asyncio.to_thread(discard, staging)
    return open_run(local)


def _make_ours(staging: Path, host: str, run_dir: str, name: str) -> None:
    """Checks what came, and says in the manifest where the run is as seen from here.

    Raises:
        RunError: it is no run that can be followed from here.
    """
    manifest = read_manifest(staging)
    if manifest.id != name or manifest.remote is None:
        raise RunError(f"{host}: {run_dir}: was not made there by a console of another machine", expected="such a run")
    contract = staging / CONTRACT
    if not contract.is_file() or hashlib.sha256(contract.read_bytes()).hexdigest() != manifest.contract_sha256:
        raise RunError(f"{host}: {run_dir}: its {CONTRACT} is not the one that its manifest speaks of")
    remote = msgspec.structs.replace(manifest.remote, host=host, run_dir=run_dir)
    write_manifest(staging, msgspec.structs.replace(manifest, remote=remote))


def _place(staging: Path, local: Path) -> None:
    os.rename(staging, local)
    sync_directory(local.parent)
