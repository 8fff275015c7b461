"""What a start would do, step by step with its real values; nothing is changed, neither here nor on the host."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from console import checks, launch
from console.launch import Job
from console.stored import stored_what, stored_where
from dispatch.manifest import EVENTS, FIRST_FILES, MANIFEST, SUMS
from dispatch.places import Place, Reach, place_there
from dispatch.supervisor import ALWAYS_SET, PASSED_NAMES, PASSED_PREFIXES, trainer_environment
from dispatch.transport import Completed, FileStat
from engine.config import RunConfig, fingerprint, gate_fingerprint
from engine.errors import ExitCode, KdError
from engine.problems import PROBLEMS
from engine.text import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from console.room import Room
    from dispatch.facts import HostFacts
    from dispatch.remote import HostPlan, Item

SCHEMA = "kdconsole.dry-run/1"
RUN = "RUN"
"""Stands for the run's id, which has the time of its start in it."""


@dataclass(frozen=True)
class Step:
    """One thing that would be done."""

    name: str
    text: str
    """In one line."""
    values: Mapping[str, object]
    """For programs, and below the line for people."""


@dataclass(frozen=True)
class DryRun:
    """A start that was only thought through."""

    mode: str
    host: str | None
    steps: tuple[Step, ...]
    refusals: tuple[str, ...] = ()
    """Why it would not start: each one sentence."""
    overrides: tuple[str, ...] = ()
    """What its manifest would say was forced."""

    @property
    def exit_code(self) -> ExitCode:
        """What the start itself would end in at this point."""
        return ExitCode.USAGE if self.refusals else ExitCode.OK


async def rehearse(job: Job, reach: Reach, say: Callable[[str], object]) -> DryRun:
    """Goes through a start without doing it. A host is connected to and looked at.

    Args:
        job: what would be made.
        reach: the ways to the hosts.
        say: told what takes long.

    Raises:
        KdError: the job is refused before anything could be planned, or the host cannot be reached.
    """
    await asyncio.to_thread(checks.check, job.config, job.host)
    await asyncio.to_thread(checks.problems_of, job.config)
    refusals: list[str] = []
    problem = checks.writable_problem(job.evidence, probe=False)
    if problem:
        refusals.append(problem)
    if job.host is None:
        return await asyncio.to_thread(_here, job, refusals)
    return await _there(job, reach, refusals, say)


def _here(job: Job, refusals: list[str]) -> DryRun:
    from console import room

    overrides = list(job.overrides)
    needed = room.look(job.config, job.evidence)
    try:
        overrides += room.require_room(job.config, job.evidence, force=job.force)
    except KdError as error:
        refusals.append(str(error))
    steps = [_configuration(job, job.config), *_asked(job), _room(needed)]
    steps += _gate(job, job.config, None, refusals, overrides)
    path = Path(os.path.abspath(job.evidence), RUN)
    steps.append(_directory(job.config, str(path), {"here": str(path)}))
    steps += [*_stored(job.config, None), *_launch(job.config, Place(_Nowhere("this machine"), str(path)))]
    steps += _end(job.config, str(path), None)
    return DryRun(job.config.mode, None, tuple(steps), tuple(refusals), tuple(overrides))


async def _there(job: Job, reach: Reach, refusals: list[str], say: Callable[[str], object]) -> DryRun:
    from console import host_desk
    from console import preflight as looking
    from console.preflight_table import document, verdict
    from dispatch.hosts import load_hosts
    from dispatch.local_hashes import LocalHashes
    from dispatch.remote import plan_host

    assert job.host is not None
    overrides = list(job.overrides)
    plan = await plan_host(reach, job.host, job.config, say, hashes=LocalHashes(remember=False))
    found = await looking.preflight(reach, job.host, job.config, job.evidence, plan=plan, say=say, probe=False)
    try:
        overrides += looking.require(found, job.force)
    except KdError as error:
        refusals.append(str(error))
    known = await asyncio.to_thread(host_desk.document, reach.host(job.host), load_hosts(reach.environ))
    address = host_desk.where(known)
    over = f" over {known['over']}" if known["over"] else ""
    steps = [
        _configuration(job, plan.config),
        *await asyncio.to_thread(_asked, job),
        Step(
            "connect",
            f"{job.host} at {address} as {known['user']}{over}: one SSH connection for everything",
            {"host": job.host, "address": address, "user": known["user"], "over": known["over"], "connections": 1},
        ),
        Step("look", verdict(found), {"preflight": document(found)}),
    ]
    steps += await asyncio.to_thread(_gate, job, plan.config, found.facts, refusals, overrides)
    steps += [_send(item) for item in plan.items]
    path, there = Path(os.path.abspath(job.evidence), RUN), f"{plan.remote.run_dir}/{RUN}"
    steps.append(_directory(job.config, str(path), {"here": str(path)}))
    steps.append(_directory(job.config, f"{job.host}:{there}, with the same files", {"there": there}))
    steps += [*_stored(plan.config, job.host), *_launch(job.config, _place(plan, there, reach))]
    steps += _end(job.config, str(path), f"{job.host}:{there}")
    return DryRun(job.config.mode, job.host, tuple(steps), tuple(refusals), tuple(overrides))


