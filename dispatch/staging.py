"""What a run needs on a host, put there once: the engine, models and data by their contents, an environment.

Everything stands below BASE, the host's run directory: `engine/HASH`, `store/HASH` and `venv`. A directory named by a
hash holds files of exactly that content and is never changed; it is made as HASH.part and renamed when whole.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dispatch.bundle import ROOT, engine_bundle, tree_hash
from dispatch.hosts import BOOTSTRAPPED_PYTHON, NAME, Host
from dispatch.local_hashes import LocalHashes
from dispatch.names import problem
from dispatch.streams import resolve
from dispatch.tool_client import HostToolError, Say, ask, field
from dispatch.transfer import Source, Tell, put_tree, resuming
from dispatch.transport import Transport
from engine.errors import ConfigError
from engine.text import clean

NEEDS: Final = ("torch", "transformers", "safetensors", "tokenizers", "msgspec", "pyyaml", "numpy")
"""What the engine imports, by the names that this project's metadata has; the console's own needs stay here."""
PYTHONS: Final = ("python3.12", "python3.13", "python3.11", "python3")
VERIFY_SECONDS: Final = 300.0

_HOST_PATH: Final = re.compile(rf"({NAME}):((?:/|~/).*)", re.DOTALL)
_MINIMUM: Final = "import sys; sys.exit(sys.version_info < (3, 11))"
_HAS_TORCH: Final = (
    "import sys, importlib.util as u; sys.exit(sys.version_info < (3, 11) or u.find_spec('torch') is None)"
)
_VERIFY: Final = """
import json, sys
sys.path.insert(0, sys.argv[1])
import engine.config, engine.contract, engine.falsifiers, engine.stream
import numpy, safetensors, tokenizers, torch, transformers
print("\\n" + json.dumps({"torch": str(torch.__version__), "cuda": torch.version.cuda,
    "devices": torch.cuda.device_count(), "transformers": transformers.__version__}))
"""


@dataclass(frozen=True, slots=True)
class Staged:
    """Something that is on the host now."""

    path: str
    """There, absolute."""
    sha256: str | None
    """Of names and contents; None for what was there already and is only named."""
    size: int
    """In bytes; 0 for what is only named."""
    present: int
    """Bytes of it that were there already."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment of a host, made and tried."""

    python: str
    """Its Python, absolute."""
    base: str
    """The Python that it was made from."""
    python_version: str
    own_torch: bool
    """Whether torch is the base's own."""
    torch: str
    cuda: str | None
    devices: int
    engine: str
    """The engine's directory."""
    made: bool
    """Whether anything had to be done."""


async def stage_engine(
    transport: Transport,
    base: str,
    *,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
    root: Path = ROOT,
) -> Staged:
    """Puts the engine of this installation at BASE/engine/HASH, unless it is there.

    Args:
        transport: reaches the host.
        base: the host's run directory.
        progress: hears how far it is.
        say: hears what takes long, and of lost connections.
        python: the host's Python; by its settings without it.
        root: what holds the packages, for another installation than this one.

    Raises:
        TransferError, HostToolError, TransportError: see `dispatch.transfer.put`.
    """
    bundle = await asyncio.to_thread(engine_bundle, root)
    sources = [Source(bundle.root / name, name, *entry) for name, entry in bundle.files.items()]
    return await _stage_tree(transport, f"{base}/engine", sources, bundle.sha256, progress, say, python)


