"""A run on another host: what it needs there is planned, then sent, then its directory; nothing is started yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec

from dispatch.local_hashes import LocalHashes
from dispatch.manifest import CONFIG, CONTRACT, MANIFEST, Remote, sha256_file
from dispatch.places import Reach
from dispatch.putting import Source, put_tree
from dispatch.runs import RunDir
from dispatch.staging import (
    Wanted,
    bytes_there,
    find_named,
    is_named,
    path_named,
    send_wanted,
    wanted_engine,
    wanted_files,
)
from dispatch.streams import resolve
from dispatch.tool_client import python_of
from dispatch.transfer import Progress, resuming
from dispatch.transport import Transport
from engine.config import RunConfig
from engine.problems import PROBLEMS
from engine.text import clean

Say = Callable[[str], object]
PROGRESS_SECONDS = 5.0
ENGINE = "engine"
_PATHS = (("teacher", "path"), ("student", "path"), ("student", "from"), ("data", "path"), ("data", "tokenizer"))
"""Every key of a configuration that names files, but for the contract: its text goes with the run."""


@dataclass(frozen=True)
class Item:
    """Something that a run needs on its host."""

    what: str
    """What it is to the run: `engine`, or the keys that name it, such as `teacher` or `student, data.tokenizer`."""
    path: str
    """Where it comes from: an absolute path here, or `host:/path` for what is there already and is only named."""
    there: str
    """Where it is on the host, or will be; absolute."""
    sha256: str | None
    """Of names and contents; None for what is only named."""
    size: int
    """In bytes; 0 for what is only named."""
    missing_bytes: int
    """How much of it is yet to be sent."""
    wanted: Wanted | None = field(default=None, repr=False, compare=False)
    """The files; None for what is only named."""


@dataclass(frozen=True)
class HostPlan:
    """A run on a host before anything was done for it there."""

    config: RunConfig
    """As it holds there: with the paths there."""
    remote: Remote
    """Where the run's things stand; `run_dir` is still the directory below which its own will be."""
    items: tuple[Item, ...]
    """The engine first."""

    @property
    def missing_bytes(self) -> int:
        """How much is yet to be sent."""
        return sum(item.missing_bytes for item in self.items)


async def plan_host(
    reach: Reach, name: str, config: RunConfig, say: Say, *, hashes: LocalHashes | None = None
) -> HostPlan:
    """What a run needs on a host and what of it is there already. Changes nothing there.

    Args:
        reach: the ways to the hosts.
        name: the host.
        config: as it holds here.
        say: told of what takes long.
        hashes: of files here.

    Raises:
        KdError: the host cannot be reached, or something that the configuration names is not where it says.
    """
    transport = reach.transport(name)
    told = partial(_tell, say, name)
    # A host that does not answer now is an error; one that is lost while something is sent is waited for.
    await transport.stat("/")
    base = await resolve(transport, reach.host(name).run_dir)
    python = await python_of(transport)
    hashes = hashes or LocalHashes()
    keys: dict[str, list[str]] = {}
    tree: dict[str, Any] = msgspec.to_builtins(config)
    for section, key in _PATHS:
        for path in _listed((tree.get(section) or {}).get(key)):
            if not _is_builtin(path):
                keys.setdefault(path, []).append(_shown_key(section, key))
    engine = await asyncio.to_thread(wanted_engine, base)
    planned: list[Item] = [_item(ENGINE, str(engine.sources[0].path.parents[1]), engine)]
    for path, named_by in keys.items():
        what = ", ".join(named_by)
        if is_named(path):
            planned.append(Item(what, path, await find_named(transport, path), None, 0, 0))
        else:
            told(f"hashing {clean(path, 300)}")
            planned.append(_item(what, path, await asyncio.to_thread(wanted_files, base, path, hashes)))
    items = await asyncio.gather(*(_compared(transport, item, python) for item in planned))
    there = {item.path: item.there for item in items[1:]}
    for section, key in _PATHS:
        given = (tree.get(section) or {}).get(key)
        if isinstance(given, str):
            tree[section][key] = there.get(given, given)
        elif isinstance(given, list):
            tree[section][key] = [there.get(each, each) for each in given]
    cache = (tree.get("teacher") or {}).get("cache")
    if cache is not None and is_named(cache):  # it belongs to the host: nothing of it is sent, or need be there
        tree["teacher"]["cache"] = await path_named(transport, cache)
    given = tuple(each for each in reach.host(name).env if each in reach.environ)
    remote = Remote(host=name, run_dir=f"{base}/runs", python=python, engine=engine.place, env=given)
    return HostPlan(msgspec.convert(tree, RunConfig), remote, tuple(items))


def _listed(given: object) -> list[str]:
    return [given] if isinstance(given, str) else given if isinstance(given, list) else []


def _is_builtin(path: str) -> bool:
    return path == "builtin" or path.startswith("builtin:")


def _shown_key(section: str, key: str) -> str:
    return section if key in ("path", "from") else f"{section}.{key}"


def _item(what: str, path: str, wanted: Wanted) -> Item:
    return Item(what, path, wanted.path, wanted.sha256, wanted.size, wanted.size, wanted)


async def _compared(transport: Transport, item: Item, python: str) -> Item:
    if item.wanted is None:
        return item
    return replace(item, missing_bytes=item.size - await bytes_there(transport, item.wanted, python=python))


async def carry_out(reach: Reach, plan: HostPlan, say: Say) -> None:
    """Puts what a plan wants on its host; what is there already is compared and not sent again.

    Args:
        reach: the ways to the hosts.
        plan: from `plan_host`.
        say: told what is being sent.

    Raises:
        KdError: the host cannot be reached, something cannot be put there, or was changed here since it was planned.
    """
    name = plan.remote.host
    transport = reach.transport(name)
    told = partial(_tell, say, name)
    for item in plan.items:
        if item.wanted is None:
            continue
        meter = _Meter(told, item.path)
        done = await send_wanted(transport, item.wanted, python=plan.remote.python, say=told, progress=meter)
        if done.present < done.size:
            sent = f"{(done.size - done.present) / 1e6:,.1f} MB"
            told(f"{item.what} sent: {sent} of {clean(item.path, 200)} to {clean(item.there, 300)}")


async def send_run(reach: Reach, run_dir: RunDir) -> None:
    """Makes a run's directory on its host, whole or not at all, from the one that is here.

    Raises:
        KdError: it cannot be made.
    """
    remote = run_dir.manifest.remote
    assert remote is not None
    sources = []
    asked = [PROBLEMS] if (run_dir.path / PROBLEMS).is_file() else []
    for name in (CONFIG, CONTRACT, *asked, MANIFEST):
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
            self._say(f"{self._path}: {progress.describe()}")
