"""Old runs on a host and what else takes room there: what may go, what must not and why, and its removal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dispatch.fetch import Choice, chosen
from dispatch.manifest import EVENTS, EXIT, sha256_file
from dispatch.places import Reach
from dispatch.runs import find_runs
from dispatch.survey import HostCheckpoint, HostRun, Rest, Survey, ask_runs
from dispatch.tool_client import HostToolError, Say, field, python_of
from engine import checkpoint
from engine.errors import RunError

DAY: Final = 86_400.0
REST_SECONDS: Final = DAY
"""What no run uses stays so long: a run that is just being made may be about to use it."""
_GOING: Final = ("running", "starting", "unknown")


@dataclass(frozen=True, slots=True)
class Rules:
    """Which runs may go."""

    older_than: float = 7 * DAY
    """Seconds since the newest file of a run was written."""
    keep: int = 0
    """So many of the newest stay, whatever their age."""
    named: tuple[str, ...] = ()
    """Ids, or beginnings of ids: these and no others, whatever their age, fetched or not."""
    unfetched: bool = False
    """Those too that were not fetched."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A run on a host, and what becomes of it."""

    run: HostRun
    age: float
    """Seconds."""
    goes: bool
    why: str
    """Why it stays, or what is lost with it; may be empty."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a cleaning would remove."""

    survey: Survey
    runs: tuple[Judged, ...]
    """All of them, newest first."""
    rest: tuple[Rest, ...]
    """What goes besides runs."""

    @property
    def going(self) -> tuple[Judged, ...]:
        """The runs that go."""
        return tuple(each for each in self.runs if each.goes)

    @property
    def bytes(self) -> int:
        """What all of it takes."""
        return sum(each.run.bytes for each in self.going) + sum(each.bytes for each in self.rest)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What a cleaning did."""

    removed: tuple[str, ...]
    """Names below the host's run directory."""
    freed: int
    """Bytes."""
    refused: tuple[str, ...]
    """What the host would not remove after all, and why."""


def plan(found: Survey, evidence: Path, rules: Rules, say: Say = lambda text: None) -> Plan:
    """Judges every run of a host; reads every byte of the copies here that a removal would rely on.

    Args:
        found: the host.
        evidence: where run directories live here.
        rules: which may go.
        say: told what is read.

    Raises:
        RunError: a named run is not there, or must not go.
    """
    here = {each.run: each.path for each in find_runs(evidence)}
    named = {_named(found, name).id for name in rules.named}
    runs = []
    for number, run in enumerate(found.runs):
        age = max(0.0, found.time - run.changed)
        if run.state in _GOING:
            stays = f"is {run.state}"
        elif named:
            stays = "" if run.id in named else "was not named"
        elif number < rules.keep:
            stays = f"is among the newest {rules.keep}"
        elif age < rules.older_than:
            stays = f"is younger than {rules.older_than / DAY:g} days"
        elif run.state != "ended":
            stays = "was never started; name it to remove it" if run.state == "new" else "is lost: name it to remove it"
        else:
            stays = ""
        if run.id in named and stays:
            raise RunError(f"{found.host}: {run.id}: {stays}", do=f"kdconsole stop {run.id}, or wait for its end")
        path = here.get(run.run or "")
        if not stays and path is not None and run.checkpoints:
            say(f"reading the copy in {path}")
        loss = "" if stays else not_here(run, path)
        if loss and not named and not rules.unfetched:
            stays = f"was not fetched: {loss}; name it, or give --unfetched"
        runs.append(Judged(run, age, not stays, stays or loss or _only_there(run, path)))
    # A named run is all that is wanted then.
    rest = () if named else tuple(each for each in found.rest if _may_go(each, found.time))
    return Plan(found, tuple(runs), rest)


def _named(found: Survey, name: str) -> HostRun:
    matching = [each for each in found.runs if each.id == name] or [r for r in found.runs if r.id.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    told = f"{len(matching)} runs begin so" if matching else "no such run there"
    raise RunError(f"{found.host}: run {name}: {told}", do=f"see kdconsole runs --host {found.host}")


def _may_go(rest: Rest, now: float) -> bool:
    return not rest.busy and not rest.used and (rest.what == "removed" or now - rest.seen > REST_SECONDS)


def not_here(run: HostRun, path: Path | None) -> str:
    """What of a run is nowhere but on its host, in words; empty when what `fetch` brings by default is here.

    Args:
        run: on the host.
        path: its directory here, None when this console does not know it.
    """
    if path is None:
        maker = f" (it was made from {run.by})" if run.by else ""
        return f"{_weights(run) or 'its record'} may be nowhere else{maker}"
    events = path / EVENTS
    whole = (events.stat().st_size if events.is_file() else 0) == run.events_bytes
    if not whole or (run.exit is not None and not (path / EXIT).is_file()):
        return "its stream is not here to its end"
    for each in chosen(run.checkpoints, Choice()):
        if not _stands(run, path, each):
            return f"{_weights(run)} {'is' if len(run.checkpoints) == 1 else 'are'} nowhere else"
    if run.model_bytes and not run.checkpoints and not (path / "model").is_dir():
        return "its model is nowhere else"
    return ""


def _stands(run: HostRun, path: Path, each: HostCheckpoint) -> bool:
    """A checkpoint is here too, whole."""
    local = path / checkpoint.DIRECTORY / each.name
    try:
        checkpoint.verify(local, run.run)
        return sha256_file(local / checkpoint.MANIFEST) == each.sha256
    except (OSError, checkpoint.CheckpointError):
        return False


def _only_there(run: HostRun, path: Path | None) -> str:
    """Of a run that was fetched, what was left there."""
    if path is None:
        return ""
    names = [each.name for each in run.checkpoints if not (path / checkpoint.DIRECTORY / each.name).is_dir()]
    if run.model_bytes and not (path / "model").is_dir():
        names.append("model")
    return f"not here: {', '.join(names)}" if names else ""


def _weights(run: HostRun) -> str:
    number = len(run.checkpoints)
    told = [f"its {number} checkpoint{'s' * (number > 1)}"] if number else []
    return " and ".join([*told, *(["its model"] if run.model_bytes else [])])


async def remove(reach: Reach, plan: Plan, say: Say) -> Cleaned:
    """Carries a plan out. The host looks at everything again before it goes: one that was started meanwhile stays.

    Raises:
        TransportError: the connection was lost; what is gone is gone, and can be done again.
    """
    host = plan.survey.host
    transport = reach.transport(host)
    python = await python_of(transport)
    removed, refused, freed = list[str](), list[str](), 0
    items = [(f"runs/{each.run.id}", each.run.run) for each in plan.going] + [(each.name, None) for each in plan.rest]
    for name, run in items:
        try:
            answer = await ask_runs(transport, "remove", python=python, base=plan.survey.base, name=name, run=run)
        except HostToolError as error:
            refused.append(str(error))
            continue
        gone = field(answer, "bytes", int)
        freed += gone
        removed.append(name)
        say(f"removed {name}: {gone / 1e6:,.1f} MB")
    return Cleaned(tuple(removed), freed, tuple(refused))