async def stage(
    transport: Transport,
    base: str,
    path: str | Path,
    *,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
    hashes: LocalHashes | None = None,
) -> Staged:
    """Puts a model or data, a file or a directory of this machine, at BASE/store/HASH, unless it is there.

    `host:/path` and `host:~/path` name what is on the host already; nothing is sent then. Hidden files are left out,
    and symbolic links to files are taken for the files, as in a cache of models.

    Args:
        transport: reaches the host.
        base: the host's run directory.
        path: here, or on the host.
        progress: hears how far it is.
        say: hears what takes long, and of lost connections.
        python: the host's Python; by its settings without it.
        hashes: of files here.

    Raises:
        ConfigError: there is no such thing, here or there.
        TransferError, HostToolError, TransportError: see `dispatch.transfer.put`.
    """
    named = _HOST_PATH.fullmatch(str(path))
    if named is not None:
        return await _named(transport, named[1], named[2])
    local = Path(os.path.abspath(Path(path).expanduser()))
    if say is not None:
        say(f"hashing {clean(str(local), 300)}")
    files = await asyncio.to_thread(local_files, local, hashes or LocalHashes())
    sha256 = tree_hash({name: entry for name, (_, entry) in files.items()})
    sources = [Source(where, name, *entry) for name, (where, entry) in files.items()]
    staged = await _stage_tree(transport, f"{base}/store", sources, sha256, progress, say, python)
    if local.is_dir():
        return staged
    return Staged(f"{staged.path}/{local.name}", staged.sha256, staged.size, staged.present)


async def _named(transport: Transport, host: str, path: str) -> Staged:
    if host != transport.host:
        raise ConfigError(
            f"{clean(host, 100)}:{clean(path, 300)}: is on {clean(host, 100)}, but the run goes to {transport.host}",
            expected=f"{transport.host}:/path, or a path on this machine",
        )
    there = await resolve(transport, path)
    if await transport.stat(there) is None:
        raise ConfigError(f"{host}:{clean(path, 300)}: no such file or directory there")
    return Staged(there, None, 0, 0)


def local_files(path: Path, hashes: LocalHashes) -> dict[str, tuple[Path, tuple[int, str]]]:
    """The files of a directory, or the one file: by name, where each is, and its size and SHA-256.

    Raises:
        ConfigError: there is none, one cannot be read, or has a name that no host would be given.
    """
    shown = clean(str(path), 300)
    found: dict[str, Path] = {}
    if path.is_dir():
        for directory, below, names in os.walk(path, onerror=_raise):
            below[:] = sorted(each for each in below if not each.startswith(".") and each != "__pycache__")
            for name in sorted(names):
                each = Path(directory, name)
                if not name.startswith("."):
                    found[each.relative_to(path).as_posix()] = each
    elif path.exists():
        found[path.name] = path
    else:
        raise ConfigError(f"{shown}: no such file or directory")
    files = {}
    for name, each in found.items():
        if not each.is_file():
            raise ConfigError(f"{clean(str(each), 300)}: is no file", expected="files and directories")
        wrong = problem(name)
        if wrong is not None:
            raise ConfigError(f"{clean(str(each), 300)}: {wrong}", do="rename it")
        try:
            files[name] = (each, hashes.sha256(each))
        except OSError as error:
            raise ConfigError(f"{clean(str(each), 300)}: cannot be read: {error.strerror}") from None
    if not files:
        raise ConfigError(f"{shown}: is empty")
    hashes.save()
    return files


def _raise(error: OSError) -> None:
    raise ConfigError(f"{clean(str(error.filename), 300)}: cannot be read: {error.strerror}") from None


async def _stage_tree(
    transport: Transport,
    parent: str,
    sources: list[Source],
    sha256: str,
    progress: Tell | None,
    say: Say | None,
    python: str | None,
) -> Staged:
    place = f"{parent}/{sha256}"

    async def attempt() -> int:
        return await put_tree(transport, sources, f"{place}.part", place, progress=progress, say=say, python=python)

    present = await resuming(attempt, say=say)
    return Staged(await resolve(transport, place), sha256, sum(each.size for each in sources), present)


# An environment


def requirements() -> list[str]:
    """What pip is asked for on a host: the engine's needs in the versions that this installation asks for.

    Raises:
        ConfigError: this project is not installed, so that its needs are not known.
    """
    try:
        given = importlib.metadata.requires("kdconsole") or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("kdconsole is not installed as a package here", do="install it with pip") from None
    found = {}
    for line in given:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is not None and ";" not in line:
            found[re.sub(r"[-_.]+", "-", name[0]).lower()] = line.strip()
    missing = [name for name in NEEDS if name not in found]
    if missing:
        raise ConfigError(f"kdconsole's metadata does not name {', '.join(missing)}", do="install it again with pip")
    return [found[name] for name in NEEDS]