def _configuration(job: Job, config: RunConfig) -> Step:
    if config.mode == "smoke":
        long = f"a smoke of at most {config.smoke.budget_seconds:g} s"
        long += f" or {config.smoke.max_steps:,} steps" if config.smoke.max_steps else ""
    elif config.mode == "prepare":
        long = f"storing the teacher's {stored_what(config)}"
    elif config.mode == "evaluate":
        long = f"an evaluation of {clean(config.student.source, 300)}"
    else:
        long = f"a training of {config.steps_asked:,} steps"
    values = {
        "fingerprint": fingerprint(config),
        "gate_fingerprint": gate_fingerprint(config),
        "contract": clean(config.contract.path, 300),
        "name": None if job.name is None else clean(job.name, 200),
    }
    return Step("check", f"{long}: configuration, models and data as far as that goes without torch", values)


def _asked(job: Job) -> list[Step]:
    """Of an evaluation: what of, what is asked, and what contains the programs that answer."""
    if job.config.mode != "evaluate":
        return []
    from console.evaluation_text import asked_text, limits_text, walls_text

    of, asked, problems = job.evaluated, job.config.evaluate, checks.problems_of(job.config)
    values = {
        "suite": clean(asked.suite, 300),
        "model": None if of is None else of.model,
        "run": None if of is None else of.run_id,
        "model_sha256": None if of is None else of.sha256,
    }
    steps = [Step("ask", asked_text(job.config, problems), values)]
    if problems is not None:
        each = f"each answer as a program of its own, at most {limits_text(job.config)}, {walls_text(job.host)}"
        steps.append(Step("contain", each, {"workers": asked.workers}))
    return steps


def _room(found: Room) -> Step:
    from console.room import POOLS, gib, pools

    each, values = [], dict[str, object]()
    for where, size, free in pools(found):
        each.append(f"{POOLS[where]} {gib(size)} of {'?' if free is None else gib(free)} GiB")
        values[where] = {"needed_bytes": size, "free_bytes": free}
    settled = "".join(f"; {told}" for told in found.estimate.settled)
    return Step("room", f"takes {', '.join(each)} that are free{settled}", values)


def _gate(
    job: Job, config: RunConfig, facts: HostFacts | None, refusals: list[str], overrides: list[str]
) -> list[Step]:
    """The gate's step, of a training only; what it refuses and what would be recorded goes into the two lists."""
    if config.mode != "train":
        return []
    from console import gate

    found = gate.look(config, job.evidence, job.host, facts=facts)
    passed: list[str] = []
    try:
        passed = gate.require(found, job.smoke, job.no_gate)
    except KdError as error:
        refusals.append(str(error))
    overrides += passed
    told = found.told(time.time()) + (f"; overridden: {passed[0]}" if passed else "")
    return [Step("gate", told, {"needed": found.needed, "open": found.open or bool(passed), "smoke": found.smoke})]


def _send(item: Item) -> Step:
    values = {
        "what": item.what,
        "from": clean(item.path, 4096),
        "to": clean(item.there, 4096),
        "sha256": item.sha256,
        "bytes": item.size,
        "missing_bytes": item.missing_bytes,
    }
    if item.sha256 is None:
        return Step("use", f"{item.what}: {clean(item.there, 300)}, which is there already", values)
    size = f"{item.size / 1e6:,.1f} MB"
    if item.missing_bytes == 0:
        return Step("keep", f"{item.what}: {size} that is there already, compared with {clean(item.path, 300)}", values)
    told = f"{item.missing_bytes / 1e6:,.1f} of {size}, {clean(item.path, 300)} to {clean(item.there, 300)}"
    return Step("send", f"{item.what}: {told}", values)


def _directory(config: RunConfig, text: str, where: dict[str, object]) -> Step:
    asked = [PROBLEMS] if config.mode == "evaluate" and config.evaluate.runs_code else []
    return Step("make", text, {**where, "files": [*FIRST_FILES, *asked]})


def _stored(config: RunConfig, host: str | None) -> list[Step]:
    """The stored teacher, which belongs to the machine and to no run: nothing of it is sent or brought here."""
    teacher = config.teacher
    if teacher is None or teacher.source == "online":
        return []
    where = stored_where(config) + (f" on {host}" if host else "")
    told = f"the teacher's {stored_what(config)} in {where}"
    values = {"source": teacher.source, "store": where}
    if config.mode == "prepare":
        return [Step("store", f"{told}; what is whole there is kept", values)]
    return [Step("read", f"{told}, made by kdconsole prepare; without it the run is refused", values)]


def _place(plan: HostPlan, run_dir: str, reach: Reach) -> Place:
    remote = plan.remote
    return place_there(_Nowhere(remote.host), run_dir, remote.python, remote.engine, reach.passed_on(remote.host))


