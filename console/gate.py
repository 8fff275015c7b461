"""The gate: a long training wants a passed smoke of the same configuration on the same host, not long ago."""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from console.conclusion import conclude
from console.run_files import read_exit
from console.run_reader import load_run
from console.times import age, date
from dispatch import runs
from dispatch.facts import HostFacts
from dispatch.manifest import SUMS, ExitRecord
from dispatch.sums import verify_sums
from engine.cautions import LONG_RUN_STEPS
from engine.config import RunConfig, gate_fingerprint
from engine.errors import ConfigError, ExitCode, KdError
from engine.text import clean

MAX_AGE_SECONDS = 7 * 86_400.0
"""Since the smoke's end."""
SKEW_SECONDS = 300.0
"""By so much the clocks of two machines may differ without a word."""
OVERRIDE = "no-gate"
"""How the manifest's `overrides` begins for a run that was started without such a smoke; its reason follows."""
MAX_REASON = 200


@dataclass(frozen=True)
class Gate:
    """What the gate says of one run."""

    needed: bool
    """The run may only start with such a smoke, for it is a training of `LONG_RUN_STEPS` steps or more."""
    steps: int
    """That will be trained."""
    host: str
    """As the operator knows it."""
    smoke: str | None = None
    """The id of the smoke that counts."""
    ended: float | None = None
    """When that was, Unix seconds."""
    missing: str = ""
    """Why none counts."""
    note: str = ""
    """What is odd about its times."""

    @property
    def open(self) -> bool:
        """The run may start."""
        return self.smoke is not None or not self.needed

    def told(self, now: float) -> str:
        """One line for the operator."""
        if self.smoke is not None and self.ended is not None:
            since = f"passed on {self.host} {age(max(0.0, now - self.ended))} ago"
            return f"{self.smoke} {since}" + (f"; {self.note}" if self.note else "")
        if self.needed:
            return f"a training of {self.steps:,} steps wants one that passed on {self.host}; {self.missing}"
        return f"not asked for below {LONG_RUN_STEPS:,} steps; {self.missing}"


@dataclass(frozen=True)
class _Look:
    """What became of one smoke: it counts, or why not; `near`: how much it has of what is wanted."""

    problem: str
    near: int
    ended: float = 0.0
    note: str = ""


def look(
    config: RunConfig,
    evidence: Path,
    host: str | None = None,
    *,
    facts: HostFacts | None = None,
    now: float | None = None,
) -> Gate:
    """Looks for the smoke that a run may start on, the newest first. Changes nothing.

    Args:
        config: as it holds where it is to run, for a host with the paths there.
        evidence: the directory whose smokes count.
        host: where it is to run; None is this machine.
        facts: of that host, to tell it from another machine that had its name.
        now: Unix seconds.
    """
    now = time.time() if now is None else now
    steps = config.steps_asked
    needed = config.mode == "train" and steps >= LONG_RUN_STEPS
    name = host or "this machine"
    wanted = gate_fingerprint(config)
    best: tuple[str, _Look] | None = None
    for run in runs.find_runs(evidence):
        if run.manifest.mode != "smoke" or run.manifest.gate_fingerprint != wanted:
            continue
        found = _look(run, host, facts, now)
        if not found.problem:
            return Gate(needed, steps, name, clean(run.id, 200), found.ended, note=found.note)
        if best is None or found.near > best[1].near:
            best = run.id, found
    if best is None:
        missing = f"no smoke of this configuration in {clean(str(evidence), 200)}"
    else:
        missing = f"{clean(best[0], 200)}, of this configuration, {best[1].problem}"
    return Gate(needed, steps, name, missing=missing)


def require(gate: Gate, command: str, no_gate: str | None) -> list[str]:
    """Refuses a run that the gate does not let through.

    Args:
        gate: from `look`.
        command: what makes the smoke that is missing; empty where nobody knows.
        no_gate: why the operator starts it all the same; None: does not.

    Returns:
        What belongs in the manifest's `overrides`: the reason, where it made the difference.

    Raises:
        ConfigError: no smoke counts, and no reason is given.
    """
    if gate.open:
        return []
    if no_gate is not None:
        return [f"{OVERRIDE}: {reason_of(no_gate)}"]
    raise ConfigError(
        f"no passed smoke for a training of {gate.steps:,} steps on {gate.host}: {gate.missing}",
        expected=f"one that ended at most {age(MAX_AGE_SECONDS).removesuffix(' 0 h')} ago",
        do=f"make it: {command or 'a smoke of the same configuration, on the same host'}; or --no-gate REASON",
    )


