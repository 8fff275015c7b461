"""What the operator must know of a run before anything else: its state, what is wrong, how old all of it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from console.conclusion import conclude
from console.long_work import work
from console.palette import ORDER
from console.run_state import RunState
from console.times import age
from console.view import View
from dispatch.liveness import HEARTBEAT_SECONDS, phase_budget, step_budget
from engine.errors import ExitCode
from engine.stream import Checkpoint, CheckpointFailed, Verdict
from engine.text import clean

SILENCE_SECONDS = HEARTBEAT_SECONDS
"""Without any line for this long, the process counts as stalled."""
RECENT_STEPS = 2_000
_SET_BACK_SECONDS = 1.0
"""A stamp that lies further than this in the future was made before its clock was set back."""

CHANGED_NOTE = "since the run ended: "
"""How a note of a view begins that tells of a file which no longer agrees with the run's checksums."""
_SEVERITIES = ("fatal", "gate", "warn")
EXIT_MEANINGS = {
    ExitCode.OK: "every fatal and gate verdict is PASS",
    ExitCode.FAILED: "a fatal or gate verdict is FAIL",
    ExitCode.USAGE: "wrong usage, configuration, model or data",
    ExitCode.CONNECTION: "the host could not be reached",
    ExitCode.TIMEOUT: "a time-out or a stall",
    ExitCode.UNDECIDED: "crashed, or a verdict is undecided",
    ExitCode.INTERRUPTED: "stopped by a signal",
}


@dataclass(frozen=True)
class Outlook:
    """The state of a run as one word of `palette.RUNS`, and what goes with it.

    `alarm` is what has to be said before anything else, in clauses from the most important on; empty while all is well.
    `reason` and `exit_code` are those of a run that is over.
    """

    status: str
    alarm: tuple[str, ...] = ()
    reason: str = ""
    exit_code: ExitCode | None = None

    @property
    def ended(self) -> bool:
        """Nothing more will come of it."""
        return self.exit_code is not None


@dataclass(frozen=True)
class Ages:
    """Seconds since something was last heard, each by its own clock; None where it never was, or cannot be told.

    `link` since the host last answered, `data` since the last line of any kind, `heartbeat` since the process last said
    that it lives, `step` since training last went on. Where the lines have no times, nothing can be said of it.
    """

    link: float | None = None
    data: float | None = None
    heartbeat: float | None = None
    step: float | None = None


def outlook(view: View) -> Outlook:
    """The state of the run at the moment of the view.

    An end that was heard of counts first, then whether the host can be asked at all, then the three clocks: a process
    that fell silent, training that makes no step, a phase that takes longer than it may.
    """
    state, link = view.state, view.link
    if view.reading is not None and not view.scrubbed:
        return Outlook("READING")
    cut_off = view.review is not None and bool(link.problem)
    if state.end is not None or (link.exit is not None and not view.scrubbed and not cut_off):
        ended = conclude(state, link.exit)
        changed = [note.removeprefix(CHANGED_NOTE) for note in view.notes if note.startswith(CHANGED_NOTE)]
        if changed and ended.exit_code == ExitCode.OK:  # nothing that was changed since is believed
            reason = f"not as it was when the run ended: {', '.join(changed)}"
            return Outlook("CHANGED", reason=reason, exit_code=ExitCode.FAILED)
        return Outlook(ended.status, reason=ended.reason, exit_code=ended.exit_code)
    if view.scrubbed:
        stall = _progress_stall(view)
        return Outlook("STALLED" if stall else _going(state), stall)
    if view.review is not None:
        return _left_open(view)
    if link.problem:
        return Outlook("UNREACHABLE", _unreachable(view))
    if link.status in ("lost", "ended"):
        return _lost(view)
    if not link.live:
        return Outlook(_going(state))
    stall = _silence(view) or _progress_stall(view)
    return Outlook("STALLED" if stall else _going(state), stall)


def _lost(view: View) -> Outlook:
    found = "its host was started anew while it ran" if view.link.rebooted else "neither an end nor a process was found"
    reason = f"{found}, last phase {view.state.phase}; see launch.log"
    return Outlook("LOST", reason=reason, exit_code=ExitCode.UNDECIDED)


def _left_open(view: View) -> Outlook:
    """Evidence without an end: what is here is all that a review goes by."""
    assert view.review is not None
    if view.link.problem:
        reason = f"it cannot be read: {clean(view.link.problem, 500)}"
        return Outlook("LOST", reason=reason, exit_code=ExitCode.UNDECIDED)
    if not view.state.events and view.review.manifest is None:
        reason = "what was asked for is here, and nothing of what ran"
        return Outlook("LOST", reason=reason, exit_code=ExitCode.UNDECIDED)
    if view.manifest is not None and view.manifest.remote is not None:
        host = clean(view.manifest.remote.host, 80)
        return Outlook("UNASKED", ("its end is not here", f"a review does not ask {host}"))
    if view.link.status in ("lost", "ended"):
        return _lost(view)
    return Outlook(_going(view.state), ("it has not ended", "a review shows what is here and does not follow"))


