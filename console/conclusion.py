"""How a run that is over ended: the one judgement that every front end tells."""

from __future__ import annotations

from dataclasses import dataclass

from console.run_state import RunState
from dispatch.manifest import ExitRecord
from engine.errors import ExitCode
from engine.falsifiers import exit_code_of
from engine.stream import End


@dataclass(frozen=True)
class Conclusion:
    """`status` is that of the `end` event, or CRASHED, LOST or DISPUTED; `reason` is one sentence."""

    status: str
    reason: str
    exit_code: ExitCode


def conclude(
    state: RunState, record: ExitRecord | None, interrupted: bool = False, rebooted: bool = False
) -> Conclusion:
    """Status, reason and exit code, from the `end` event, the exit record and our own judgement.

    Args:
        state: everything that the run sent.
        record: how its process ended; None where nobody saw that.
        interrupted: we asked it to stop.
        rebooted: its host was started anew since.
    """
    end = state.end if record is None or record.wrote else None
    if record is not None and record.stall is not None and (end is None or end.status != "COMPLETED"):
        return Conclusion("TIMEOUT", f"{record.describe()}, in phase {record.stall.phase}", ExitCode.TIMEOUT)
    if end is None:
        # How comes first: where room is short, the rest is cut.
        unseen = "its host was started anew while it ran" if rebooted else "its end was not recorded"
        how = unseen if record is None else record.describe()
        # A second signal, or one before the engine could listen, ends it without a word; that is no crash.
        stopped = record is not None and (
            record.exit_code == ExitCode.INTERRUPTED or (interrupted and record.signal is not None)
        )
        when = (
            f"without an end event in phase {state.phase}"
            if record is None or record.wrote
            else "before its first event"
        )
        reason = f"{how}, {when}; see launch.log"
        if stopped:
            return Conclusion("STOPPED", reason, ExitCode.INTERRUPTED)
        return Conclusion("CRASHED", reason, ExitCode.UNDECIDED)
    judged = exit_code_of(state.judged)
    if end.exit_code is None:  # a log that tells how it ended; its verdicts are all there is to go by
        return _by_verdicts(state, end, judged)
    code = _known(end.exit_code)
    # The engine's word counts only where our own judgement of the same stream says the same.
    final = end.status == "COMPLETED" or code == ExitCode.OK
    if state.disagreements or (final and judged != code):
        return Conclusion("DISPUTED", "engine and console judge differently", ExitCode.UNDECIDED)
    return Conclusion(end.status, end.reason, code)


def _by_verdicts(state: RunState, end: End, judged: ExitCode) -> Conclusion:
    if state.disagreements:
        return Conclusion("DISPUTED", "what is stated is not what the numbers say", ExitCode.UNDECIDED)
    if end.status != "COMPLETED" and judged == ExitCode.OK:
        judged = ExitCode.UNDECIDED
    return Conclusion(end.status, end.reason, judged)


def _known(exit_code: int) -> ExitCode:
    """The code as one of ours; what a foreign writer put there is undecided."""
    return ExitCode(exit_code) if exit_code in set(ExitCode) else ExitCode.UNDECIDED
