"""What is wrong with what a run does, though its process may live: stalls, verdicts, losses, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from console.irregular import BEFORE, non_finite, spikes
from console.outlook import by_urgency, last_checkpoint
from console.palette import CHECKPOINTS, RUNS, VERDICTS, Mark
from console.run_state import RunState
from console.scored import off_text
from console.times import age
from console.view import Link
from engine.stream import Verdict

RECENT_STEPS = 2_000
"""Steps at the end of a run in which a spike is looked for; of an older one the chart tells."""
PROCESS_STATES = {"T": "is suspended", "t": "is being traced", "D": "waits for a device"}
"""What the kernel's letter for a process tells of one that makes no progress."""
_SPIKE = Mark("⚠", "spike", "bold $warning")


@dataclass(frozen=True)
class Concern:
    """Something that is wrong.

    `severe` is what may cost the run: a stall, a fatal or gate FAIL, a loss that is no number, an unsaved checkpoint.
    `short` says it in the fewest words; `verdict` is the id of the one that FAILs, empty for anything else.
    """

    mark: Mark
    text: str
    short: str
    severe: bool
    verdict: str = ""


def concerns(state: RunState, link: Link | None = None) -> list[Concern]:
    """Everything that is wrong, the worst first.

    Args:
        state: the run.
        link: the way to it; None where only its stream counts.
    """
    failing = [v for v in by_urgency(state.judged) if v.verdict == "FAIL"]
    severe = [_failed(v) for v in failing if v.severity != "warn"]
    told = {v.step for v in failing}
    return [
        *(() if link is None else supervision(link)),
        *_controls(state),
        *severe,
        *(each for each in (_non_finite(state, told), _unsaved(state)) if each is not None),
        *(_failed(v) for v in failing if v.severity == "warn"),
        *_spikes(state),
    ]


def supervision(link: Link) -> list[Concern]:
    """What the supervisor on the host says of the run, or that it is gone; nothing while the host is not reached."""
    known = link.liveness
    if known is None or known.state == "UNKNOWN" or known.supervisor is None:
        return []
    if known.unsupervised:
        text = f"no supervisor for {age(known.supervisor_seconds)}: the run's end will not be recorded"
        return [Concern(RUNS["STALLED"], text, "no supervisor", True)]
    stall = known.supervisor.stall
    if stall is None:
        return []
    why = PROCESS_STATES.get(stall.process, "")
    stacks = "; its stacks are in launch.log" if stall.stacks else ""
    waited = age(known.supervisor.waited_seconds)
    text = f"no progress for {waited} in phase {stall.phase}, says the supervisor{why and f', it {why}'}{stacks}"
    return [Concern(RUNS["STALLED"], text, f"no progress for {waited}", True)]


def _controls(state: RunState) -> list[Concern]:
    """Controls of an evaluation that did not score what they must: whatever it scores says nothing."""
    return [
        Concern(VERDICTS["FAIL"], f"control off: {off_text(each)}", f"control {each.name} OFF", True)
        for each in state.answers.off
    ]


def _failed(verdict: Verdict) -> Concern:
    at = f" at step {verdict.step:,}" if verdict.step and f"step {verdict.step}" not in verdict.observed else ""
    short = f"FAIL {verdict.id}"
    text = f"{short}: {verdict.observed}{at}"
    return Concern(VERDICTS["FAIL"], text, short, verdict.severity != "warn", verdict.id)


def _non_finite(state: RunState, told: set[int]) -> Concern | None:
    """Losses that are no numbers, unless a verdict tells of the first one."""
    losses = state.steps.column("loss")
    bad = non_finite(losses)
    if not len(bad):
        return None
    step = int(state.steps.column("step")[bad[0]])
    if step in told:
        return None
    value = "NaN" if math.isnan(losses[bad[0]]) else "infinite"
    more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
    return Concern(VERDICTS["FAIL"], f"loss {value} at step {step:,}{more}", f"loss {value}", True)


def _unsaved(state: RunState) -> Concern | None:
    """A checkpoint that was not saved, and none since."""
    failed = last_checkpoint(state)[1]
    if failed is None:
        return None
    short = f"checkpoint {failed.step:,} FAILED"
    return Concern(CHECKPOINTS["failed"], f"{short}: {failed.error}", short, True)


def _spikes(state: RunState) -> list[Concern]:
    """The highest of the losses that stand out from the steps before them."""
    found = spikes(state.steps.column("loss")[-RECENT_STEPS - BEFORE :])
    if found is None:
        return []
    numbers = state.steps.column("step")[-RECENT_STEPS - BEFORE :]
    short = f"spike {found.ratios[found.worst]:,.3g}x"
    return [Concern(_SPIKE, f"{short} at step {int(numbers[found.rows[found.worst]]):,}", short, False)]
