"""A pre-flight: asks a host for its facts, and what a run would need there, and has them judged."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dispatch.environment import PYTHONS, requirements
from dispatch.facts import Facts, Named, parse_facts
from dispatch.hosts import load_hosts
from dispatch.places import Reach
from dispatch.preflight import (
    PYTHON,
    VISIBLE,
    Line,
    Material,
    Needs,
    Preflight,
    device_of,
    judge,
    not_looked_at,
    reserved,
)
from dispatch.tool_client import Answer, HostToolError, conversation, python_of
from dispatch.transport import LocalTransport, Transport, TransportError
from dispatch.versions import release, split_requirement
from engine.config import RunConfig
from engine.data_files import SHARD_SUFFIX, about_tokens, tokens_in
from engine.errors import ConfigError, KdError
from engine.estimate import Estimate
from engine.formats import ModelFiles, Role, inspect_model_dir, resolve_builtin
from engine.micro_batch import foresee, relief
from engine.schema import ON_HOST
from engine.text import clean

if TYPE_CHECKING:
    from dispatch.remote import HostPlan

CLOCK_READINGS = 3
PROBE_SECONDS = 10.0

_VERSION = "import platform; print(platform.python_version())"
_FIND = (
    'for p; do if "$p" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then echo "$p"; exit; fi; '
    "done"
)
"""The first of some Pythons that is new enough."""

Say = Callable[[str], object]


async def preflight(
    reach: Reach,
    name: str | None,
    config: RunConfig | None,
    evidence: Path,
    *,
    plan: HostPlan | None = None,
    say: Say = lambda text: None,
    probe: bool = True,
) -> Preflight:
    """Looks at a host, which takes a few round trips over one connection; nothing stays there.

    Args:
        reach: the ways to the hosts.
        name: the host; None is this machine.
        config: of the run as it holds here, before any plan; None looks at the host alone.
        evidence: where run directories are on this machine.
        plan: what a run there would need, where it is known already; else it is made here.
        say: told what takes long.
        probe: make a file in the run directory and remove it at once: only that tells for certain whether one can.

    Returns:
        The table. A host that cannot be reached is a line of it, and no exception.

    Raises:
        ConfigError: hosts.yaml is wrong, or this can be no host's name.
    """
    began = time.monotonic()
    transport: Transport = LocalTransport() if name is None else reach.transport(name)
    found = Preflight(name, (), 0.0)
    try:
        link = await _link(transport)
        if name is not None:
            say(f"{name}: {link.found}")
        planning = asyncio.create_task(_plan(reach, name, config, plan, say))
        try:
            asked = await _ask(reach, transport, name, config, evidence, probe)
            needs = await asyncio.to_thread(_needs, name, config, asked, await planning)
        finally:
            planning.cancel()
            await asyncio.gather(planning, return_exceptions=True)
        lines = (link, *judge(asked.facts, needs))
        found = Preflight(name, lines, 0.0, asked.facts.host if asked.facts else None)
    except TransportError as error:
        why = Line("host", "FAIL", clean(str(error), 1000), "answers, with a trusted key")
        found = Preflight(name, (why, *not_looked_at("the host was not reached")), 0.0, reached=False)
    lane = None if found.ready or name is None else load_hosts(reach.environ).next_lane(name)
    seconds = round(time.monotonic() - began, 3)
    return Preflight(name, found.lines, seconds, found.facts, lane, found.reached)


def require(found: Preflight, force: bool) -> list[str]:
    """Refuses a start that the table forbids.

    Returns:
        What was forced, by name, for the manifest's `overrides`.

    Raises:
        TransportError: the host was not reached (exit code 3).
        ConfigError: everything that forbids the start, in one message.
    """
    if not found.reached:
        raise TransportError(found.failed[0].found)
    if found.ready or (force and not found.forbidden):
        return list(found.overrides)
    told = "; ".join(f"{line.name}: {line.found}" for line in found.failed)
    do = [f"{line.name}: {line.do}" for line in found.failed if line.do]
    if not found.forbidden:
        do.append("--force starts it all the same")
    if found.next_lane is not None:
        do.append(f"or take the next lane: --host {found.next_lane}")
    raise ConfigError(f"{found.host or 'this machine'} is not ready: {told}", do="; ".join(do) or None)


# Asking


@dataclass(frozen=True)
class _Asked:
    """What a host answered."""

    facts: Facts | None
    named: Mapping[str, Named]
    """What the configuration names there, by how it names it."""
    python_problem: str | None = None


async def _link(transport: Transport) -> Line:
    """The connection, and whose key it has."""
    if isinstance(transport, LocalTransport):
        return Line("host", "PASS", "this machine", "answers")
    from dispatch.ssh import SSHTransport

    began, wanted = time.monotonic(), "answers, with a trusted key"
    if not isinstance(transport, SSHTransport):
        return Line("host", "PASS", "answers", wanted)
    connection = await transport.connection()
    seconds, key = time.monotonic() - began, connection.get_server_host_key()
    if key is None:
        raise TransportError(f"{transport.host}: the host proved itself without a key", do="use a host key")
    told = f"{key.get_algorithm()} {key.get_fingerprint('sha256')}"
    return Line("host", "PASS", f"reached in {seconds:.2f} s, {told}", wanted)


async def _ask(
    reach: Reach, transport: Transport, name: str | None, config: RunConfig | None, base: Path, probe: bool
) -> _Asked:
    """The host's facts; those of another Python where the one of its settings cannot be used."""
    there = [path for path in dict.fromkeys(path for _, path in _paths(config)) if _is_there(path, name)]
    request: dict[str, Any] = {
        "op": "facts",
        "base": os.path.abspath(base) if name is None else reach.host(name).run_dir,
        "packages": [split_requirement(each)[0] for each in _requirements()],
        "named": [path.partition(":")[2] for path in there],
        "clocks": True,
        "probe": probe,
    }
    if name is not None and VISIBLE in (passed := reach.passed_on(name)):
        request["visible"] = passed[VISIBLE]
    python, problem = await python_of(transport), None
    try:
        facts = await _facts(transport, request, python)
    except HostToolError as error:
        problem = await _python_problem(transport, python) or clean(str(error), 500)
        other = await transport.run(["sh", "-c", _FIND, "kd", *PYTHONS], timeout=PROBE_SECONDS)
        found = other.stdout.decode(errors="replace").strip()
        if found not in PYTHONS:
            return _Asked(None, {}, problem)
        try:
            facts = await _facts(transport, request, found)
        except HostToolError:
            return _Asked(None, {}, problem)
    return _Asked(facts, dict(zip(there, facts.named, strict=False)), problem)