async def base_python(transport: Transport, host: Host) -> str:
    """The Python to make an environment from: the one that hosts.yaml names, else the best that is found.

    One that has torch is better than one that has none, for its torch fits the host's driver.

    Raises:
        ConfigError: there is none of 3.11 or newer.
    """
    venv = await resolve(transport, f"{host.run_dir}/{BOOTSTRAPPED_PYTHON}")
    chosen = await resolve(transport, host.python)
    if await _does(transport, chosen, _MINIMUM):
        return chosen  # what an environment that is there was made from is on record beside it
    if chosen != venv:
        raise ConfigError(
            f"{transport.host}: {clean(chosen, 300)} is no Python of 3.11 or newer",
            do=f"correct `python` of {host.name} in hosts.yaml, or leave it out",
        )
    for wanted in (_HAS_TORCH, _MINIMUM):
        for python in PYTHONS:
            if await _does(transport, python, wanted):
                return python
    raise ConfigError(
        f"{transport.host}: none of {', '.join(PYTHONS)} is a Python of 3.11 or newer",
        do=f"install one, or name it as `python` of {host.name} in hosts.yaml",
    )


async def _does(transport: Transport, python: str, code: str) -> bool:
    # Through a shell, so that a program that is missing is an exit code on this machine as well.
    done = await transport.run(["sh", "-c", 'exec "$0" -c "$1" 2>/dev/null', python, code])
    return done.rc == 0


async def bootstrap(
    transport: Transport,
    host: Host,
    say: Say,
    *,
    progress: Tell | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Environment:
    """Makes BASE/venv with the engine's needs, puts the engine there, and tries both. Safe to repeat.

    A Python that has torch keeps it: the environment sees that Python's packages, and pip may not replace its torch.

    Args:
        transport: reaches the host.
        host: from hosts.yaml; its `python` is what the environment is made from, and the variables in `env` are what
            pip there is given of this machine's.
        say: hears a line for whatever is done, pip's own lines included.
        progress: hears how far the engine's files are.
        environ: this machine's variables.

    Raises:
        ConfigError: the host has no Python that would do.
        HostToolError: pip or the trial failed; its reason.
        TransportError: the connection was lost; start it again.
    """
    base = await base_python(transport, host)
    given = {name: environ[name] for name in host.env if name in environ}
    answer = await ask(
        transport,
        "bootstrap",
        python=base,
        say=say,
        venv=f"{host.run_dir}/venv",
        base=base,
        requirements=requirements(),
        env=given,
    )
    python = field(answer, "python", str)
    staged = await stage_engine(transport, host.run_dir, progress=progress, say=say, python=python)
    say(f"{transport.host}: trying torch and the engine")
    tried = await transport.run([python, "-P", "-c", _VERIFY, staged.path], timeout=VERIFY_SECONDS)
    if tried.rc != 0:
        told = tried.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {tried.rc}"]
        raise HostToolError(f"{transport.host}: the environment does not work: {clean(told[-1], 500)}")
    try:
        facts = json.loads(tried.stdout.splitlines()[-1])
        cuda = facts["cuda"]
        return Environment(
            python=clean(python, 4096),
            base=clean(field(answer, "base", str), 4096),
            python_version=clean(field(answer, "python_version", str), 100),
            own_torch=answer.get("own_torch") is not None,
            torch=clean(str(facts["torch"]), 100),
            cuda=None if cuda is None else clean(str(cuda), 100),
            devices=int(facts["devices"]),
            engine=staged.path,
            made=field(answer, "made", bool),
        )
    except (ValueError, KeyError, IndexError, TypeError):
        raise HostToolError(
            f"{transport.host}: the trial of the environment answers nothing that can be read"
        ) from None