def _going(state: RunState) -> str:
    return "STARTING" if state.run is None else "RUNNING"


def _unreachable(view: View) -> tuple[str, ...]:
    heard = ages(view).data
    known = "never heard of" if heard is None else f"last heard {age(heard)} ago"
    problem = clean(view.link.problem, 500)
    if not view.link.live:  # the stream itself is broken, and asking again would not mend it
        return ("the stream cannot be read", problem, "what runs is unknown")
    return (f"{clean(view.link.host, 80)} cannot be reached", known, "the run may go on", problem)


def _silence(view: View) -> tuple[str, ...]:
    told = ages(view)
    if told.data is None or told.data <= SILENCE_SECONDS:
        return ()
    step = () if told.step is None else (f"last step {age(told.step)} ago",)
    return (f"nothing heard for {age(told.data)}", *step, f"phase {view.state.phase}")


def _progress_stall(view: View) -> tuple[str, ...]:
    state, told = view.state, ages(view)
    if not view.timed:
        return ()
    beat = () if told.heartbeat is None else (f"heartbeat {age(told.heartbeat)}",)
    if told.step is not None and state.phase == "train" and told.step > longest_wait(state):
        return (f"no step for {age(told.step)}", *beat, "phase train")
    if not state.phases or (state.phases[-1].budget_seconds is None and state.phase == "train"):
        return ()
    phase = state.phases[-1]
    if state.progress is not None and state.progress.t >= phase.started:  # it says itself that it goes on
        waited = _passed(host_now(view), state.progress.t)
        allowed = phase_budget(phase.name, phase.budget_seconds)
        return (f"no progress for {age(waited)}", *beat, f"phase {phase.name}") if waited and waited > allowed else ()
    spent = max(phase.seconds, _passed(host_now(view), phase.started) or 0.0)
    budget = phase_budget(phase.name, phase.budget_seconds)
    if spent > budget:
        return (f"phase {phase.name} for {age(spent)} of its {age(budget)}", *beat)
    return ()


def longest_wait(state: RunState) -> float:
    """Seconds that may pass without a step: a minute, 20 mean steps, or twice what an evaluation and a save took.

    The first one of an attempt has more of them, for it may have to compile.
    """
    seconds = state.steps.column("seconds")[-RECENT_STEPS:]
    seconds = seconds[np.isfinite(seconds)]
    with np.errstate(over="ignore"):
        mean = float(seconds.mean()) if len(seconds) else None
    if state.last_step is not None and state.run is not None and 0 <= state.last_step.seq < state.run.seq:
        mean = None
    saved = next((c.waited_seconds for c in reversed(state.checkpoints) if isinstance(c, Checkpoint)), 0.0)
    between = 2 * ((state.evals[-1].seconds if state.evals else 0.0) + saved)
    return step_budget(mean, between)


def host_now(view: View) -> float:
    """The time at the run's host in Unix seconds; events' own times are to be held against this one.

    Two machines' clocks differ, so what passed since the last line is measured on our own clock and added to that
    line's stamp. On this machine both are the same clock, and the silence before we began to listen counts as well.
    """
    state, link = view.state, view.link
    if view.scrubbed or not link.live or not link.heard or not state.events:
        return view.now
    extrapolated = state.last_t + max(0.0, view.now - link.heard)
    return max(extrapolated, view.now) if link.host == "localhost" else extrapolated


def ages(view: View) -> Ages:
    """How old everything is that the view knows."""
    state, now = view.state, host_now(view)
    link = max(0.0, view.now - view.link.answered) if view.link.answered and not view.scrubbed else None
    if not state.events or not view.timed:
        return Ages(link)
    data = _passed(now, state.last_t)
    beat = None if state.heartbeat is None else _passed(now, state.heartbeat.t)
    # As in the falsifiers: an evaluation between two steps and the beginning of the phase end a wait as well.
    stamps = [state.last_step.t] if state.last_step else []
    stamps += [state.evals[-1].t] if state.evals and state.phase == "train" else []
    stamps += [state.phases[-1].started] if state.phase == "train" else []
    waits = [wait for wait in (_passed(now, t) for t in stamps) if wait is not None]
    return Ages(link, data, beat, min(waits, default=None))


def _passed(now: float, t: float) -> float | None:
    """Seconds from `t` to `now`; None where a clock was set back since, or a stamp is no time."""
    passed = now - t
    return max(0.0, passed) if -_SET_BACK_SECONDS <= passed < math.inf else None


