"""Making a run on another host: what it needs is put there, then its directory, and nothing is started yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from dispatch.manifest import CONFIG, CONTRACT, MANIFEST, Remote, sha256_file
from dispatch.places import Reach
from dispatch.runs import RunDir
from dispatch.staging import stage, stage_engine
from dispatch.streams import resolve
from dispatch.tool_client import python_of
from dispatch.transfer import Progress, Source, put_tree, resuming
from engine.config import RunConfig
from engine.text import clean

Say = Callable[[str], object]
PROGRESS_SECONDS = 5.0
_PATHS = (("teacher", "path"), ("student", "path"), ("student", "from"), ("data", "path"), ("data", "tokenizer"))
"""Every key of a configuration that names files, but for the contract: its text goes with the run."""


async def prepare_host(reach: Reach, name: str, config: RunConfig, say: Say) -> tuple[RunConfig, Remote]:
    """Puts engine, models and data on a host; returns the configuration as it holds there, and where things are.

    What is there already is not sent again. The run's directory is not made yet: `run_dir` of what is returned is the
    directory that it will stand in.

    Args:
        reach: the ways to the hosts.
        name: the host.
        config: as it holds here.
        say: told what is being sent.

    Raises:
        KdError: the host cannot be reached, or something cannot be put there.
    """
    transport = reach.transport(name)
    told = partial(_tell, say, name)
    # A host that does not answer now is an error; one that is lost while something is sent is waited for.
    await transport.stat("/")
    base = await resolve(transport, reach.host(name).run_dir)
    python = await python_of(transport)
    engine = await stage_engine(transport, base, python=python, say=told)
    if engine.present < engine.size:
        told(f"engine sent to {engine.path}")
    known: dict[str, str] = {}

    async def there(path: str) -> str:
        if path == "builtin" or path.startswith("builtin:"):
            return path
        if path not in known:
            meter = _Meter(told, path)
            staged = await stage(transport, base, path, python=python, say=told, progress=meter)
            known[path] = staged.path
        return known[path]

    tree: dict[str, Any] = msgspec.to_builtins(config)
    for section, key in _PATHS:
        given = (tree.get(section) or {}).get(key)
        if isinstance(given, str):
            tree[section][key] = await there(given)
        elif isinstance(given, list):
            tree[section][key] = [await there(each) for each in given]
    remote = Remote(host=name, run_dir=f"{base}/runs", python=python, engine=engine.path)
    return msgspec.convert(tree, RunConfig), remote


async def send_run(reach: Reach, run_dir: RunDir) -> None:
    """Makes a run's directory on its host, whole or not at all, from the one that is here.

    Raises:
        KdError: it cannot be made.
    """
    remote = run_dir.manifest.remote
    assert remote is not None
    sources = []
    for name in (CONFIG, CONTRACT, MANIFEST):
        path = run_dir.path / name
        sources.append(Source(path, name, path.stat().st_size, await asyncio.to_thread(sha256_file, path)))
    transport = reach.transport(remote.host)
    await resuming(lambda: put_tree(transport, sources, f"{remote.run_dir}.part", remote.run_dir, python=remote.python))


def _tell(say: Say, host: str, text: str) -> None:
    say(text if text.startswith(f"{host}: ") else f"{host}: {text}")


class _Meter:
    """Tells every few seconds how far something large is."""

    def __init__(self, say: Say, path: str) -> None:
        self._say, self._path, self._next = say, clean(path, 120), 0.0

    def __call__(self, progress: Progress) -> None:
        now = asyncio.get_running_loop().time()
        if self._next == 0.0:
            self._next = now + PROGRESS_SECONDS
        elif now >= self._next:
            self._next = now + PROGRESS_SECONDS
            left = "" if progress.eta is None else f", {progress.eta:.0f} s to go"
            share = progress.done / max(progress.total, 1)
            self._say(
                f"{self._path}: {share:.0%} of {progress.total / 1e6:,.0f} MB, {progress.rate / 1e6:.1f} MB/s{left}"
            )