def reason_of(text: str) -> str:
    """A reason as the manifest has it.

    Raises:
        ConfigError: it says nothing.
    """
    reason = clean(text.strip(), MAX_REASON)
    if not reason:
        raise ConfigError("--no-gate: empty", expected="why this training is started without a passed smoke")
    return reason


def smoke_command(
    arguments: Sequence[str], *, host: str | None = None, evidence: Path | None = None, headless: bool = True
) -> str:
    """The command that makes the smoke of a configuration.

    Args:
        arguments: what says which configuration: a file, `--set` and the like.
        host: where.
        evidence: where its directory is to be; None is the default one.
        headless: without the dashboard.
    """
    where = ["--host", host] if host else []
    kept = ["--evidence", str(evidence)] if evidence is not None else []
    return shlex.join(["kdconsole", *(["--headless"] if headless else []), "smoke", *arguments, *where, *kept])


def _look(run: runs.RunDir, host: str | None, facts: HostFacts | None, now: float) -> _Look:
    elsewhere = _elsewhere(run, host, facts)
    if elsewhere:
        namesake = host is not None and run.manifest.where == host
        return _Look(elsewhere, 1 if namesake else 0)
    try:
        record = read_exit(run.path)
    except KdError as error:
        return _Look(f"has an end that cannot be read: {clean(str(error), 200)}", 2)
    if record is None:
        return _Look(f"has not ended, or its end is not here: kdconsole --headless attach {clean(run.id, 200)}", 3)
    problem = _failed(run, record)
    if problem:
        return _Look(problem, 2)
    ended, note = _ended(run, record, now)
    if now - ended > MAX_AGE_SECONDS:
        return _Look(f"passed, but ended {age(now - ended)} ago, {date(ended)}" + (f"; {note}" if note else ""), 4)
    return _Look("", 5, ended, note)


def _elsewhere(run: runs.RunDir, host: str | None, facts: HostFacts | None) -> str:
    """Why its host is not the one that is asked for; empty when it is."""
    remote = run.manifest.remote
    if (remote.host if remote else None) != host:
        return f"ran on {clean(run.manifest.where, 100)}"
    if remote is None:
        here = run.manifest.host.hostname == socket.gethostname()
        return "" if here else f"ran on {clean(run.manifest.where, 100)}"
    if facts is not None and remote.facts is not None and facts.hostname != remote.facts.hostname:
        now, then = clean(facts.hostname, 100), clean(remote.facts.hostname, 100)
        return f"ran on {host} when that was the machine {then}, which is {now} now"
    return ""


def _failed(run: runs.RunDir, record: ExitRecord) -> str:
    """Why it did not pass, as the console judges its whole stream again; empty when it did."""
    if record.exit_code != ExitCode.OK:
        return f"did not pass: {clean(record.describe(), 200)}"
    loaded = load_run(run.path)
    if loaded.problem:
        return f"cannot be read: {clean(loaded.problem, 200)}"
    concluded = conclude(loaded.state, record)
    if concluded.exit_code != ExitCode.OK:
        return f"did not pass: {concluded.status}, {clean(concluded.reason, 200)}"
    if not (run.path / SUMS).exists():
        return ""
    try:
        changed = verify_sums(run.path)
    except KdError as error:
        changed = (str(error),)
    return f"was changed since it ended: {clean(changed[0], 200)}" if changed else ""


def _ended(run: runs.RunDir, record: ExitRecord, now: float) -> tuple[float, str]:
    """When it ended, by the clock of its host; by ours where that one's word is no time that it can have been."""
    made = run.manifest.created_unix
    if made - SKEW_SECONDS <= record.ended <= now + SKEW_SECONDS:
        return min(record.ended, now), ""
    told = f"by the clock there it ended {date(record.ended)}, which cannot be"
    ended = made + max(0.0, record.seconds)
    if ended <= now + SKEW_SECONDS:
        return min(ended, now), f"{told}; taken is {date(ended)}, by the clock here"
    return now, f"{told}; by the clock here it was made {date(made)}, in the future, so its age is not known"