def disagreements(view: View) -> list[str]:
    """Where engine and console judge differently, without what a batch that ended between two lines makes it seem.

    The engine states a verdict right after the event that changed it. While a run goes on, or when the view is cut at
    a moment, a difference counts once something else was heard after that event.
    """
    state = view.state
    told = state.disagreements
    if not told or (outlook(view).ended and not view.scrubbed):
        return told
    if view.scrubbed:
        fresh = {v.id for v in state.history if v.t > view.now - _SET_BACK_SECONDS}
        return [line for line in told if line.partition(":")[0] not in fresh]
    newest = max((v.seq for v in state.history), default=-1)
    last = (state.heartbeat, state.vitals, state.last_step, *state.evals[-1:], *state.checkpoints[-1:])
    return told if any(event is not None and event.seq > newest for event in last) else []


def verdict_counts(state: RunState) -> list[tuple[str, int]]:
    """How many verdicts there are of each kind that there is, the worst first."""
    words = [v.verdict if v.verdict in ORDER else "UNKNOWN" for v in state.judged]
    return [(word, words.count(word)) for word in ORDER if word in words]


def by_urgency(verdicts: tuple[Verdict, ...]) -> list[Verdict]:
    """FAIL, UNKNOWN, PENDING, PASS; within each in the contract's order."""
    return sorted(verdicts, key=lambda v: ORDER.index(v.verdict) if v.verdict in ORDER else 1)


def worst_verdict(state: RunState) -> Verdict | None:
    """The verdict to look at first: the worst one, and of those the one that weighs most."""
    weights = {severity: weight for weight, severity in enumerate(_SEVERITIES)}
    return min(by_urgency(state.judged), key=lambda v: (_rank(v), weights.get(v.severity, 3)), default=None)


def _rank(verdict: Verdict) -> int:
    return ORDER.index(verdict.verdict) if verdict.verdict in ORDER else 1


def steps_made(state: RunState) -> int:
    """How far it came; what the end says, where the lines do not tell of every step."""
    made, source = state.last_step.step if state.last_step else 0, state.source
    return made if state.end is None or source.timed or source.unit != "step" else max(made, state.end.steps)


def asked_and_ran(view: View) -> str:
    """That another number of steps ran than were asked for: `asked 50, ran 62`; empty where that is as it should be.

    Of a run of ours that ended early its end tells; a log is held against the manifest beside it, and may go beyond.
    """
    state, asked = view.state, view.state.target_steps
    made = steps_made(state)
    over = made > (asked or math.inf)
    short = not view.timed and state.end is not None and state.end.status == "COMPLETED" and made < (asked or 0)
    return f"asked {asked:,}, ran {made:,}" if over or short else ""


def fraction_done(view: View) -> float | None:
    """How much of the run is done, 0 to 1: of its steps, or of a smoke's time if that is further; None if unknown."""
    state, run = view.state, view.state.run
    if state.end is not None and state.end.status == "COMPLETED":
        return 1.0
    if run is None:
        return None
    if not state.makes_steps:
        made_so_far = work(view, host_now(view))
        return made_so_far.fraction if made_so_far else None
    if run.steps_asked <= 0 and not view.timed:  # nobody said of how many
        return None
    made = steps_made(state) / run.steps_asked if run.steps_asked > 0 else 0.0
    spent = 0.0
    if run.mode == "smoke" and run.budget_seconds and view.timed:
        until = state.end.t if state.end else host_now(view)
        spent = (until - state.first_t) / run.budget_seconds
    done = max(made, spent)
    return min(1.0, max(0.0, done)) if math.isfinite(done) else None


def last_checkpoint(state: RunState) -> tuple[Checkpoint | None, CheckpointFailed | None]:
    """The newest checkpoint that stands, and the newest failure if it came after that one."""
    failed: CheckpointFailed | None = None
    for mark in reversed(state.checkpoints):
        if isinstance(mark, Checkpoint):
            return mark, failed
        failed = failed or mark
    return None, failed


def checkpoint_phrase(state: RunState, ended: bool = False) -> str:
    """Where the run could be taken up again: `ckpt 12,000 verified`; empty for a smoke, which keeps none.

    A checkpoint that a log only tells of is `saved`: nobody read it back.

    Args:
        state: the run.
        ended: nothing more will come of it, whether it said so or not.
    """
    good, failed = last_checkpoint(state)
    if failed is not None:
        return f"ckpt {failed.step:,} FAILED" + (f", last good {good.step:,}" if good else ", none before it")
    if good is not None:
        return f"ckpt {good.step:,} {'verified' if good.sha256 else 'saved'}"
    if state.run is None or state.run.mode != "train":
        return ""
    if ended or state.end is not None:
        return "no ckpt"
    return "no ckpt yet" if state.source.timed else ""