def _launch(config: RunConfig, place: Place) -> list[Step]:
    """Supervisor and trainer, as the real start would call them."""
    supervisor = _supervisor_of(config, place)
    trainer = list(place.command) or [place.python, "-P", "-m", "engine", place.run_dir]
    if place.command:
        given: dict[str, object] = {
            "environment": sorted(place.environment),
            "environment_of_the_host": [*PASSED_NAMES, *(f"{prefix}*" for prefix in PASSED_PREFIXES)],
        }
    else:
        given = {"environment": sorted(trainer_environment(os.environ).keys() - ALWAYS_SET.keys())}
    given["environment_always"] = sorted(ALWAYS_SET)
    on = place.transport.host
    return [
        Step("launch", f"the supervisor on {on}, which goes on by itself", {"argv": supervisor}),
        Step("train", "started by the supervisor; of variables here are the names alone", {"argv": trainer, **given}),
    ]


def _supervisor_of(config: RunConfig, place: Place) -> list[str]:
    """The supervisor's command, from the code that launches, which is given a way that leads nowhere."""
    try:
        launch.start(place, config).send(None)
    except _NotSent as sent:
        return list(sent.argv)
    raise AssertionError("a launch that sends no command")


def _end(config: RunConfig, path: str, there: str | None) -> list[Step]:
    """Following and sealing; `there` is the run's directory on its host."""
    ctrl_c = "stops the run" if launch.waited_for(config.mode) else "lets go of it, and the run goes on"
    stream = f"{there or path}/{EVENTS}"
    kept = f", kept as {path}/{EVENTS}" if there else ""
    brought = "its small files are brought here, " if there else ""
    return [
        Step("follow", f"{stream}{kept}, to its end; Ctrl-C {ctrl_c}", {"here": f"{path}/{EVENTS}", "there": stream}),
        Step("seal", f"at the end {brought}{MANIFEST} is completed, {path}/{SUMS} written", {"here": f"{path}/{SUMS}"}),
    ]


class _NotSent(Exception):
    """A command that would have been sent."""

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__()
        self.argv = argv


class _Nowhere:
    """A transport that leads nowhere: it tells by _NotSent what it was to run. See `Transport`."""

    def __init__(self, host: str) -> None:
        self.host = host

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 0.0) -> Completed:
        """Raises _NotSent."""
        raise _NotSent(argv)

    async def stat(self, path: str, *, timeout: float = 0.0) -> FileStat | None:
        """Not to be had here."""
        raise _NotSent(())

    async def read(self, path: str, offset: int, limit: int, *, timeout: float = 0.0) -> bytes:
        """Not to be had here."""
        raise _NotSent(())

    async def list(self, path: str, *, timeout: float = 0.0) -> tuple[str, ...]:
        """Not to be had here."""
        raise _NotSent(())


# How it is told


def document(dry: DryRun) -> dict[str, object]:
    """Everything, for programs."""
    return {
        "schema": SCHEMA,
        "mode": dry.mode,
        "host": dry.host,
        "would_start": not dry.refusals,
        "refusals": list(dry.refusals),
        "overrides": list(dry.overrides),
        "exit_code": int(dry.exit_code),
        "steps": [{"step": each.name, "text": each.text, **each.values} for each in dry.steps],
    }


def text(dry: DryRun) -> str:
    """Everything, for people: a numbered line a step, below it its values."""
    where = f"here or on {dry.host}, which was only looked at" if dry.host else "here"
    lines = [f"dry run: nothing was changed {where}. These would be the steps:"]
    for number, step in enumerate(dry.steps, 1):
        lines.append(f"{number:>2} {step.name:<8} {step.text}")
        lines += [f"{'':11} {line}" for line in _values(step)]
    lines.append(f"{RUN} is the run's id, from the time of its start, such as 20260102-030405-{dry.mode}-0a1b2c")
    if dry.overrides:
        lines.append(f"its manifest would say: {', '.join(dry.overrides)}")
    lines += [f"it would be REFUSED: {refusal}" for refusal in dry.refusals]
    return "\n".join(lines)


_IN_TEXT = (
    *("here", "there", "from", "to", "what", "preflight"),
    *("host", "address", "user", "over", "connections"),
)
"""Values that a step's line has already, or that are told in another way."""


def _values(step: Step) -> list[str]:
    found = []
    for key, value in step.values.items():
        if value is None or key in _IN_TEXT or isinstance(value, dict | bool):
            continue
        name = key.replace("_", " ")
        if key == "argv" and isinstance(value, list):
            found.append(shlex.join(value))
        elif isinstance(value, list):
            found.append(f"{name}: {', '.join(map(str, value)) or 'none'}")
        elif isinstance(value, int):
            found.append(f"{name}: {value:,}")
        else:
            found.append(f"{name}: {value}")
    preflight = step.values.get("preflight")
    if isinstance(preflight, dict):
        found += [f"{each['name']}: {each['outcome']}: {each['found']}" for each in preflight["lines"]]
    return found


def finish(job: Job, say: Callable[[str], object], as_json: bool) -> NoReturn:
    """Goes through a start, prints what it would do, and leaves with the code that it would be refused with, or 0."""

    async def go() -> DryRun:
        async with Reach() as reach:
            return await rehearse(job, reach, say)

    dry = asyncio.run(go())
    click.echo(json.dumps(document(dry), indent=2) if as_json else text(dry))
    sys.exit(dry.exit_code)