async def _facts(transport: Transport, request: Mapping[str, object], python: str) -> Facts:
    """One conversation: a few readings of the clock, the quickest of which counts, then the facts."""
    async with conversation(transport, request, python=python) as tool:
        readings = []
        for _ in range(CLOCK_READINGS):
            began, clock = time.monotonic(), time.time()
            await tool.tell({"clock": True})
            answer = await tool.answer()
            trip = time.monotonic() - began
            readings.append((trip / 2, _time(answer) - (clock + trip / 2)))
        bound, ahead = min(readings)
        await tool.tell({})
        return parse_facts(await tool.answer(), transport.host, (ahead, bound))


def _time(answer: Answer) -> float:
    told = answer.get("time")
    if not isinstance(told, float):
        raise HostToolError(f"the host tells {clean(repr(told)[:100])} as its time")
    return told


async def _python_problem(transport: Transport, python: str) -> str | None:
    """What is wrong with a Python that did not run the tool; None: that is not what was wrong."""
    done = await transport.run([python, "-I", "-c", _VERSION], timeout=PROBE_SECONDS)
    version, path = clean(done.stdout.decode(errors="replace").strip(), 40), clean(python, 300)
    if done.rc == 127 or b"not found" in done.stderr.lower():
        return f"no Python {path}"
    if done.rc != 0 or release(version) == (0,):
        return f"{path} does not work: {clean(done.stderr.decode(errors='replace').strip(), 200)}"
    return f"{version}, {path}" if release(version) < PYTHON else None


async def _plan(
    reach: Reach, name: str | None, config: RunConfig | None, plan: HostPlan | None, say: Say
) -> HostPlan | str | None:
    """What is to be sent; a text says why that is not known."""
    if plan is not None or name is None or config is None:
        return plan
    from dispatch.remote import plan_host

    try:
        return await plan_host(reach, name, config, say)
    except TransportError:
        raise
    except KdError as error:
        return clean(str(error), 1000)


# What the run needs


