"""A host's environment, BASE/venv: made with what the engine needs, and tried."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dispatch.hosts import BOOTSTRAPPED_PYTHON, Host
from dispatch.staging import stage_engine
from dispatch.streams import resolve
from dispatch.tool_client import HostToolError, Say, ask, field
from dispatch.transfer import Tell
from dispatch.transport import Transport
from engine.errors import ConfigError
from engine.text import clean

NEEDS: Final = ("torch", "transformers", "safetensors", "tokenizers", "msgspec", "pyyaml", "numpy")
"""What the engine imports, by the names that this project's metadata has; the console's own needs stay here."""
PYTHONS: Final = ("python3.12", "python3.13", "python3.11", "python3")
VERIFY_SECONDS: Final = 300.0

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
