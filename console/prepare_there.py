"""What a run would be on another host, looked at there before anything is sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from console import gate
from console.preflight import preflight
from console.prepare import Check, Outcome, Prepared, gate_check
from dispatch.places import Reach
from dispatch.preflight import Line
from dispatch.remote import plan_host
from engine.errors import KdError
from engine.text import clean

_FIRST: tuple[Outcome, ...] = ("FAIL", "UNKNOWN", "PENDING", "PASS")
_OUTCOMES: dict[str, Outcome] = {"PASS": "PASS", "FAIL": "FAIL"}


async def look_there(reach: Reach, prepared: Prepared, evidence: Path) -> Prepared:
    """A draft that was looked at here, with what its host says of it.

    Args:
        reach: the ways to the hosts.
        prepared: has a host, and nothing here that forbids it.
        evidence: where a passed smoke is looked for.
    """
    host, config = prepared.draft.host, prepared.config
    assert host is not None
    assert config is not None
    checks = [each for each in prepared.checks if each.outcome != "PENDING"]
    found = None
    try:
        plan = await plan_host(reach, host, config, lambda text: None)
        looked = await preflight(reach, host, config, evidence, plan=plan)
        checks += [_check(line) for line in looked.lines]
        if config.mode == "train":
            found = gate.look(plan.config, evidence, host, facts=looked.facts)
            checks.append(gate_check(found))
    except KdError as error:
        checks.append(Check(host, "FAIL", clean(str(error), 2000)))
    checks.sort(key=lambda check: _FIRST.index(check.outcome))  # what is wrong is seen without scrolling
    return replace(prepared, checks=tuple(checks), gate=found, complete=True)


def _check(line: Line) -> Check:
    """A line of a pre-flight as a check; one that only warns forbids nothing."""
    outcome = _OUTCOMES.get(line.outcome, "UNKNOWN")
    told = (
        [line.found]
        if outcome == "PASS"
        else [line.found, *([f"wanted: {line.wanted}"] if line.wanted else []), line.do]
    )
    return Check(line.name, outcome, "; ".join(filter(None, told)), forcible=line.override is not None)