def _needs(name: str | None, config: RunConfig | None, asked: _Asked, plan: HostPlan | str | None) -> Needs:
    """Needs of a run, by what is there."""
    needed: Estimate | None = None
    no_estimate: str | None = None
    if config is not None and asked.facts is not None:
        try:
            needed = _estimate(config, asked)
        except (KdError, OSError) as error:
            no_estimate = clean(f"what the run needs cannot be told: {error}", 500)
    problem = plan if isinstance(plan, str) else None
    try:
        materials = tuple(_materials(name, config, asked, None if isinstance(plan, str) else plan))
    except ConfigError as error:
        materials, problem = (), str(error)
    if any(each.named is not None and each.named.kind is None for each in materials):
        problem = None  # a line of its own says so
    return Needs(
        name,
        "auto" if config is None else config.train.device,
        tuple(_requirements()),
        asked.python_problem,
        needed,
        no_estimate,
        "" if config is None else relief(config),
        materials,
        problem,
    )


def _materials(name: str | None, config: RunConfig | None, asked: _Asked, plan: HostPlan | None) -> Iterator[Material]:
    """Models and data, each once; those that are built in travel with the engine."""
    keys: dict[str, str] = {}
    for key, path in _paths(config):
        keys.setdefault(path, key)
    if plan is not None:
        for item in plan.items:
            key = keys.get(item.path, item.what)
            if item.path not in asked.named:
                yield Material(key, clean(item.path, 300), item.size, item.missing_bytes)
    for path, key in keys.items():
        if path in asked.named:
            weights = key == "teacher" or (key == "student" and config is not None and not config.student.starts_random)
            yield Material(key, clean(path, 300), 0, 0, asked.named[path], weights)
        elif name is None:
            yield Material(key, clean(path, 300), _size_here(key, Path(path)), 0)


def _size_here(key: str, path: Path) -> int:
    """Bytes of a file or of a directory's files on this machine."""
    if not path.exists():
        raise ConfigError(f"{key}: {clean(str(path), 300)}: no such file or directory")
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def _estimate(config: RunConfig, asked: _Asked) -> Estimate:
    """What the run takes on the device that was found there; loads no weight.

    Raises:
        ModelError: a model's directory cannot be used.
    """
    assert asked.facts is not None
    wanted = config.student
    student = _files(wanted.source, "student", not wanted.starts_random, asked)
    teacher = None if config.teacher is None else _files(config.teacher.path, "teacher", True, asked)
    device, free = device_of(asked.facts, config.train.device), asked.facts.memory_available
    return foresee(
        config,
        teacher,
        student,
        device=device,
        shared=asked.facts.host.unified_memory,
        free_device=asked.facts.gpu_free,
        free_host=None if free is None else free - reserved(asked.facts, config.train.device),
        corpus_tokens=_corpus_tokens(config, asked) if config.mode == "prepare" else None,
    )


def _corpus_tokens(config: RunConfig, asked: _Asked) -> int | None:
    """About how many tokens the corpus has; None where a part of it was not looked at to its end."""
    tokens = 0
    for path in config.data.paths:
        named = asked.named.get(path)
        if named is None:
            tokens += about_tokens(msgspec.structs.replace(config.data, path=path))
        elif named.more:
            return None
        else:
            tokens += tokens_in(named.bytes, shard=path.endswith(SHARD_SUFFIX))
    limit = config.data.limit_bytes
    return tokens if limit is None else min(tokens, tokens_in(limit, shard=False))


def _files(path: str, role: Role, weights: bool, asked: _Asked) -> ModelFiles:
    """A model's files; of one that is on the host its config.json alone, from which parameters are counted."""
    named = asked.named.get(path)
    if named is None:
        return inspect_model_dir(resolve_builtin(path), role, need_weights=weights)
    if named.config is None:
        raise ConfigError(f"{role} {clean(path, 300)}: no config.json there")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(named.config, encoding="utf-8", errors="replace")
        try:
            return inspect_model_dir(Path(directory), role, need_weights=False)
        except KdError as error:
            raise ConfigError(str(error).replace(directory, clean(path, 300))) from None


def _paths(config: RunConfig | None) -> Iterator[tuple[str, str]]:
    """Every key that names files, but for the contract, and what it names; no built-in ones."""
    if config is None:
        return
    given = [("teacher", config.teacher.path)] if config.teacher else []
    given += [("student", config.student.source), *(("data", path) for path in config.data.paths)]
    given += [("tokenizer", config.data.tokenizer)] if config.data.tokenizer else []
    for key, path in given:
        if path != "builtin" and not path.startswith("builtin:"):
            yield key, path


def _is_there(path: str, name: str | None) -> bool:
    return name is not None and ON_HOST.match(path) is not None and path.partition(":")[0] == name


def _requirements() -> list[str]:
    """The engine's needs; none where this installation does not know them."""
    try:
        return requirements()
    except ConfigError:
        return []
